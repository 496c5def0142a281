"""The stage of variations in a Trainer, from a bank of digits to a bank of their variations."""

import csv
import functools
import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from callbacks import PredictionWriter
from callbacks.pictures import render
from datamodules import BankDataModule, ImageDataModule
from leanlight.contracts import CollectsPredictions, UserError, derived_seed
from leanlight.predictions import read_predictions
from lit_modules.dda import DiffusionAugmentation, Identity, Teacher, Tiny, TinyDiffusion, teacher_digest, write_bank
from lit_modules.dda.bank import originals
from lit_modules.nn import ConvNet, pooled_features

pytest.importorskip("diffusers")

SOURCES = 30
make_network = functools.partial(ConvNet, in_channels=1, width=8, depth=2, image_size=8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(make_network().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def teacher(weights):
    return Teacher(network=make_network, weights=weights)


@pytest.fixture(scope="module")
def network(weights):
    made = make_network()
    made.load_state_dict(torch.load(weights, weights_only=True))
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def bank(tmp_path_factory, network):
    data = ImageDataModule(dataset="digits")
    data.setup()
    folder = tmp_path_factory.mktemp("bank")
    images, labels = data.train_split.images[:SOURCES], data.train_split.labels[:SOURCES].numpy()
    rows = originals(labels, np.full(SOURCES, -1))
    write_bank(folder, images, rows, data.meta.classes, teacher_digest(network))
    return folder


@pytest.fixture(scope="module")
def diffuser(tmp_path_factory):
    torch.manual_seed(1)
    options = {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "add_attention": False,
    }
    module = TinyDiffusion(image_size=8, network=options)
    path = tmp_path_factory.mktemp("diffuser") / "last.ckpt"
    runner = pl.Trainer(accelerator="cpu", logger=False, barebones=True, max_steps=1)
    runner.fit(module, ImageDataModule(dataset="digits", batch_size=4))
    runner.save_checkpoint(path)
    return path


def data(bank, **options):
    return BankDataModule([bank], **{"dataset": "digits", "val_fraction": 0, "predict_split": "train", **options})


def run(module, source, folder, stop_after=None):
    """Predict into `folder` and collect the bank."""
    runner = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[PredictionWriter(piece_items=7, resume=True), *([Stop(stop_after)] if stop_after else [])],
    )
    runner.predict(module, source)
    target = folder / "artifacts" / "bank"
    target.mkdir(parents=True, exist_ok=True)
    module.collect(lambda: read_predictions(folder), target)
    return target


class Stop(pl.Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx + 1 == self.batches:
            raise RuntimeError("killed")


def read(folder):
    with open(folder / "manifest.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    return load_file(folder / "bank.safetensors")["images"], columns, json.loads((folder / "bank.json").read_text())


@pytest.fixture(scope="module")
def varied(bank, teacher, diffuser, tmp_path_factory):
    pl.seed_everything(3)
    module = DiffusionAugmentation(teacher, Tiny(diffuser, strength=0.4, steps=5, chunk=8), k=2)
    folder = run(module, data(bank, eval_batch_size=8), tmp_path_factory.mktemp("varied"))
    return module, folder


def test_identity_gives_copies_that_score_1_and_are_all_kept(bank, teacher, tmp_path):
    module = DiffusionAugmentation(teacher, Identity(), k=3, omega=1.0)
    images, columns, record = read(run(module, data(bank), tmp_path))
    sources = load_file(bank / "bank.safetensors")["images"]
    assert torch.equal(images, sources.repeat_interleave(3, 0))
    assert (columns["score"] == 1).all()
    assert (columns["kept"] == 1).all()
    assert record["kept"] == 1.0
    assert "agreement_dropped" not in record


def test_the_bank_holds_k_variations_of_every_original_with_what_is_known_of_them(varied, bank, network):
    module, folder = varied
    assert isinstance(module, CollectsPredictions)
    images, columns, record = read(folder)
    original = read(bank)
    assert images.shape == (2 * SOURCES, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert columns["item"].tolist() == list(range(2 * SOURCES))
    assert columns["source"].tolist() == [i for i in range(SOURCES) for _ in range(2)]
    assert columns["k"].tolist() == [1, 2] * SOURCES
    assert columns["label"].tolist() == original[1]["label"].repeat(2).tolist()
    seen, source = images.float() / 255, original[0].float() / 255
    assert columns["teacher_label"].tolist() == network(seen).argmax(1).tolist()
    known, features = pooled_features(network, source), pooled_features(network, seen)
    known, features = known - known.mean(0), features - known.mean(0)
    scores = torch.cosine_similarity(known.repeat_interleave(2, 0), features)
    np.testing.assert_allclose(columns["score"], scores, atol=1e-5)
    assert columns["kept"].tolist() == (columns["score"] >= 0.6).astype(int).tolist()
    assert 0 < columns["kept"].sum() < 2 * SOURCES
    assert record["source_sha256"] == original[2]["images_sha256"]
    assert record["teacher"] == teacher_digest(network)
    assert (record["items"], record["classes"]) == (2 * SOURCES, [str(digit) for digit in range(10)])
    agrees, kept = columns["teacher_label"] == columns["label"], columns["kept"] == 1
    assert record["kept"] == pytest.approx(kept.mean())
    assert record["agreement"] == pytest.approx(agrees.mean())
    assert record["agreement_kept"] == pytest.approx(agrees[kept].mean())
    assert record["agreement_dropped"] == pytest.approx(agrees[~kept].mean())
    assert not (folder / ".images").exists()


def test_the_student_reads_it_beside_the_originals(varied, bank):
    folder = varied[1]
    both = BankDataModule([bank, folder], dataset="digits", val_fraction=0)
    both.ensure_available()
    both.setup()
    images, columns, _ = read(folder)
    assert len(both.train_split) == SOURCES + int(columns["kept"].sum())
    assert torch.equal(both.train_split.images[SOURCES:], images[columns["kept"] == 1])


def test_seeds_are_of_run_source_and_number_alone(varied):
    columns = read(varied[1])[1]
    expected = [derived_seed(3, "variation", source, k) for source in range(SOURCES) for k in (1, 2)]
    with open(varied[1] / "manifest.csv", newline="") as file:
        assert [int(row["seed"]) for row in csv.DictReader(file)] == expected
    assert len(set(columns["seed"])) == 2 * SOURCES


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in ("bank.safetensors", "manifest.csv", "bank.json")}


def test_batches_of_another_size_give_the_same_bank(varied, bank, teacher, diffuser, tmp_path):
    pl.seed_everything(3)
    module = DiffusionAugmentation(teacher, Tiny(diffuser, strength=0.4, steps=5, chunk=8), k=2)
    folder = run(module, data(bank, eval_batch_size=11), tmp_path)
    assert files_of(folder) == files_of(varied[1])


def test_a_killed_stage_goes_on_to_the_same_bank(varied, bank, teacher, diffuser, tmp_path):
    def module():
        pl.seed_everything(3)
        return DiffusionAugmentation(teacher, Tiny(diffuser, strength=0.4, steps=5, chunk=8), k=2)

    with pytest.raises(RuntimeError, match="killed"):
        run(module(), data(bank, eval_batch_size=8), tmp_path, stop_after=2)
    written = sorted((tmp_path / "artifacts" / "predictions").glob("*.safetensors"))
    assert written
    before = [path.stat().st_mtime_ns for path in written]
    folder = run(module(), data(bank, eval_batch_size=8), tmp_path)
    assert [path.stat().st_mtime_ns for path in written] == before
    assert files_of(folder) == files_of(varied[1])


def test_the_order_of_pieces_does_not_matter(varied, bank, tmp_path):
    """Processes and resumed runs write theirs in other orders, and one piece may enclose another."""
    module, folder = varied
    pieces = list(read_predictions(folder.parents[1]))
    joined = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
    torn = [{name: value[rows] for name, value in joined.items()} for rows in (slice(1, None, 2), slice(0, None, 2))]
    told = module.collect(lambda: iter(torn), tmp_path)
    assert files_of(tmp_path) == files_of(folder)
    assert told.items() <= read(folder)[2].items()
    assert {"kept", "score", "agreement", "agreement_kept", "agreement_dropped"} == told.keys()


def test_the_best_share_is_kept_by_the_other_mode(varied, bank, teacher, diffuser, tmp_path):
    pl.seed_everything(3)
    backend = Tiny(diffuser, strength=0.4, steps=5, chunk=8)
    module = DiffusionAugmentation(teacher, backend, k=2, mode="top_fraction", fraction=0.25)
    _, columns, record = read(run(module, data(bank, eval_batch_size=8), tmp_path))
    known = read(varied[1])[1]["score"]
    assert columns["kept"].sum() == 15
    assert known[columns["kept"] == 1].min() >= known[columns["kept"] == 0].max()
    assert record["fraction"] == 0.25
    assert "omega" not in record


def test_an_omega_that_keeps_nothing_warns_and_leaves_originals(bank, teacher, diffuser, tmp_path):
    pl.seed_everything(3)
    module = DiffusionAugmentation(teacher, Tiny(diffuser, strength=1.0, steps=2, chunk=8), k=1, omega=1.0)
    with pytest.warns(UserWarning, match=r"omega: 1\.0 keeps none of 30 variations, whose highest score is 0\.\d+"):
        folder = run(module, data(bank), tmp_path)
    assert read(folder)[1]["kept"].sum() == 0
    assert "agreement_kept" not in read(folder)[2]
    both = BankDataModule([bank, folder], dataset="digits", val_fraction=0)
    with pytest.raises(UserError, match=r"omega: .*keeps none"):
        both.setup()


def test_pictures_show_sources_with_their_variations_and_what_the_filter_did(varied, bank, tmp_path):
    module, folder = varied
    drawn = module.media("test")
    assert set(drawn) == {"variations", "scores", "label_agreement"}
    grid = drawn["variations"]
    images, columns, _ = read(folder)
    rows = torch.linspace(0, SOURCES - 1, 10).long().tolist()
    assert grid.columns == 3
    assert grid.captions[:2] == ["source", grid.captions[1]]
    for place, row in enumerate(rows):
        assert torch.equal(grid.images[3 * place], read(bank)[0][row].float() / 255)
        assert torch.equal(grid.images[3 * place + 2], images[2 * row + 1].float() / 255)
        expected = f"{columns['score'][2 * row + 1]:.2f}"
        assert grid.captions[3 * place + 2] in (expected, f"{expected} out")
    assert len(drawn["scores"].series["kept"]) == columns["kept"].sum()
    assert drawn["label_agreement"].values["all"] == pytest.approx(read(folder)[2]["agreement"])
    for name, item in drawn.items():
        assert render(item, tmp_path / name, name).is_file()
    assert module.media("train") == {}


def test_a_module_made_in_python_is_rebuilt_from_its_hyper_parameters(varied, tmp_path):
    module = varied[0]
    state = {"state_dict": {}, "hyper_parameters": dict(module.hparams), "pytorch-lightning_version": "2.6.0"}
    torch.save(state, tmp_path / "module.ckpt")
    again = DiffusionAugmentation.load_from_checkpoint(tmp_path / "module.ckpt", weights_only=True)
    assert again.backend == module.backend
    assert again.teacher.weights == module.teacher.weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"omega": 1.1}, r"omega: expected a number in \[-1, 1\], .*got 1.1"),
        ({"k": 0}, "k: expected an integer of at least 1"),
        ({"fraction": 0.0}, "fraction: expected a number above 0 and at most 1, got 0.0"),
        ({"encoder": "dino"}, "encoder: expected one of clip, teacher, got 'dino'"),
        ({"mode": "best"}, "mode: expected one of threshold, top_fraction, got 'best'"),
    ],
)
def test_bad_settings_are_one_line(teacher, options, message):
    with pytest.raises(UserError, match=message):
        DiffusionAugmentation(teacher, Identity(), **options)


def test_data_that_may_not_be_varied_is_one_line(teacher, bank, varied, tmp_path):
    for source, options, message in (
        (ImageDataModule(dataset="digits"), {}, "data: expected a BankDataModule, .*ImageDataModule"),
        (data(bank, predict_split="test"), {}, "predict_split: expected train, since the images of test are real"),
        (
            BankDataModule(dataset="digits", instead="noise", items=9, val_fraction=0, predict_split="train"),
            {},
            "instead: expected a bank to vary",
        ),
        (data(bank), {"encoder": "clip"}, "encoder: expected teacher, since Identity has no CLIP"),
    ):
        with pytest.raises(UserError, match=message):
            run(DiffusionAugmentation(teacher, Identity(), **options), source, tmp_path)
    both = BankDataModule([bank, varied[1]], dataset="digits", val_fraction=0, predict_split="train")
    with pytest.raises(UserError, match="banks: expected one, of the originals"):
        run(DiffusionAugmentation(teacher, Identity()), both, tmp_path)
