"""A bank made in a Trainer: its images against calls by hand, interrupted and resumed, exported from a checkpoint."""

import csv
import functools
import json
import shutil

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from callbacks import ExactResume
from datamodules import ImageDataModule
from datamodules.noise import NoiseDataModule
from leanlight.contracts import Bars, Curve, HasTerms, ImageGrid, Progress, UserError, derived_seed
from leanlight.experiment import load
from leanlight.ops import counter
from lit_modules.dda import BankSynthesis, Contrastive, GeneratorInversion, Teacher, teacher_digest
from lit_modules.nn import ConvNet

NETWORK = functools.partial(ConvNet, in_channels=1, width=16, depth=3, norm="batch", image_size=8)
SETTINGS = {"steps": 6, "lr": 3e-3, "width": 8, "augment": "only_shift"}
ITEMS, BATCH, LATENT = 60, 15, 12


@pytest.fixture(scope="module")
def weights(tmp_path_factory, trained_teacher):
    path = tmp_path_factory.mktemp("teacher") / "weights.safetensors"
    save_file(trained_teacher.state_dict(), path)
    return path


def synthesis(weights, **settings):
    return BankSynthesis(
        Teacher(network=NETWORK, weights=weights), GeneratorInversion(**{**SETTINGS, **settings}), seed=3
    )


def noise(**options):
    return NoiseDataModule(
        **{"dataset": "digits", "items": ITEMS, "batch_size": BATCH, "latent_size": LATENT, **options}
    )


def trainer(folder, *callbacks, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": bool(callbacks)}
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        log_every_n_steps=1,
        **{**quiet, **options},
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("run")
    pl.seed_everything(11)
    module, runner = synthesis(weights), trainer(folder, ExactResume(every=BATCH))
    runner.fit(module, noise())
    return module, runner, folder


def images_of(module):
    return torch.cat(list(module._bank().chunks()))


def test_it_is_a_method_without_an_optimiser_whose_progress_is_images(fitted):
    module, runner, _ = fitted
    assert isinstance(module, HasTerms)
    assert module.progress() == Progress("images", ITEMS)
    assert runner.global_step == 0
    logged = {"loss", "class_prior", "batch_norm", "first_loss", "first_class_prior", "teacher_accuracy"}
    assert {f"train/{name}" for name in logged} < set(runner.callback_metrics)
    assert module.loss_terms().keys() == {"loss", "class_prior", "batch_norm"}
    assert runner.callback_metrics["train/loss"] < runner.callback_metrics["train/first_loss"]


def test_each_image_is_a_function_of_its_number(fitted, weights):
    """A call by hand, the last one first, gives what the fit wrote."""
    module, *_ = fitted
    got, teacher = images_of(module), Teacher(network=NETWORK, weights=weights).load(module._meta)
    for first in (45, 0, 30, 15):
        index = torch.arange(first, first + BATCH)
        latent, label = counter.noise(11, index, LATENT), counter.labels(11, index, 10)
        seed = derived_seed(3, "synthesis", first)
        made = GeneratorInversion(**SETTINGS)(teacher, latent, label, (1, 8, 8), seed)
        assert torch.equal(got[index], (made.images * 255).round().byte())
        assert torch.equal(torch.from_numpy(module._pool.labels[index.numpy()]), label)


def test_the_logged_accuracy_is_that_of_the_images_in_the_file(fitted, trained_teacher):
    module, runner, _ = fitted
    pool = module._pool
    answers = trained_teacher(images_of(module)[-BATCH:].float() / 255).argmax(1)
    right = answers == torch.from_numpy(pool.labels[-BATCH:])
    assert float(runner.callback_metrics["train/teacher_accuracy"]) == pytest.approx(float(right.float().mean()))
    assert torch.equal(answers, torch.from_numpy(pool.teacher_labels[-BATCH:]))


class Stop(pl.Callback):
    """Breaks off inside a call: the images of the one before are written, those of this one are rubbish."""

    def on_train_batch_start(self, runner, module, batch, batch_idx):
        if batch_idx == 2:
            module._pool.put(batch.index, torch.zeros(BATCH, 1, 8, 8, dtype=torch.uint8), batch.label)
            raise RuntimeError("broken off")


def test_a_run_that_was_broken_off_ends_with_the_same_bank(fitted, weights, tmp_path):
    pl.seed_everything(11)
    with pytest.raises(RuntimeError, match="broken off"):
        trainer(tmp_path, ExactResume(every=BATCH), Stop()).fit(synthesis(weights), noise())
    module = synthesis(weights)
    last = tmp_path / "checkpoints" / "last.ckpt"
    trainer(tmp_path, ExactResume(every=BATCH)).fit(module, noise(), ckpt_path=last, weights_only=True)
    assert module.progress() == Progress("images", ITEMS)
    assert torch.equal(images_of(module), images_of(fitted[0]))
    assert module._history.values == fitted[0]._history.values


def test_a_run_whose_images_are_gone_does_not_go_on(weights, tmp_path):
    with pytest.raises(RuntimeError, match="broken off"):
        trainer(tmp_path, ExactResume(every=BATCH), Stop()).fit(synthesis(weights), noise())
    shutil.rmtree(tmp_path / "pool")
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"the pool of this checkpoint .30 of 60 images .* start the run anew"):
        trainer(tmp_path, ExactResume(every=BATCH)).fit(synthesis(weights), noise(), ckpt_path=last, weights_only=True)


def test_with_a_contrastive_term_what_was_remembered_is_resumed_too(weights, tmp_path):
    whole = synthesis(weights, contrastive=Contrastive(width=4, rows=40))
    pl.seed_everything(11)
    trainer(tmp_path / "whole").fit(whole, noise())
    again = synthesis(weights, contrastive=Contrastive(width=4, rows=40))
    with pytest.raises(RuntimeError, match="broken off"):
        trainer(tmp_path, ExactResume(every=BATCH), Stop()).fit(again, noise())
    again = synthesis(weights, contrastive=Contrastive(width=4, rows=40))
    last = tmp_path / "checkpoints" / "last.ckpt"
    trainer(tmp_path, ExactResume(every=BATCH)).fit(again, noise(), ckpt_path=last, weights_only=True)
    assert torch.equal(images_of(again), images_of(whole))


def test_the_export_is_a_bank_also_from_the_checkpoint_alone(fitted, trained_teacher, tmp_path):
    module, _, folder = fitted
    paths = module.export(tmp_path / "first")
    assert torch.equal(load_file(paths[0])["images"], images_of(module))
    record = json.loads(paths[2].read_text())
    assert record["items"] == ITEMS
    assert record["teacher"] == teacher_digest(trained_teacher)
    assert record["classes"] == list(module._meta.classes)
    with open(paths[1], newline="") as file:
        rows = list(csv.DictReader(file))
    answers = trained_teacher(images_of(module).float() / 255).argmax(1)
    assert [int(row["label"]) for row in rows] == counter.labels(11, torch.arange(ITEMS), 10).tolist()
    assert [int(row["teacher_label"]) for row in rows] == answers.tolist()
    assert all((row["item"], row["k"], row["score"], row["kept"]) == (row["source"], "0", "1", "1") for row in rows)
    assert record["agreement"] == pytest.approx(sum(row["label"] == row["teacher_label"] for row in rows) / ITEMS)
    rebuilt = load(folder / "checkpoints" / "last.ckpt")
    assert rebuilt.progress() == Progress("images", ITEMS)
    again = rebuilt.export(tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_a_checkpoint_whose_images_are_gone_is_one_line(fitted, tmp_path):
    _, _, folder = fitted
    shutil.copytree(folder, tmp_path / "run")
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["synthesis"]["pool"]["folder"] = str(tmp_path / "run" / "elsewhere")
    torch.save(checkpoint, tmp_path / "moved.ckpt")
    with pytest.raises(UserError, match=f"elsewhere: expected the pool of {ITEMS} images"):
        load(tmp_path / "moved.ckpt").export(tmp_path)
    with pytest.raises(UserError, match="this module has made no images"):
        synthesis(None).export(tmp_path)


def test_its_pictures_show_classes_layers_and_losses(fitted):
    module, *_ = fitted
    drawn = module.media("train")
    grid = drawn["bank"]
    assert isinstance(grid, ImageGrid)
    assert grid.images.shape == (100, 1, 8, 8)
    label = torch.from_numpy(module._pool.labels[:])
    for number in range(10):
        members = images_of(module)[label == number].float()[:10] / 255
        assert torch.equal(grid.images[10 * number : 10 * number + len(members)], members)
        assert (grid.images[10 * number + len(members) : 10 * number + 10] == 1).all()
    bars = drawn["batch_norm_layers"]
    assert isinstance(bars, Bars)
    assert sum(bars.values.values()) == pytest.approx(float(module.loss_terms()["batch_norm"]), rel=1e-5)
    assert isinstance(drawn["losses"], Curve)
    assert drawn["losses"].x == [15, 30, 45, 60]
    assert drawn["losses"].series["loss at first"][0] > drawn["losses"].series["loss"][0]
    assert module.media("val") == {}


# ---- bad input


def test_a_run_that_goes_on_has_the_items_and_the_teacher_that_it_had(fitted, weights, tmp_path):
    _, _, folder = fitted
    last = folder / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"data.items: expected 60, that of the run which goes on; got 75"):
        trainer(folder).fit(synthesis(weights), noise(items=75), ckpt_path=last, weights_only=True)
    other = tmp_path / "other.safetensors"
    save_file(NETWORK().state_dict(), other)
    with pytest.raises(UserError, match=r"teacher: expected .*, that of the run which goes on"):
        trainer(folder).fit(synthesis(other), noise(), ckpt_path=last, weights_only=True)
    assert torch.equal(images_of(load(last)), images_of(fitted[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"teacher": Teacher(network=functools.partial(NETWORK, norm="instance"))},
            "bn_weight: the teacher, a ConvNet, has",
        ),
        (
            {"teacher": Teacher(network=functools.partial(NETWORK, in_channels=3))},
            "teacher.network: expected one for images",
        ),
        ({"teacher": Teacher(network=functools.partial(NETWORK, num_classes=7))}, "expected one with num_classes 10"),
        ({"teacher": Teacher()}, "teacher.checkpoint: expected the checkpoint"),
        (
            {"inversion": GeneratorInversion(adversarial_weight=1.0)},
            "adversarial_weight: expected 0 where there is no student",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(change, message, weights, tmp_path):
    module = BankSynthesis(**{"teacher": Teacher(network=NETWORK, weights=weights), **change})
    with pytest.raises(UserError, match=message):
        trainer(tmp_path).fit(module, noise())
    assert not list(tmp_path.iterdir())


def test_sides_that_a_generator_cannot_make_and_data_that_are_no_noise_are_one_line(weights, tmp_path):
    tall = Teacher(network=functools.partial(ConvNet, in_channels=1, width=4, depth=1, norm="batch", image_size=10))
    with pytest.raises(UserError, match="image_size: expected sides divisible by 4"):
        trainer(tmp_path).fit(BankSynthesis(tall), noise(image_size=10))
    with pytest.raises(UserError, match=r"data: BankSynthesis needs noise .*; got ImageDataModule"):
        trainer(tmp_path).fit(synthesis(weights), ImageDataModule("digits"))
    with pytest.raises(UserError, match="leanlight test: a bank is made by leanlight fit"):
        synthesis(weights).setup("test")
