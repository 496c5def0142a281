"""Sets of others: what is read of them, in which space they lie, and that nothing in their files is executed."""

import functools
import os
import pickle
import zipfile

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import Tensor

from datamodules import ImageDataModule
from leanlight.contracts import UserError
from leanlight.ops.whitening import apply_zca
from lit_modules.at_bptt import DatasetDistillation, Evaluation, FixedSet, FromFile
from lit_modules.at_bptt.dd_ranking import augmentation_robust_score, label_robust_score, ranking_scores
from lit_modules.at_bptt.preprocessing import Preprocessing
from lit_modules.classifier.training import Recipe, train_and_score
from lit_modules.nn import ConvNet

CLASSES, IPC, SHAPE = 3, 2, (2, 4, 5)
IMAGES = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))
HARD = torch.arange(3).repeat_interleave(2)
SOFT = torch.rand(6, 3, generator=torch.Generator().manual_seed(1)) + 2 * F.one_hot(HARD, 3)
FLAT = IMAGES.flatten(1)


def export(folder):
    save_file(
        {"images": IMAGES, "labels": SOFT, "mean": torch.zeros(2, 1, 1), "std": torch.ones(2, 1, 1)},
        folder / "s.safetensors",
    )
    return folder / "s.safetensors"


def hdf5(folder):
    with h5py.File(folder / "rat.h5", "w") as file:
        file["data"], file["label"], file["epoch"], file["grad"] = FLAT.numpy(), SOFT.numpy(), 7, np.zeros(9)
    return folder / "rat.h5"


def state_dict(folder):
    optimizer = torch.optim.Adam([torch.zeros(3, requires_grad=True)])
    content = {
        "epoch": 3,
        "optimizer_state_dict": optimizer.state_dict() | {"state": {0: {"exp_avg": FLAT + 1, "labels_seen": FLAT}}},
        "model_state_dict": {"module.data.weight": FLAT.clone().requires_grad_()},
        "label_state_dict": {"module.label.weight": SOFT},
    }
    torch.save(content, folder / "rat.pth")
    return folder / "rat.pth"


def mtt(folder):
    torch.save(IMAGES, folder / "images_best.pt")
    torch.save(SOFT, folder / "labels_best.pt")
    torch.save(IMAGES + 1, folder / "images_5000.pt")
    return folder


def dd_ranking(folder):
    torch.save(IMAGES, folder / "images.pt")
    torch.save(SOFT, folder / "labels.pt")
    torch.save(torch.tensor(0.02), folder / "lr.pt")
    return folder


def pair(folder):
    torch.save((IMAGES, SOFT), folder / "pair.pt")
    return folder / "pair.pt"


def read(path, space="preprocessed", **options):
    return FromFile(str(path), space=space, **options).read(CLASSES, IPC, SHAPE)


@pytest.mark.parametrize("write", [export, hdf5, state_dict, mtt, dd_ranking, pair])
def test_a_set_is_the_same_in_every_format(tmp_path, write):
    found = read(write(tmp_path))
    assert torch.equal(found.images, IMAGES)
    assert torch.equal(found.labels, SOFT)


def test_images_without_labels_lie_class_by_class(tmp_path):
    torch.save(IMAGES, tmp_path / "images.pt")
    assert torch.equal(read(tmp_path).labels, F.one_hot(HARD, 3).float())


@pytest.mark.parametrize("soft", [False, True])
def test_a_set_in_any_order_is_put_class_by_class_and_keeps_the_order_in_a_class(tmp_path, soft):
    order = torch.tensor([4, 0, 2, 1, 5, 3])
    torch.save(IMAGES[order], tmp_path / "images_7.pt")
    torch.save((SOFT if soft else HARD)[order], tmp_path / "labels_7.pt")
    found = read(tmp_path / "images_7.pt")
    assert torch.equal(found.images, IMAGES)
    assert torch.equal(found.labels, SOFT if soft else F.one_hot(HARD, 3).float())


def test_soft_labels_that_favour_no_class_equally_keep_their_order(tmp_path):
    torch.save((IMAGES, torch.ones(6, 3)), tmp_path / "a.pt")
    assert torch.equal(read(tmp_path / "a.pt").images, IMAGES)


def test_logits_become_probabilities(tmp_path):
    torch.save(IMAGES, tmp_path / "images.pt")
    torch.save(SOFT.log(), tmp_path / "labels.pt")
    expected = SOFT / SOFT.sum(1, keepdim=True)
    assert torch.allclose(read(tmp_path, label_kind="logits").labels, expected)


def test_pixels_bytes_and_standardized_images_are_the_same_in_the_space_of_the_run(tmp_path):
    pixels = (IMAGES * 255).round() / 255
    mean, std = torch.tensor([0.4, 0.6]).view(-1, 1, 1), torch.tensor([0.2, 0.3]).view(-1, 1, 1)
    torch.save(pixels, tmp_path / "pixels.pt")
    torch.save((pixels * 255).round().byte(), tmp_path / "bytes.pt")
    torch.save((pixels - mean) / std, tmp_path / "standardized.pt")
    space = Preprocessing("zca", SHAPE, 0.1, 0.0, 1.0)
    space.fit((torch.rand(50, *SHAPE) * 255).byte())
    expected = apply_zca(pixels, space.whitening)
    for name, options in (
        ("pixels", {"space": "pixels"}),
        ("bytes", {"space": None}),
        ("standardized", {"space": "standardized", "mean": [0.4, 0.6], "std": [0.2, 0.3]}),
    ):
        found = read(tmp_path / f"{name}.pt", **options)
        assert torch.allclose(found.preprocessed(space), expected, atol=1e-5), name


class Touch:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def with_pickle(folder, content):
    """A file of torch whose pickle is another."""
    torch.save(torch.zeros(2), folder / "honest.pt")
    with zipfile.ZipFile(folder / "honest.pt") as honest, zipfile.ZipFile(folder / "images.pt", "w") as made:
        for name in honest.namelist():
            made.writestr(name, content if name.endswith("data.pkl") else honest.read(name))
    return folder / "images.pt"


def refused(path, space="preprocessed", **options):
    with pytest.raises(UserError) as caught:
        read(path, space, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    path = with_pickle(tmp_path, pickle.dumps(Touch(tmp_path / "made"), protocol=2))
    assert refused(path).startswith(f"file: {path} is damaged or was refused: UnpicklingError")
    (tmp_path / "old.pt").write_bytes(pickle.dumps(Touch(tmp_path / "made"), protocol=2))
    refused(tmp_path / "old.pt")
    assert not (tmp_path / "made").exists()


def test_hdf5_leads_to_no_other_file_and_to_no_more_memory_than_it_holds(tmp_path):
    hdf5(tmp_path)
    for name in ("link", "virtual", "empty"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            if name == "link":
                file["data"] = h5py.ExternalLink("rat.h5", "/data")
            elif name == "virtual":
                layout = h5py.VirtualLayout(FLAT.shape, "f4")
                layout[:] = h5py.VirtualSource(tmp_path / "rat.h5", "data", FLAT.shape)
                file.create_virtual_dataset("data", layout)
            else:
                file.create_dataset("data", (10**7, 10**5), "f4", chunks=(1, 10**5))
        assert "holds no tensor" in refused(tmp_path / f"{name}.h5")


@pytest.mark.parametrize("kind", [Tensor.to_sparse, lambda x: x.to("meta"), lambda x: torch.complex(x, x)])
def test_tensors_that_hold_no_plain_numbers_are_no_images(tmp_path, kind):
    torch.save({"images": kind(IMAGES)}, tmp_path / "images.pt")
    assert "holds no tensor" in refused(tmp_path)


@pytest.mark.parametrize("write", [export, hdf5, state_dict, pair])
def test_a_truncated_file_is_one_line(tmp_path, write):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "is damaged or was refused" in refused(path)


@pytest.mark.parametrize(
    ("images", "labels", "options", "words"),
    [
        (IMAGES[:5], HARD[:5], {}, r"file: expected images of shape (6, 2, 4, 5)"),
        (IMAGES[..., :3], HARD, {}, r"has (6, 2, 4, 3)"),
        (IMAGES / 0, HARD, {}, "finite images"),
        (IMAGES, HARD + 1, {}, "labels: expected classes 0 to 2"),
        (IMAGES, HARD.clamp(max=1), {}, "labels: expected 2 of each class"),
        (IMAGES, SOFT[:, :2], {}, "labels: expected 6 class numbers or (6, 3)"),
        (IMAGES, SOFT / 0, {}, "labels: expected finite"),
        (IMAGES, SOFT.log() - 9, {}, "label_kind: expected logits"),
        (IMAGES, HARD, {"space": None}, "space: expected one of pixels, standardized, preprocessed"),
        (IMAGES * 9, HARD, {"space": "pixels"}, "space: expected pixels in [0, 1]"),
        (IMAGES.byte(), HARD, {"space": "standardized"}, "space: expected pixels"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, images, labels, options, words):
    torch.save(images, tmp_path / "images.pt")
    torch.save(labels, tmp_path / "labels.pt")
    assert words in refused(tmp_path, **options)


def test_a_place_without_a_set_and_a_misspelt_space_are_one_line(tmp_path):
    assert "got none" in refused(tmp_path)
    assert "expected the file of a set" in refused(tmp_path / "none.pt")
    (tmp_path / "set.npz").write_bytes(b"")
    assert "expected a file .safetensors" in refused(tmp_path / "set.npz")
    torch.save({"weights": IMAGES}, tmp_path / "network.pt")
    assert "expected images under one of" in refused(tmp_path / "network.pt")
    with pytest.raises(UserError, match="file=PATH"):
        FromFile().read(CLASSES, IPC, SHAPE)
    with pytest.raises(UserError, match=r"space: .*did you mean 'pixels'"):
        FromFile(space="pixel")


# ---- judging ----

MAKE = functools.partial(ConvNet, 1, 10, width=4, depth=1, image_size=8, mean=0.0, std=1.0)
RECIPE = Recipe(epochs=6, lr=0.02, batch_size=512, augment="flip_rotate")


def judge(file, tmp_path, **changes):
    """Module, data and metrics of a run that trains nothing and tests a set."""
    init = {"space": "standardized", **changes.pop("init", {})}
    model = DatasetDistillation(
        MAKE,
        (1, 8, 8),
        ipc=1,
        distiller=FixedSet(),
        init=FromFile(str(file), **init),
        evaluation=Evaluation(2, (3, 6), RECIPE),
        seed=0,
        **changes,
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    run = Trainer(max_epochs=1, accelerator="cpu", num_sanity_val_steps=0, default_root_dir=tmp_path, **quiet)
    data = ImageDataModule(dataset="digits", batch_size=500, seed=0)
    run.fit(model, data)
    (metrics,) = run.test(model, data, verbose=False)
    return model, data, metrics


def test_a_set_is_judged_as_its_networks_are_trained_by_hand(tmp_path):
    images = torch.randn(10, 1, 8, 8)
    torch.save(images, tmp_path / "images_best.pt")
    torch.save(torch.arange(10), tmp_path / "labels_best.pt")
    space = {"preprocess": "standardize", "mean": 0.3, "std": 0.4}
    model, data, metrics = judge(tmp_path, tmp_path, init={"mean": 0.5, "std": 0.2}, **space)
    placed = (images * 0.2 + 0.5 - 0.3) / 0.4
    assert torch.allclose(model.images.detach(), placed, atol=1e-6)
    epochs = int(metrics["test/epochs"])
    test = (data.test_split.images.float() / 255 - 0.3) / 0.4, data.test_split.labels
    seeds = [model._seed(0, "judge", number) for number in range(2)]
    recipe = Recipe(**{**vars(RECIPE), "epochs": epochs})
    scores = train_and_score((placed, torch.arange(10)), MAKE, recipe, seeds, test)
    assert metrics["test/accuracy"] == pytest.approx(sum(scores) / 2, abs=0.003)
    assert metrics["test/ior"] == pytest.approx(metrics["test/accuracy"] - metrics["test/accuracy_random"])


def test_an_export_brings_its_whitening(tmp_path):
    whitening = torch.eye(64) * 3
    images, labels = torch.randn(10, 1, 8, 8), torch.rand(10, 10)
    save_file({"images": images, "labels": labels, "whitening": whitening}, tmp_path / "distilled.safetensors")
    model, _, _ = judge(tmp_path, tmp_path, compare_with_random=False)
    assert torch.equal(model.preprocessing.whitening, whitening)
    assert torch.equal(model.images.detach(), images)
    with pytest.raises(UserError, match="preprocess: standardize needs"):
        judge(tmp_path, tmp_path, preprocess="standardize")


def test_scores_of_dd_ranking_come_with_a_set_of_soft_labels(tmp_path):
    torch.save((torch.randn(10, 1, 8, 8), torch.rand(10, 10)), tmp_path / "set.pt")
    recipe = Recipe(epochs=2, lr=0.02, batch_size=256)
    _, _, metrics = judge(
        tmp_path / "set.pt", tmp_path, full_recipe=recipe, without_augmentation=True, init={"space": "preprocessed"}
    )
    named = {name.removeprefix("test/"): value for name, value in metrics.items()}
    ior = named["accuracy"] - named["accuracy_random_soft"]
    hlr = named["accuracy_full"] - named["accuracy_hard_labels"]
    bare = named["accuracy_unaugmented"] - named["accuracy_random_unaugmented"]
    span = np.e - 1 / np.e
    assert named["ior"] == pytest.approx(ior)
    assert named["hlr"] == pytest.approx(hlr)
    assert named["lrs"] == pytest.approx((np.exp(ior / 2 - hlr / 2) - 1 / np.e) / span)
    assert named["ars"] == pytest.approx((np.exp(ior / 2 + bare / 2) - 1 / np.e) / span)
    assert named["above_random"] == pytest.approx(named["accuracy"] - named["accuracy_random"])
    assert len({named[f"accuracy{name}"] for name in ("", "_unaugmented")}) == 2


def test_scores_run_from_0_to_1_and_are_those_computed_by_hand():
    assert label_robust_score(1.0, -1.0) == augmentation_robust_score(1.0, 1.0) == pytest.approx(1.0)
    assert label_robust_score(-1.0, 1.0) == augmentation_robust_score(-1.0, -1.0) == pytest.approx(0.0)
    assert label_robust_score(0.2, 0.3) == pytest.approx(0.248192, abs=1e-6)  # (e^-0.05 - e^-1) / (e - e^-1)
    assert augmentation_robust_score(0.2, 0.1) == pytest.approx(0.337795, abs=1e-6)  # (e^0.15 - e^-1) / (e - e^-1)
    assert augmentation_robust_score(0.2, 0.1, weight=1.0) == pytest.approx(0.363139, abs=1e-6)  # e^0.2


def test_without_a_teacher_the_gain_of_soft_labels_over_hard_ones_is_no_ior():
    accuracies = {"accuracy": 0.7, "accuracy_random": 0.4}
    assert ranking_scores(accuracies, soft=False) == {"ior": pytest.approx(0.3)}
    assert ranking_scores(accuracies, soft=True) == {"above_random": pytest.approx(0.3)}
