"""Other training sets in the place of the real one, real evaluation sets beside them."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from datamodules import DistilledDataModule, ImageDataModule, SubsetDataModule
from datamodules.images.module import scaled
from leanlight.contracts import ImageBatch, UserError, sha256_file

CHOSEN = [900, 3, 17, 1292, 400]


def real(**arguments) -> ImageDataModule:
    data = ImageDataModule("digits", download=False, **arguments)
    data.setup()
    return data


def write(path: Path, positions, kind: str = "") -> Path:
    path = path / f"chosen{kind}"
    array = np.asarray(positions)
    if kind == ".json":
        path.write_text(json.dumps(array.tolist()))
    elif kind == ".npy":
        np.save(path, array)
    else:
        save_file({"index": torch.from_numpy(array)}, path)
    return path


def subset(path: Path, **arguments) -> SubsetDataModule:
    data = SubsetDataModule(path, dataset="digits", download=False, **arguments)
    data.ensure_available()
    data.setup()
    return data


# ---- subsets ----


@pytest.mark.parametrize("kind", [".json", ".npy", ".safetensors"])
def test_training_goes_through_the_chosen_items_and_evaluation_through_all(tmp_path, kind):
    data, whole = subset(write(tmp_path, CHOSEN, kind), batch_size=2), real()
    assert torch.equal(data.train_split.images, whole.train_split.images[CHOSEN])
    assert torch.equal(data.train_split.origin, whole.train_split.origin[CHOSEN])
    batches = list(data.train_dataloader())
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == [0, 1, 2, 3, 4]
    for batch in batches:
        assert torch.equal(batch.label, data.train_split.labels[batch.index])
    assert torch.equal(data.test_split.images, whole.test_split.images)
    assert torch.equal(data.val_split.images, whole.val_split.images)


def test_positions_are_those_of_training_batches(tmp_path):
    batch = next(iter(real(batch_size=7, seed=3).train_dataloader()))
    data = subset(write(tmp_path, batch.index.numpy(), ".npy"))
    assert torch.equal(data.train_split.images, batch.image)


@pytest.mark.parametrize("kind", ["uint8", "int32", "int64"])
def test_any_whole_numbers_will_do(tmp_path, kind):
    data = subset(write(tmp_path, np.array([7, 200], kind), ".npy"))
    assert torch.equal(data.train_split.origin, real().train_split.origin[[7, 200]])


def test_meta_tells_of_the_subset(tmp_path):
    path = write(tmp_path, CHOSEN, ".json")
    data, whole = subset(path), real()
    assert data.meta.counts == {"train": 5, "val": 144, "test": 360}
    assert sum(data.meta.class_counts) == 5
    assert data.meta.fingerprint == f"{whole.meta.fingerprint}+{sha256_file(path)}"
    data.setup("test")  # a second time changes nothing
    assert data.meta.fingerprint.count("+") == 1
    assert len(data.train_split) == 5


@pytest.mark.parametrize(
    ("positions", "kind", "message"),
    [
        ([0, 1293], ".json", "expected positions in the training split, 0 to 1292; .* holds 1293"),
        ([5, -1], ".npy", "holds -1"),
        ([4, 9, 4, 9], ".safetensors", "holds 4 more than once"),
        ([], ".json", "holds none"),
        ([[0, 1]], ".npy", r"int64 of shape \(1, 2\)"),
        ([0.0, 1.0], ".npy", "float64"),
        ([0.5], ".json", "float32"),
        ([True, False], ".npy", "torch.bool"),
    ],
)
def test_positions_that_choose_no_subset_are_one_line(tmp_path, positions, kind, message):
    with pytest.raises(UserError, match=message) as caught:
        subset(write(tmp_path, positions, kind))
    assert str(caught.value).startswith("subset: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'{"index": [1, 2]}', "damaged, or no list of positions"),
        ("a.json", b"[1, 2", "damaged, or no list"),
        ("a.json", b'["x"]', "damaged, or no list"),
        ("a.npy", b"\x93NUMPY", "damaged, or no list"),
        ("a.npy", pickle.dumps([1, 2]), "damaged, or no list"),
        ("a.safetensors", b"12345678", "damaged"),
        ("a.pt", b"", "expected a .json, .npy or .safetensors file"),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        subset(tmp_path / name)
    assert str(caught.value).startswith("subset: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match=r"subset: expected a .json, .npy or .safetensors .* nothing at .*none.json"):
        subset(tmp_path / "none.json")


def test_safetensors_without_index_are_refused(tmp_path):
    save_file({"positions": torch.arange(3)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="holds none"):
        subset(tmp_path / "a.safetensors")


# ---- distilled sets ----


@pytest.fixture
def distilled(tmp_path):
    tensors = {
        "images": torch.randn(20, 1, 8, 8),
        "labels": torch.eye(10).repeat(2, 1),
        "mean": torch.full((1, 1, 1), 0.3),
        "std": torch.full((1, 1, 1), 0.4),
    }
    save_file(tensors, tmp_path / "distilled.safetensors")
    data = DistilledDataModule(tmp_path, dataset="digits", download=False, batch_size=6, seed=1)
    data.setup()
    return data, tensors


def test_a_distilled_set_trains_as_it_is_and_real_images_come_into_its_space(distilled):
    data, tensors = distilled
    assert data.meta.counts["train"] == 20
    assert data.meta.class_counts == (2,) * 10
    assert data.meta.fingerprint == f"{real().meta.fingerprint}+{sha256_file(data.file)}"
    for batch in data.train_dataloader():
        assert torch.equal(data.on_after_batch_transfer(batch, 0).image, tensors["images"][batch.index])
        assert torch.equal(batch.label, tensors["labels"][batch.index])
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(data.on_after_batch_transfer(batch, 0).image, (scaled(batch).image - 0.3) / 0.4)


def test_the_order_of_a_distilled_set_is_that_of_any_set_of_its_size(distilled):
    data, _ = distilled
    order = torch.cat([batch.index for batch in data.train_dataloader()]).tolist()
    small = ImageDataModule("digits", download=False, batch_size=6, seed=1)
    small.setup()
    small.train_split = data.train_split
    assert order == torch.cat([batch.index for batch in small.train_dataloader()]).tolist()


def test_a_distilled_set_can_be_predicted_without_leaving_its_space(distilled):
    data, tensors = distilled
    data.predict_split = "train"
    images = torch.cat([data.on_after_batch_transfer(batch, 0).image for batch in data.predict_dataloader()])
    assert torch.equal(images, tensors["images"])
    assert isinstance(next(iter(data.predict_dataloader())), ImageBatch)


def test_a_distilled_set_without_its_space_is_refused(tmp_path):
    save_file({"images": torch.zeros(2, 1, 8, 8), "labels": torch.eye(10)[:2]}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="distilled: expected images, labels, and whitening or mean and std"):
        DistilledDataModule(tmp_path / "a.safetensors", dataset="digits").setup()
