"""Sets whose parts stand in lists: real digits, written as the folders of VTAB-1k and FGVC are."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from datamodules import ImageDataModule
from datamodules.images import lists, sources
from leanlight.contracts import UserError
from leanlight.ops.corruptions import Corruption

DIGITS = load_digits()
SIZES = {"train800": 30, "val200": 10, "test": 20}


def write_picture(path: Path, number: int, wide: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = np.uint8(DIGITS.images[number] / 16 * 255)
    Image.fromarray(np.pad(grey, ((0, 0), (4, 4)), constant_values=255) if wide else grey).save(path)


def vtab(folder: Path, wide: bool = False) -> Path:
    """A task of the first digits, in the order of the list files."""
    number, lines = 0, {}
    for name, size in SIZES.items():
        lines[name] = [f"images/a {i}.png {DIGITS.target[i]}" for i in range(number, number + size)]
        for i in range(number, number + size):
            write_picture(folder / "images" / f"a {i}.png", i, wide)
        number += size
        (folder / f"{name}.txt").write_text("\n".join(lines[name]) + "\n")
    (folder / "train800val200.txt").write_text("\n".join(lines["val200"] + lines["train800"]))
    return folder


def images_of(split) -> np.ndarray:
    return np.stack([np.asarray(image[0]) for image in split.images])


def expected(numbers) -> np.ndarray:
    return np.uint8(DIGITS.images[numbers] / 16 * 255)


def loaded(path: Path, dataset: str = "vtab", **arguments) -> ImageDataModule:
    data = ImageDataModule(dataset, path=path, image_size=8, **arguments)
    data.setup()
    return data


def test_a_task_is_searched_on_800_and_200_and_trained_at_last_on_1000(tmp_path):
    search = loaded(vtab(tmp_path / "svhn"))
    assert search.meta.counts == {"train": 30, "val": 10, "test": 20}
    assert search.meta.num_classes == 10
    last = loaded(tmp_path / "svhn", val_fraction=0.0)
    assert last.meta.counts == {"train": 40, "val": 0, "test": 20}
    assert search.val_split is not None
    for split, numbers in (
        (search.train_split, range(30)),
        (search.val_split, range(30, 40)),
        (search.test_split, range(40, 60)),
        (last.train_split, range(40)),
    ):
        assert np.array_equal(images_of(split), expected(list(numbers)))
        assert split.labels.tolist() == DIGITS.target[list(numbers)].tolist()
    assert search.val_split.origin.tolist() == list(range(30, 40))


def test_noise_of_a_picture_is_the_same_in_search_and_at_last(tmp_path):
    vtab(tmp_path)
    noise = Corruption("gaussian", level=0.1)
    search, last = (loaded(tmp_path, val_fraction=share, train_corruption=noise) for share in (0.2, 0.0))
    first = search.as_seen(search.val_split.batch(torch.arange(10)), "val").image
    assert torch.equal(first, last.as_seen(last.train_split.batch(torch.arange(30, 40)), "train").image)


def test_some_classes_and_items_of_a_task(tmp_path):
    data = loaded(vtab(tmp_path), classes=[9, 5], train_items=4)
    assert data.meta.classes == ("9", "5")
    assert len(data.train_split) == 4
    assert data.train_split.origin.max() < 30
    assert data.val_split is not None
    wanted = [i for i in range(30, 40) if DIGITS.target[i] in (5, 9)]
    assert data.val_split.origin.tolist() == wanted
    assert len(wanted) > 2
    assert [(9, 5)[label] for label in data.val_split.labels] == DIGITS.target[wanted].tolist()


def test_wide_pictures_are_squeezed_whole(tmp_path):
    image = loaded(vtab(tmp_path, wide=True)).train_split.images[0, 0]
    assert image[:, 0].tolist() == image[:, -1].tolist() == [255] * 8  # the margins are there


def test_the_19_tasks_have_their_classes(tmp_path):
    assert len(lists.VTAB) == 19
    vtab(tmp_path / "caltech101")
    assert loaded(tmp_path / "caltech101").meta.num_classes == 102
    vtab(tmp_path / "kitti")
    with pytest.raises(UserError, match=r"path: kitti has labels below 4, .* lists 9$"):
        loaded(tmp_path / "kitti")
    assert loaded(vtab(tmp_path / "other")).meta.num_classes == 10


def fgvc(folder: Path, inside: str) -> Path:
    for name, numbers in (("train", range(30)), ("val", range(30, 35)), ("test", range(35, 60))):
        listed = {f"{i:03}.png": int(DIGITS.target[i]) * 10 + 1 for i in numbers}  # ids that are not 0, 1, ...
        for i in numbers:
            write_picture(folder / inside / f"{i:03}.png", i)
        (folder / f"{name}.json").write_text(json.dumps(listed))
    return folder


@pytest.mark.parametrize("inside", ["", "images", "Images"])
def test_fine_grained_sets(tmp_path, inside):
    data = loaded(fgvc(tmp_path, inside), "fgvc")
    assert data.meta.counts == {"train": 30, "val": 5, "test": 25}
    assert data.meta.classes == tuple(str(10 * digit + 1) for digit in range(10))
    assert np.array_equal(images_of(data.test_split), expected(list(range(35, 60))))
    assert data.test_split.labels.tolist() == DIGITS.target[35:60].tolist()
    assert loaded(tmp_path, "fgvc", val_fraction=0).meta.counts == {"train": 35, "val": 0, "test": 25}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test.txt", None, r"path: expected lines of a picture and its label in .*test.txt"),
        ("val200.txt", "", r"path: expected pictures with labels from 0 in .*val200.txt, got 0 lines"),
        ("val200.txt", "images/a 30.png", r"path: expected lines of a picture and its label in .*val200.txt"),
        ("train800.txt", "images/a 1.png -1", "path: expected pictures with labels from 0"),
        ("train800val200.txt", "images/a 1.png 1", "lists other pictures than train800.txt and val200.txt together"),
        ("test.txt", "images/b.png 1", r"path: a list names .*b.png, which is not there"),
    ],
)
def test_a_damaged_task_is_one_line(tmp_path, name, content, message):
    vtab(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        loaded(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.json", "[1]", r"path: expected \{picture: class id\} in .*train.json"),
        ("test.json", "{", r"path: expected \{picture: class id\} in .*test.json"),
        ("val.json", '{"001.png": 7}', "path: class 7 stands in val.json or test.json of .*, but not in train.json"),
    ],
)
def test_a_damaged_fine_grained_set_is_one_line(tmp_path, name, content, message):
    fgvc(tmp_path, "images")
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        loaded(tmp_path, "fgvc")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    for dataset in ("vtab", "fgvc"):
        with pytest.raises(UserError, match=r"was not found; tried: .*nowhere"):
            sources.load(dataset, tmp_path, path=tmp_path / "nowhere")
        with pytest.raises(UserError, match="path: expected with dataset image_folder, vtab, fgvc"):
            ImageDataModule(dataset)
