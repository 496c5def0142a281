"""A bank as class folders, read back by the libraries they are for."""

import csv
import importlib.util
from pathlib import Path

import banks
import numpy as np
import pytest

from leanlight.contracts import UserError


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[3] / "scripts" / "bank_to_folders.py"
    spec = importlib.util.spec_from_file_location("bank_to_folders", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bank(tmp_path):
    """12 colour images of the classes 0 to 11, all in use, of which items 3 and 7 did not pass the filter."""
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 4, 4), dtype=np.uint8)
    rows = [[i, i, 0, -1, 0.5, int(i not in (3, 7)), (i + 5) % 12, 0] for i in range(12)]
    folder = banks.write(tmp_path / "bank", images, rows, [f"class/{chr(ord('m') - i)}" for i in range(12)])
    return folder, images


def test_torchvision_reads_images_and_labels_of_a_bank(script, tmp_path, bank):
    from torchvision.datasets import ImageFolder

    folder, images = bank
    assert script.write_folders(folder, tmp_path / "out", everything=True) == 12
    found = ImageFolder(tmp_path / "out")
    assert len(found) == 12
    assert [name.partition("_")[0] for name in found.classes] == [f"{label:02}" for label in range(12)]
    for (image, label), (path, _) in zip(found, found.samples, strict=True):
        item = int(Path(path).stem)
        assert label == (item + 5) % 12
        assert np.array_equal(np.asarray(image).transpose(2, 0, 1), images[item])


def test_metadata_lists_every_picture_with_its_row_of_the_manifest(script, tmp_path, bank):
    folder, _ = bank
    assert script.write_folders(folder, tmp_path / "out") == 10
    with open(tmp_path / "out" / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(folder / "manifest.csv", newline="") as file:
        expected = [row for row in csv.DictReader(file) if row["kept"] == "1"]
    assert [float(row["score"]) for row in rows] == [0.5] * 10
    assert [{key: row[key] for key in ("item", "label", "k")} for row in rows] == [
        {key: row[key] for key in ("item", "label", "k")} for row in expected
    ]
    pictures = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert pictures == {row["file_name"] for row in rows}


def test_hugging_face_reads_a_bank(script, tmp_path, bank, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="reads folders of pictures")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, images = bank
    script.write_folders(folder, tmp_path / "out", everything=True)
    found = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(found) == 12
    for row in found:
        assert row["label"] == (row["item"] + 5) % 12
        assert np.array_equal(np.asarray(row["image"]).transpose(2, 0, 1), images[row["item"]])


def test_grey_images_stay_grey(script, tmp_path):
    from PIL import Image

    script.write_folders(banks.originals(tmp_path / "bank", items=3, classes=3), tmp_path / "out")
    with Image.open(tmp_path / "out" / "2" / "2.png") as picture:
        assert picture.mode == "L"
        assert np.asarray(picture).tolist() == [[2] * 8] * 8


def test_bad_folders_are_named(script, tmp_path, bank):
    folder, _ = bank
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match=r"OUT: expected a new folder, .*full holds something"):
        script.write_folders(folder, tmp_path / "full")
    with pytest.raises(UserError, match=r"banks: expected the folder of a bank"):
        script.write_folders(tmp_path / "full", tmp_path / "out")
