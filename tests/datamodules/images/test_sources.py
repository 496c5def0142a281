"""Where data sets are found, against independent readings of the same files."""

import gzip
import os
import pickle
import struct
from collections.abc import Callable
from hashlib import md5
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.images import download, sources
from datamodules.images.catalog import CATALOG, describe
from leanlight.contracts import UserError, sha256_file

RNG = np.random.default_rng(0)


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx_set(folder: Path, zipped: bool = False, train: int = 20, test: int = 10) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    written = {}
    for prefix, count in (("train", train), ("t10k", test)):
        for kind, array in (
            ("images-idx3-ubyte", RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)),
            ("labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10),
        ):
            content = gzip.compress(idx_bytes(array)) if zipped else idx_bytes(array)
            (folder / f"{prefix}-{kind}{'.gz' if zipped else ''}").write_bytes(content)
            written[f"{prefix}-{kind}"] = array
    return written


@pytest.fixture
def no_system_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")


def test_digits_are_scikit_learns_each_once() -> None:
    from sklearn.datasets import load_digits

    raw, bunch = sources.load("digits", "none"), load_digits()
    images = np.concatenate([raw.train[0], raw.test[0]])[:, 0]
    labels = np.concatenate([raw.train[1], raw.test[1]])
    assert (len(raw.train[0]), len(raw.test[0])) == (1437, 360)

    def multiset(grey: np.ndarray, target: np.ndarray) -> list[tuple[bytes, int]]:
        return sorted((image.astype(np.uint8).tobytes(), int(t)) for image, t in zip(grey, target, strict=True))

    assert multiset(np.rint(images * (16 / 255)), labels) == multiset(bunch.images, bunch.target)
    assert images.max() == 255
    assert min(np.bincount(raw.test[1])) >= 25


def test_subset_is_balanced_real_and_within_its_size_limit() -> None:
    raw = sources.load("fashion_mnist", "none", "subset")
    assert np.bincount(raw.train[1]).tolist() == [320] * 10
    assert np.bincount(raw.test[1]).tolist() == [80] * 10
    path = files("datamodules") / "images" / "resources" / sources.SUBSET_FILE
    assert len(path.read_bytes()) <= 1_500_000
    assert sha256_file(str(path)) == sources.SUBSET_SHA256
    assert raw.train[0].mean() / 255 == pytest.approx(describe("fashion_mnist").mean[0], abs=0.005)


@pytest.mark.skipif(not sources.DEBIAN_FASHION_MNIST.exists(), reason="package dataset-fashion-mnist is not installed")
def test_subset_is_the_start_of_every_class_of_the_official_files() -> None:
    raw = sources.load("fashion_mnist", "none", "subset")
    for prefix, part, count in (("train", raw.train, 320), ("t10k", raw.test, 80)):
        read = [
            gzip.decompress((sources.DEBIAN_FASHION_MNIST / f"{prefix}-{kind}-ubyte.gz").read_bytes())
            for kind in ("images-idx3", "labels-idx1")
        ]
        images = np.frombuffer(read[0], np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(read[1], np.uint8, offset=8)
        chosen = np.sort(np.concatenate([np.flatnonzero(labels == c)[:count] for c in range(10)]))
        assert np.array_equal(part[0][:, 0], images[chosen])
        assert np.array_equal(part[1], labels[chosen])


def test_damaged_subset_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "SUBSET_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"fashion_mnist_subset\.npz\.xz is damaged"):
        sources.load("fashion_mnist", "none", "subset")


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("layout", ["fashion_mnist", "FashionMNIST/raw"])
@pytest.mark.usefixtures("no_system_files")
def test_fashion_mnist_files_are_found_in_root(tmp_path: Path, layout: str, zipped: bool) -> None:
    written = write_idx_set(tmp_path / layout, zipped)
    raw = sources.load("fashion_mnist", tmp_path, download=False)
    assert np.array_equal(raw.train[0][:, 0], written["train-images-idx3-ubyte"])
    assert np.array_equal(raw.test[1], written["t10k-labels-idx1-ubyte"])
    assert str(tmp_path / layout) in raw.source
    assert "20 of 60,000 train" in raw.source


def test_root_stands_before_system_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "system")
    write_idx_set(tmp_path / "system", zipped=True)
    assert "system" in sources.load("fashion_mnist", tmp_path / "root", download=False).source
    write_idx_set(tmp_path / "root" / "fashion_mnist")
    assert "root" in sources.load("fashion_mnist", tmp_path / "root", download=False).source


@pytest.mark.usefixtures("no_system_files")
def test_missing_full_set_lists_every_place_and_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        sources.load("fashion_mnist", tmp_path, "full", download=False)
    message = str(caught.value)
    for place in ("fashion_mnist.npz", "fashion_mnist/train-images", "FashionMNIST/raw", "nowhere"):
        assert place in message
    assert "leanlight data prepare fashion_mnist" in message
    assert "\n" not in message


@pytest.mark.usefixtures("no_system_files")
def test_auto_falls_back_to_the_subset_and_says_so(tmp_path: Path) -> None:
    assert sources.load("fashion_mnist", tmp_path, download=False).source.startswith("packaged subset")


@pytest.mark.usefixtures("no_system_files")
def test_full_refuses_an_incomplete_set(tmp_path: Path) -> None:
    write_idx_set(tmp_path / "fashion_mnist")
    with pytest.raises(UserError, match=r"20 \+ 10 items.*60,000"):
        sources.load("fashion_mnist", tmp_path, "full", download=False)


@pytest.mark.usefixtures("no_system_files")
def test_truncated_file_is_named_and_not_replaced_by_the_subset(tmp_path: Path) -> None:
    write_idx_set(tmp_path / "fashion_mnist")
    path = tmp_path / "fashion_mnist" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=str(path)):
        sources.load("fashion_mnist", tmp_path, download=False)


def test_failed_download_is_among_the_places_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(download, "download", fail)
    with pytest.raises(UserError, match=r"download from https://ossci-\S+ \(no route to host\); put its files"):
        sources.load("mnist", tmp_path, download=True)


@pytest.mark.parametrize("place", ["mnist.npz", "mnist/mnist.npz"])
def test_mnist_npz_is_found(tmp_path: Path, place: str) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    images, labels = RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8), np.arange(12, dtype=np.uint8) % 10
    np.savez(tmp_path / place, x_train=images, y_train=labels, x_test=images[:3], y_test=labels[:3])
    raw = sources.load("mnist", tmp_path, download=False)
    assert np.array_equal(raw.train[0][:, 0], images)
    assert raw.test[1].tolist() == [0, 1, 2]


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict]:
    """A small set in the official layout; the published checksums are replaced by those of these files."""
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, name)
    key = "labels" if name == "CIFAR10" else "fine_labels"
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)
    contents = {}
    for attribute in ("train_list", "test_list"):
        entries = []
        for file, _ in getattr(dataset, attribute):
            rows = RNG.integers(0, 256, (6, 3072), dtype=np.uint8)
            contents[file] = {"data": rows, key: [0, 1, 2, 3, 4, 5]}
            (folder / file).write_bytes(pickle.dumps(contents[file], 4))
            entries.append([file, md5((folder / file).read_bytes()).hexdigest()])
        monkeypatch.setattr(dataset, attribute, entries)
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"name{i}" for i in range(100)]}, 4))
    return contents


@pytest.mark.parametrize(("name", "dataset"), [("cifar10", "CIFAR10"), ("cifar100", "CIFAR100")])
def test_official_cifar_layout_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dataset: str
) -> None:
    contents = write_cifar(tmp_path, dataset, monkeypatch)
    raw = sources.load(name, tmp_path, download=False)
    rows = np.concatenate([c["data"] for file, c in contents.items() if not file.startswith("test")])
    assert np.array_equal(raw.train[0].reshape(len(rows), -1), rows)
    assert raw.test[1].tolist() == [0, 1, 2, 3, 4, 5]
    assert raw.classes[3] == ("cat" if name == "cifar10" else "name3")


def test_altered_cifar_batch_is_refused_before_it_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path, "CIFAR10", monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="data_batch_2 is damaged"):
        sources.load("cifar10", tmp_path, download=False)


def test_svhn_mat_files_are_read_with_ten_as_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    images, labels = RNG.integers(0, 256, (32, 32, 3, 7), dtype=np.uint8), np.array([[10, 1, 2, 3, 9, 10, 5]]).T
    (tmp_path / "svhn").mkdir()
    table = {}
    for name in ("train", "test"):
        path = tmp_path / "svhn" / f"{name}_32x32.mat"
        savemat(path, {"X": images, "y": labels.astype(np.uint8)})
        table[name] = ["http://x", path.name, md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", table)
    raw = sources.load("svhn", tmp_path, download=False)
    assert raw.train[1].tolist() == [0, 1, 2, 3, 9, 0, 5]
    assert np.array_equal(raw.train[0][4].transpose(1, 2, 0), images[..., 4])


def picture(path: Path, grey: int, size: tuple[int, int] = (64, 64)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)


def test_official_tiny_imagenet_layout_is_read(tmp_path: Path) -> None:
    base = tmp_path / "tiny-imagenet-200"
    for label, name in enumerate(("n01", "n02")):
        for i in range(3):
            picture(base / "train" / name / "images" / f"{name}_{i}.png", 10 * label + i)
    picture(base / "val" / "images" / "val_0.png", 99)
    (base / "val" / "val_annotations.txt").write_text("val_0.png\tn02\t0\t0\t62\t62\n")
    raw = sources.load("tiny_imagenet", tmp_path, download=False)
    assert raw.classes == ("n01", "n02")
    assert raw.train[1].tolist() == [0, 0, 0, 1, 1, 1]
    assert raw.train[0][:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert (raw.test[1].tolist(), raw.test[0][0, 0, 0, 0]) == ([1], 99)


def test_celeba_layout_is_read_with_attributes_and_official_parts(tmp_path: Path) -> None:
    base, names = tmp_path / "celeba", [f"attribute{i}" for i in range(40)]
    rows, parts = [], []
    for i, part in enumerate((0, 0, 1, 2)):
        picture(base / "img_align_celeba" / f"{i}.jpg", 50 * i, (178, 218))
        rows.append(f"{i}.jpg " + " ".join("1" if a == i else "-1" for a in range(40)))
        parts.append(f"{i}.jpg {part}")
    (base / "list_attr_celeba.txt").write_text("\n".join(["4", " ".join(names), *rows]))
    (base / "list_eval_partition.txt").write_text("\n".join(parts))
    raw = sources.load("celeba", tmp_path, download=False, image_size=32)
    assert raw.val is not None
    assert (len(raw.train[0]), len(raw.val[0]), len(raw.test[0])) == (2, 1, 1)
    assert raw.train[0].shape == (2, 3, 32, 32)
    assert raw.test[1].argmax() == 3
    assert raw.test[1].sum() == 1
    assert raw.classes == tuple(names)


def folder_of_pictures(root: Path, parts: tuple[str, ...] = ("train", "test")) -> Path:
    for part in parts:
        for label, name in enumerate(("cat", "dog")):
            for i in range(4):
                picture(root / part / name / f"{i}.png", 100 * label + i, (40, 30))
    return root


def test_image_folder_is_read_by_class(tmp_path: Path) -> None:
    path = folder_of_pictures(tmp_path / "mine", ("train", "val", "test"))
    raw = sources.load("image_folder", "none", path=path, image_size=16)
    assert raw.classes == ("cat", "dog")
    assert raw.train[0].shape == (8, 3, 16, 16)
    assert raw.train[0][:, 0, 0, 0].tolist() == [0, 1, 2, 3, 100, 101, 102, 103]
    assert raw.val is not None


def test_lone_val_folder_is_the_test_part(tmp_path: Path) -> None:
    raw = sources.load("image_folder", "none", path=folder_of_pictures(tmp_path, ("train", "val")), image_size=16)
    assert raw.val is None
    assert len(raw.test[0]) == 8


def test_of_a_folder_of_classes_every_tenth_picture_of_a_class_is_the_test_part(tmp_path: Path) -> None:
    for label, (name, count) in enumerate({"cat": 23, "dog": 2}.items()):
        for i in range(count):
            picture(tmp_path / "mine" / name / f"{i:02}.png", 100 * label + i)
    raw = sources.load("image_folder", "none", path=tmp_path / "mine", image_size=16)
    assert raw.classes == ("cat", "dog")
    assert raw.test[0][:, 0, 0, 0].tolist() == [9, 19, 101]
    assert raw.train[0][:, 0, 0, 0].tolist() == [*(i for i in range(23) if i not in (9, 19)), 100]
    assert raw.train[1].tolist() == [0] * 21 + [1]


def test_a_class_with_one_picture_alone_is_named(tmp_path: Path) -> None:
    for name in ("cat/0.png", "cat/1.png", "dog/0.png"):
        picture(tmp_path / name, 0)
    with pytest.raises(UserError, match="dog holds one picture"):
        sources.load("image_folder", "none", path=tmp_path, image_size=16)


def no_test(path: Path) -> None:
    for name in ("cat", "dog"):
        for file in (path / "test" / name).iterdir():
            file.unlink()
        (path / "test" / name).rmdir()
    (path / "test").rmdir()


def empty_class(path: Path) -> None:
    (path / "train" / "empty").mkdir()


def unknown_class(path: Path) -> None:
    picture(path / "test" / "bird" / "0.png", 0)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(no_test, "test/ or val/"), (empty_class, "train/empty holds no picture"), (unknown_class, "test/bird")],
)
def test_bad_image_folder_is_explained(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    path = folder_of_pictures(tmp_path)
    spoil(path)
    with pytest.raises(UserError, match=message):
        sources.load("image_folder", "none", path=path, image_size=16)


def test_subset_of_another_set_does_not_exist() -> None:
    with pytest.raises(UserError, match="fashion_mnist only"):
        sources.load("mnist", "none", "subset")


def test_catalogue_is_consistent() -> None:
    for name, info in CATALOG.items():
        assert info.name == name
        assert len(info.mean) == len(info.std) == info.shape[0]
        assert len(info.class_names) == info.num_classes


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_real_tiles_are_converted(tmp_path: Path, name: str) -> None:
    source = Path(os.environ.get("LEANLIGHT_DATA", "")) / name
    if not (source / "test_00.webp").exists():
        pytest.skip(f"LEANLIGHT_DATA holds no tiles of {name}")
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "convert_tiles", Path(__file__).parents[3] / "scripts" / "convert_tiles.py"
    )
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.convert(source.parent, tmp_path, name)
    raw = sources.load(name, tmp_path, download=False)
    sheet, labels = np.asarray(Image.open(source / "test_00.webp").convert("RGB")), np.load(source / "labels.npz")
    columns = sheet.shape[1] // 32
    for position in (0, 7, columns, columns + 3):
        row, column = divmod(position, columns)
        tile = sheet[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
        assert np.array_equal(raw.test[0][position].transpose(1, 2, 0), tile)
    assert np.array_equal(raw.test[1], labels["test_labels"][: len(raw.test[1])])
    assert raw.train[0].mean(axis=(0, 2, 3)) / 255 == pytest.approx(describe(name).mean, abs=0.01)
