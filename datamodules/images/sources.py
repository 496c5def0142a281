"""Where each data set is looked for, and how it becomes arrays.

`load` goes through the places of a set in a fixed order: the root folder, a system location where one exists, a
download, the packaged subset. What it returns says where the data came from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Literal

import numpy as np

from datamodules.images import download, formats, lists
from datamodules.images.catalog import DatasetInfo, describe
from datamodules.images.formats import Part
from leanlight.contracts import UserError

Variant = Literal["auto", "full", "subset"]

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
SUBSET_FILE = "fashion_mnist_subset.npz.xz"
SUBSET_SHA256 = "400c44832575f2fc2fbd0c5ec3835612c914f1341901d4b6ff2b9adfd9836c30"
DOWNLOAD_FAILED = "download from"


@dataclass(frozen=True)
class Raw:
    """A data set as arrays: parts are (uint8 (N, C, H, W), int64 (N,) or, for attributes, (N, K)).

    Args:
        train: training part.
        test: test part.
        classes: label names; index = label.
        source: where it was found, in words.
        val: the publisher's own validation part, if it is separate from train and test.
        held_out: (n,) positions in train that the publisher holds out for validation where one validates.
    """

    train: Part
    test: Part
    classes: tuple[str, ...]
    source: str
    val: Part | None = None
    held_out: np.ndarray | None = None


@dataclass
class Query:
    """What is asked for, and the places tried so far.

    Args:
        info: entry of the catalogue.
        root: folder of data sets.
        variant: which number of items will do.
        download: whether missing files may be downloaded.
        path: folder of ``image_folder``, ``vtab`` or ``fgvc``.
        image_size: side to which pictures of mixed size are decoded.
        tried: places where nothing was, for the error message.
    """

    info: DatasetInfo
    root: Path
    variant: Variant
    download: bool
    path: Path | None
    image_size: int | None
    tried: list[str]

    def exists(self, path: Path) -> bool:
        """Whether `path` exists; a path that does not is remembered as tried."""
        if path.exists():
            return True
        self.tried.append(str(path))
        return False


def load(
    name: str,
    root: Path | str,
    variant: Variant = "auto",
    download: bool = True,
    path: Path | str | None = None,
    image_size: int | None = None,
) -> Raw:
    """Find data set `name`, check it and return its arrays.

    Raises UserError when nothing is found, naming every place, or when a file is damaged.

    Args:
        name: of the catalogue.
        root: folder of data sets.
        variant: ``full``: the official number of items; ``subset``: the packaged one; ``auto``: the best found.
        download: whether missing files may be downloaded.
        path: folder of ``image_folder``, ``vtab`` or ``fgvc``.
        image_size: side to which pictures of mixed size are decoded; arrays are returned in their own size.
    """
    info = describe(name)
    query = Query(info, Path(root).expanduser(), variant, download, Path(path) if path else None, image_size, [])
    if variant == "subset" and name != "fashion_mnist":
        raise UserError(f"variant: subset exists for fashion_mnist only, not for {name!r}; use auto")
    raw = packaged_subset(query) if variant == "subset" else _FINDERS[name](query)
    if raw is None:
        offline = any(place.startswith(DOWNLOAD_FAILED) for place in query.tried)
        help_ = "put its files into one of these places" if offline else f"to get it: {info.get}"
        raise UserError(f"{info.title} was not found; tried: {'; '.join(query.tried)}; {help_}")
    return _checked_count(raw, query)


def _checked_count(raw: Raw, query: Query) -> Raw:
    """Say in `source` when the set is not the official whole; refuse that for variant ``full``."""
    info, train, test = query.info, len(raw.train[0]), len(raw.test[0])
    if info.train and (train, test) != (info.train, info.test):
        if query.variant == "full":
            raise UserError(
                f"variant: full, but {raw.source} holds {train:,} + {test:,} items, the whole of {info.title} has "
                f"{info.train:,} + {info.test:,}; to get it: {info.get}"
            )
        return replace(raw, source=f"{raw.source} ({train:,} of {info.train:,} train, {test:,} of {info.test:,} test)")
    return raw


def fetch(query: Query, folder: Path) -> list[Path]:
    """The files of a set that is downloaded; none, and an entry of the places tried, where the network fails."""
    try:
        return download.download(query.info.name, folder)
    except OSError as error:  # an URLError is one
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        query.tried.append(f"{DOWNLOAD_FAILED} {download.SOURCES[query.info.name].url} ({reason.rstrip(': ')})")
        return []


def digits(query: Query) -> Raw:
    """scikit-learn's digits, 8x8, grey levels 0..16 stretched to 0..255; a fixed permutation makes train and test."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    # A Fisher-Yates by a fixed linear congruence: the split must not depend on numpy's generator streams.
    order, state = np.arange(len(images)), 1
    for last in range(len(images) - 1, 0, -1):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        pick = (state >> 33) % (last + 1)
        order[[last, pick]] = order[[pick, last]]
    images, labels = formats.as_part(images[order], bunch.target[order], "scikit-learn digits", 10)
    cut = query.info.train
    return Raw((images[:cut], labels[:cut]), (images[cut:], labels[cut:]), query.info.class_names, "scikit-learn")


def idx_folder(query: Query, folder: Path) -> Raw | None:
    """The four idx files of the MNIST family in `folder`, gzipped or not; None when one is absent."""
    parts: list[Part] = []
    for prefix in ("train", "t10k"):
        found = []
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
            stem = folder / f"{prefix}-{kind}"
            path = next((p for p in (stem, stem.with_name(stem.name + ".gz")) if p.is_file()), None)
            if path is None:
                query.tried.append(f"{stem}[.gz]")
                return None
            found.append(path)
        parts.append(formats.as_part(formats.read_idx(found[0]), formats.read_idx(found[1]), found[1], 10))
    return Raw(parts[0], parts[1], query.info.class_names, str(folder))


def idx_family(query: Query, folders: list[Path], torchvision_name: str) -> Raw | None:
    """A set of the MNIST family: idx files where they may lie, or a download.

    Args:
        query: what is asked for.
        folders: places of the idx files; torchvision's own comes after the first.
        torchvision_name: class of `torchvision.datasets`, whose name is the folder of its download.
    """
    layout = query.root / torchvision_name / "raw"
    for folder in [*folders[:1], layout, *folders[1:]]:
        if raw := idx_folder(query, folder):
            return raw
    return idx_folder(query, layout) if query.download and fetch(query, layout) else None


def npz(query: Query, stem: str | None = None) -> Raw | None:
    """Arrays in ``root/<name>/<stem>.npz`` or ``root/<stem>.npz``; stem: the set's name unless given."""
    name = query.info.name
    for path in (query.root / name / f"{stem or name}.npz", query.root / f"{stem or name}.npz"):
        if query.exists(path):
            parts, classes = formats.read_npz(path, query.info.num_classes)
            return Raw(parts["train"], parts["test"], classes or query.info.class_names, str(path), parts.get("val"))
    return None


def fashion_mnist(query: Query) -> Raw | None:
    """idx files in root, torchvision's layout, the Debian package, a download; for variant auto the packaged subset."""
    folders = [query.root / "fashion_mnist", DEBIAN_FASHION_MNIST]
    found = npz(query) or idx_family(query, folders, "FashionMNIST")
    return found or (packaged_subset(query) if query.variant == "auto" else None)


def packaged_subset(query: Query) -> Raw:
    """The first 320 training and 80 test images of each class, which come with the package."""
    with as_file(files("datamodules") / "images" / "resources" / SUBSET_FILE) as path:
        train, test = formats.read_packed_subset(path, SUBSET_SHA256)
    return Raw(train, test, query.info.class_names, "packaged subset")


def mnist(query: Query) -> Raw | None:
    """An npz, idx files in root, torchvision's layout, or a download."""
    return npz(query) or idx_family(query, [query.root / "mnist"], "MNIST")


def cifar(query: Query) -> Raw | None:
    """An npz, the official batches in torchvision's layout, or their download."""
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import extract_archive

    dataset, key = (CIFAR10, "labels") if query.info.name == "cifar10" else (CIFAR100, "fine_labels")
    folder = query.root / dataset.base_folder
    if raw := npz(query):
        return raw
    if not query.exists(folder) and query.download:
        for archive in fetch(query, query.root):
            extract_archive(archive, query.root)
    if not folder.exists():
        return None

    def part(entries: list[list[str]]) -> Part:
        for name, md5 in entries:
            if not (folder / name).is_file():
                raise UserError(f"{folder / name} is missing; {query.info.get}")
            formats.check_md5(folder / name, md5)
        return formats.read_cifar_batches([folder / name for name, _ in entries], key, query.info.num_classes)

    names = query.info.class_names
    if key == "fine_labels" and (meta := folder / "meta").is_file():
        names = tuple(formats.unpickle(meta)["fine_label_names"])
    return Raw(part(dataset.train_list), part(dataset.test_list), names, str(folder))


def image_folder(query: Query) -> Raw | None:
    """The parts that `formats.folder_parts` finds; validation data where ``val`` stands beside ``test``."""
    base = query.path
    if base is None or not query.exists(base):
        return None
    classes, parts = formats.folder_parts(base)
    size = query.image_size or query.info.shape[1]
    decoded = {name: (formats.decode_pictures(paths, size), labels) for name, (paths, labels) in parts.items()}
    return Raw(decoded["train"], decoded["test"], classes, str(base), decoded.get("val"))


def vtab(query: Query) -> Raw | None:
    """A task of VTAB-1k, as `lists.read_vtab` reads it."""
    if query.path is None or not query.exists(query.path):
        return None
    train, test, classes, held_out = lists.read_vtab(query.path, query.image_size or query.info.shape[1])
    return Raw(train, test, tuple(map(str, range(classes))), str(query.path), held_out=held_out)


def fgvc(query: Query) -> Raw | None:
    """A set of fine-grained classes, as `lists.read_fgvc` reads it."""
    if query.path is None or not query.exists(query.path):
        return None
    train, test, classes, held_out = lists.read_fgvc(query.path, query.image_size or query.info.shape[1])
    return Raw(train, test, classes, str(query.path), held_out=held_out)


def svhn(query: Query) -> Raw | None:
    """An npz, the two official .mat files in ``root/svhn`` or root, or their download. Label 10 is the digit 0."""
    from torchvision.datasets import SVHN

    if raw := npz(query):
        return raw
    entries = [SVHN.split_list[name] for name in ("train", "test")]
    folders = [query.root / "svhn", query.root]
    folder = next((f for f in folders if all(query.exists(f / name) for _, name, _ in entries)), None)
    if folder is None and query.download and fetch(query, folders[0]):
        folder = folders[0]
    if folder is None:
        return None

    def part(name: str, md5: str) -> Part:
        from scipy.io import loadmat

        formats.check_md5(folder / name, md5)
        content = loadmat(folder / name)
        images = np.ascontiguousarray(content["X"].transpose(3, 2, 0, 1))
        return formats.as_part(images, content["y"].reshape(-1).astype(np.int64) % 10, folder / name, 10)

    train, test = (part(name, md5) for _, name, md5 in entries)
    return Raw(train, test, query.info.class_names, str(folder))


def tiny_imagenet(query: Query) -> Raw | None:
    """An npz, the official folder ``root/tiny-imagenet-200``, or its download. Labels follow the sorted WordNet ids."""
    from torchvision.datasets.utils import extract_archive

    if raw := npz(query):
        return raw
    folder = query.root / "tiny-imagenet-200"
    if not query.exists(folder) and query.download:
        for archive in fetch(query, query.root):
            extract_archive(archive, query.root)
    if not folder.exists():
        return None
    classes = formats.class_folders(folder / "train")
    paths, labels = formats.list_pictures(folder / "train", classes)
    size = query.info.shape[1]
    table = [line.split("\t")[:2] for line in (folder / "val" / "val_annotations.txt").read_text().splitlines() if line]
    test_paths = [folder / "val" / "images" / name for name, _ in table]
    test_labels = np.asarray([classes.index(wordnet_id) for _, wordnet_id in table], np.int64)
    train, test = formats.decode_pictures(paths, size), formats.decode_pictures(test_paths, size)
    return Raw((train, labels), (test, test_labels), classes, str(folder))


def celeba(query: Query) -> Raw | None:
    """``root/celeba/celeba_<size>.npz``, or torchvision's layout in ``root/celeba``: centre 148 pixels, official parts.

    Labels are the 40 attributes as 0 or 1.
    """
    size = query.image_size or query.info.shape[1]
    if raw := npz(query, f"celeba_{size}"):
        return raw
    folder = query.root / "celeba"
    attributes, partition = folder / "list_attr_celeba.txt", folder / "list_eval_partition.txt"
    if not all(query.exists(p) for p in (folder / "img_align_celeba", attributes, partition)):
        return None
    names = tuple(attributes.read_text().splitlines()[1].split())
    rows = np.loadtxt(attributes, dtype=str, skiprows=2, ndmin=2)
    splits = np.loadtxt(partition, dtype=str, ndmin=2)
    if rows.shape[1] != len(names) + 1 or not np.array_equal(rows[:, 0], splits[:, 0]):
        raise UserError(f"{attributes} and {partition} do not list the same pictures with {len(names)} attributes")
    labels = (rows[:, 1:].astype(np.int64) + 1) // 2

    def part(code: str) -> Part:
        chosen = np.flatnonzero(splits[:, 1] == code)
        paths = [folder / "img_align_celeba" / name for name in rows[chosen, 0]]
        return formats.decode_pictures(paths, size, crop=148), labels[chosen]

    return Raw(part("0"), part("2"), names, str(folder), part("1"))


_FINDERS: dict[str, Callable[[Query], Raw | None]] = {
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "mnist": mnist,
    "cifar10": cifar,
    "cifar100": cifar,
    "svhn": svhn,
    "tiny_imagenet": tiny_imagenet,
    "celeba": celeba,
    "image_folder": image_folder,
    "vtab": vtab,
    "fgvc": fgvc,
}
