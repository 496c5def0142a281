"""Chosen items of the real training set, named by their positions in the source, with the whole evaluation sets."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from datamodules import ImageDataModule, ImageFolderStream, SubsetDataModule, SubsetStream
from leanlight.contracts import UserError, sha256_file
from leanlight.ops.corruptions import Corruption


def real(**arguments) -> ImageDataModule:
    data = ImageDataModule("digits", download=False, **arguments)
    data.setup()
    return data


WHOLE = real(val_fraction=0.0)  # here a position in the training split is one in the source's training part
CHOSEN = real().train_split.origin[[900, 3, 17, 1292, 400]].tolist()


def write(path: Path, positions, kind: str = "") -> Path:
    path = path / f"chosen{kind}"
    array = np.asarray(positions)
    if kind == ".json":
        path.write_text(json.dumps(array.tolist()))
    elif kind == ".npy":
        np.save(path, array)
    elif kind == ".csv":
        path.write_text("order,index\n" + "".join(f"{i},{position}\n" for i, position in enumerate(array)))
    else:
        save_file({"index": torch.from_numpy(array)}, path)
    return path


def subset(path: Path, **arguments) -> SubsetDataModule:
    data = SubsetDataModule(path, dataset="digits", download=False, **arguments)
    data.ensure_available()
    data.setup()
    return data


@pytest.mark.parametrize("kind", [".json", ".npy", ".safetensors", ".csv"])
def test_training_goes_through_the_chosen_items_and_evaluation_through_all(tmp_path, kind):
    data, whole = subset(write(tmp_path, CHOSEN, kind), batch_size=2), real()
    assert torch.equal(data.train_split.images, WHOLE.train_split.images[CHOSEN])
    assert data.train_split.origin.tolist() == CHOSEN
    assert data.train_split.weight is None
    batches = list(data.train_dataloader())
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == [0, 1, 2, 3, 4]
    for batch in batches:
        assert torch.equal(batch.label, data.train_split.labels[batch.index])
    assert torch.equal(data.test_split.images, whole.test_split.images)
    assert torch.equal(data.val_split.images, whole.val_split.images)


@pytest.mark.parametrize("arguments", [{"val_fraction": 0.0}, {"val_fraction": 0.5, "split_seed": 3}])
def test_positions_mean_the_same_items_whatever_is_held_out(tmp_path, arguments):
    origin = real(**arguments).train_split.origin
    kept = [int(origin[i]) for i in (5, 2, 40)]
    data = subset(write(tmp_path, kept, ".npy"), **arguments)
    assert torch.equal(data.train_split.images, WHOLE.train_split.images[kept])


def test_items_that_lie_in_validation_are_refused(tmp_path):
    held_out = int(real().val_split.origin[7])
    with pytest.raises(UserError, match=f"1 of 6 items of .*, the first of them {held_out}, are not in the training"):
        subset(write(tmp_path, [*CHOSEN, held_out], ".json"))
    assert len(subset(write(tmp_path, [*CHOSEN, held_out], ".json"), val_fraction=0.0).train_split) == 6


def test_items_that_the_training_fraction_leaves_out_are_refused(tmp_path):
    kept = set(real(train_fraction=0.5).train_split.origin.tolist())
    left_out = next(i for i in CHOSEN if i not in kept)
    with pytest.raises(UserError, match="left out"):
        subset(write(tmp_path, [left_out], ".json"), train_fraction=0.5)


@pytest.mark.parametrize("kind", ["uint8", "int32", "int64"])
def test_any_whole_numbers_will_do(tmp_path, kind):
    data = subset(write(tmp_path, np.array([7, 200], kind), ".npy"), val_fraction=0.0)
    assert data.train_split.origin.tolist() == [7, 200]


def test_meta_tells_of_the_subset(tmp_path):
    path = write(tmp_path, CHOSEN, ".json")
    data, whole = subset(path), real()
    assert data.meta.counts == {"train": 5, "val": 144, "test": 360}
    assert sum(data.meta.class_counts) == 5
    assert data.meta.fingerprint == f"{whole.meta.fingerprint}+{sha256_file(path)}"
    data.setup("test")  # a second time changes nothing
    assert data.meta.fingerprint.count("+") == 1
    assert len(data.train_split) == 5


def selection(folder: Path, fingerprint: str | None = None, **columns) -> Path:
    """A folder as `leanlight select` writes it."""
    labels = WHOLE.train_split.labels[CHOSEN]
    columns = {"index": torch.tensor(CHOSEN), "label": labels, "weight": torch.tensor([1.0, 2, 3, 4, 5]), **columns}
    about = {"data": fingerprint or real().meta.fingerprint}
    save_file(columns, folder / "selection.safetensors", {"selection": json.dumps(about)})
    names = ["index", "label", "weight"]
    rows = [names, *zip(*(columns[name].tolist() for name in names), strict=True)]
    (folder / "selection.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    record = {"sha256": sha256_file(folder / "selection.safetensors")}
    (folder / "selection.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("name", ["", "selection.safetensors", "selection.csv"])
def test_weights_of_a_selection_come_with_their_items(tmp_path, name):
    data = subset(selection(tmp_path) / name, batch_size=2)
    assert data.train_split.weight.tolist() == [1, 2, 3, 4, 5]
    for batch in data.train_dataloader():
        assert torch.equal(batch.weight, batch.index + 1.0)
    assert next(iter(data.val_dataloader())).weight is None


def test_equal_weights_are_none(tmp_path):
    assert subset(selection(tmp_path, weight=torch.ones(5))).train_split.weight is None


def test_a_selection_of_other_data_is_refused_and_its_positions_are_not(tmp_path):
    folder = selection(tmp_path, fingerprint="f" * 64)
    with pytest.raises(UserError, match=r"subset: .* other data or another split \(fingerprint ffffffffffff, here "):
        subset(folder)
    assert subset(folder / "selection.csv").train_split.origin.tolist() == CHOSEN
    wrong = selection(tmp_path, label=torch.tensor([11, 0, 0, 0, 0]))
    with pytest.raises(UserError, match="its labels are not those of the items"):
        subset(wrong / "selection.csv")


def test_half_a_selection_is_refused(tmp_path):
    folder = selection(tmp_path)
    (folder / "selection.json").write_text('{"sha256": "0"}')
    with pytest.raises(UserError, match="holds no whole selection"):
        subset(folder)
    (folder / "selection.json").unlink()
    with pytest.raises(UserError, match="holds no whole selection"):
        subset(folder)


@pytest.mark.parametrize(
    ("positions", "kind", "message"),
    [
        ([0, 1437], ".json", "1 of 2 items of .*, the first of them 1437, are not in the training split"),
        ([0, 10**15], ".json", "the first of them 1000000000000000"),
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
        subset(write(tmp_path, positions, kind), val_fraction=0.0)
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
        ("a.csv", b"index,label\n3,4\nx,5\n", "damaged, or no list"),
        ("a.csv", b"index,label\n3\n", "damaged, or no list"),
        ("a.csv", b"position\n3\n", "holds none"),
        ("a.csv", b"", "holds none"),
        ("a.safetensors", b"12345678", "damaged"),
        ("a.pt", b"", "expected what `leanlight select` wrote, or a .safetensors"),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        subset(tmp_path / name)
    assert str(caught.value).startswith("subset: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["none.json", "."])
def test_a_missing_file_is_named_before_anything_is_loaded(tmp_path, name):
    with pytest.raises(UserError, match=r"subset: expected what `leanlight select` wrote.* nothing at .*"):
        SubsetDataModule(tmp_path / name, dataset="digits", download=False).ensure_available()
    with pytest.raises(UserError, match=r"subset: expected what `leanlight select` wrote.* nothing at .*"):
        SubsetStream(tmp_path / name, path=tmp_path).ensure_available()


def test_safetensors_without_index_are_refused(tmp_path):
    save_file({"positions": torch.arange(3)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="holds none"):
        subset(tmp_path / "a.safetensors")


def test_a_streamed_folder_trains_on_the_chosen_pictures_with_their_weights(tmp_path):
    for part in ("train", "val"):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(6):
                Image.new("RGB", (8, 8), (100 * label, 10 * number, 0)).save(tmp_path / part / name / f"{number}.png")
    arguments = {"image_size": 8, "batch_size": 2, "num_workers": 0, "val_fraction": 0.3, "drop_last": False}
    whole = ImageFolderStream(tmp_path, **arguments)
    whole.setup()
    chosen = whole.origin("train")[[6, 0, 3]]
    columns = {"index": chosen, "label": chosen // 6, "weight": torch.tensor([0.5, 2, 1])}
    save_file(columns, tmp_path / "a.safetensors", {"selection": json.dumps({"data": whole.meta.fingerprint})})
    data = SubsetStream(tmp_path / "a.safetensors", path=tmp_path, **arguments)
    data.ensure_available()
    data.setup()
    data.setup("test")
    assert data.meta.counts == {"train": 3, "val": 4, "test": 12}
    assert data.meta.class_counts == tuple((chosen // 6).bincount(minlength=2).tolist())
    assert data.meta.fingerprint == f"{whole.meta.fingerprint}+{sha256_file(tmp_path / 'a.safetensors')}"
    for batch in data.train_dataloader():
        for item in batch.index.tolist():
            place = int(chosen[item])
            pixel = batch.image[batch.index == item][0, :, 4, 4].tolist()
            assert pixel == [100 * (place // 6), 10 * (place % 6), 0]
        assert torch.equal(batch.weight, columns["weight"][batch.index])
    held_out = whole.origin("val")[:1]
    save_file({"index": held_out}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="held out for validation"):
        SubsetStream(tmp_path / "b.safetensors", path=tmp_path, **arguments).setup()


def test_noise_of_a_chosen_item_is_that_of_the_whole_set_and_classes_keep_their_positions(tmp_path):
    noise = Corruption("impulse", severity=5)
    data = subset(write(tmp_path, CHOSEN, ".npy"), train_corruption=noise)
    whole = WHOLE.train_split.batch(torch.tensor(CHOSEN))
    wanted = noise(whole.image.float() / 255, whole.index)
    assert torch.equal(data.as_seen(data.train_split.batch(torch.arange(5)), "train").image, wanted)
    order = WHOLE.train_split.labels[CHOSEN].unique().flip(0).tolist()
    some = subset(write(tmp_path, CHOSEN, ".npy"), classes=order)
    assert [order[label] for label in some.train_split.labels] == WHOLE.train_split.labels[CHOSEN].tolist()
    assert some.train_split.origin.tolist() == CHOSEN
