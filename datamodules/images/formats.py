"""Readers of data files: idx, npz, the CIFAR batches and folders of pictures.

All of them are safe on untrusted files (no pickle is executed, pictures have a size limit) and name the file they
reject. Arrays are uint8 images (N, C, H, W) and int64 labels (N,).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from leanlight.contracts import UserError, atomic_path

if TYPE_CHECKING:
    from PIL import Image

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Part = tuple[Images, Labels]

MAX_PIXELS = 64 * 1024 * 1024  # a picture beyond 64 megapixels is taken for a decompression bomb
PARTS = ("train", "val", "test")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm")


def check_md5(path: Path, expected: str) -> None:
    """Compare a file with its published MD5 (all that the publishers of these sets give)."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise UserError(
            f"{path} is damaged or not the published file: MD5 {found}, expected {expected}; delete it and get it again"
        )


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, gzipped or not (http://yann.lecun.com/exdb/mnist, "file formats").

    Raises UserError when the header, the type or the size is wrong.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is truncated or damaged ({error})") from error
    if len(content) < 4 or content[:3] != b"\0\0\x08" or not 1 <= content[3] <= 4:
        raise UserError(f"{path} is not an idx file of unsigned bytes (header {content[:4].hex() or 'empty'})")
    dimensions = content[3]
    start = 4 + 4 * dimensions
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], ">u4")) if len(content) >= start else ()
    expected = start + int(np.prod(shape, dtype=np.int64)) if shape else start
    if len(content) != expected:
        raise UserError(f"{path} is truncated or damaged: {len(content):,} bytes, its header promises {expected:,}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def as_part(images: npt.NDArray[Any], labels: npt.NDArray[Any], origin: Path | str, num_classes: int) -> Part:
    """Bring images and their labels to the common layout, checking both.

    Args:
        images: uint8 (N, H, W), (N, H, W, C) or (N, C, H, W).
        labels: integers (N,), (N, 1) or, for attributes, (N, K).
        origin: file to name in errors.
        num_classes: labels (N,) must lie below it.
    """
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) == 0:
        raise UserError(f"{origin}: images must be uint8 (N, H, W[, C]), got {images.dtype} {images.shape}")
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[-1] in (1, 3) and images.shape[1] not in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    labels = labels.reshape(-1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if len(labels) != len(images) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{origin}: expected {len(images):,} integer labels, one an image, got {labels.dtype} {labels.shape}"
        )
    if labels.ndim == 1 and (labels.min() < 0 or labels.max() >= num_classes):
        raise UserError(f"{origin}: labels must lie in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}")
    return np.ascontiguousarray(images), labels.astype(np.int64)


#: What `numpy.load` raises of a file of any content.
NO_ARRAY = (OSError, ValueError, EOFError, MemoryError, OverflowError, zipfile.BadZipFile, zlib.error)


def read_arrays(path: Path, content: bytes | None = None) -> dict[str, npt.NDArray[Any]]:
    """Read every array of an npz file without pickle. content: the file's bytes if they were unpacked already."""
    try:
        with np.load(io.BytesIO(content) if content is not None else path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except NO_ARRAY as error:
        raise UserError(f"{path} is truncated or not an npz file of plain arrays ({error})") from error
    if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise UserError(f"{path} is not an npz file of plain arrays: {strange[0]!r} is none")
    return arrays


def read_npz(path: Path, num_classes: int) -> tuple[dict[str, Part], tuple[str, ...]]:
    """Read what `write_npz` writes: parts by name (``train``, ``test``, perhaps ``val``) and class names, if any.

    The arrays are ``x_train``, ``y_train``, ``x_test``, ``y_test``, ``x_val``, ``y_val``, ``classes``.
    """
    arrays = read_arrays(path)
    names = ["train", "test", *(["val"] if "x_val" in arrays else [])]
    if missing := [f"{kind}_{name}" for name in names for kind in "xy" if f"{kind}_{name}" not in arrays]:
        raise UserError(f"{path} lacks the array {missing[0]!r}; it has {', '.join(sorted(arrays)) or 'none'}")
    parts = {name: as_part(arrays[f"x_{name}"], arrays[f"y_{name}"], path, num_classes) for name in names}
    return parts, tuple(str(name) for name in arrays.get("classes", ()))


def write_npz(path: Path, parts: Mapping[str, Part], classes: Sequence[str] = ()) -> None:
    """Write parts for `read_npz`, whole or not at all.

    Args:
        path: of the file.
        parts: ``train``, ``test`` and perhaps ``val`` → images and labels.
        classes: label names; none by default.
    """
    arrays = {f"{kind}_{name}": array for name, part in parts.items() for kind, array in zip("xy", part, strict=True)}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, classes=np.array(classes, dtype=str), **arrays)  # type: ignore[arg-type]


def read_packed_subset(path: Path, sha256: str) -> tuple[Part, Part]:
    """Read the packaged subset made by ``scripts/make_fashion_subset.py``, in the order of the official files."""
    packed = path.read_bytes()
    if hashlib.sha256(packed).hexdigest() != sha256:
        raise UserError(f"{path} is damaged (SHA-256 differs); reinstall leanlight")
    arrays = read_arrays(path, lzma.decompress(packed))

    def part(split: str) -> Part:
        order = np.argsort(arrays[f"{split}_index"])
        images = arrays[f"{split}_columns"].transpose(0, 2, 1)[order]
        return as_part(images, arrays[f"{split}_labels"][order], path, 10)

    return part("train"), part("test")


class _PlainType:
    """Stands for `numpy.dtype` in a pickle: whole and broken numbers, flags, strings, and lists of what is admitted."""

    def __init__(self, name: str, *_: Any) -> None:
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|[SU][0-9]{1,6}|O8", str(name)):
            raise pickle.UnpicklingError(f"arrays of type {name!s:.20!r} are not admitted")
        self.dtype = np.dtype(str(name))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Take the byte order; a type with fields or of arrays is refused."""
        if any(part is not None for part in state[2:5]) or state[1] not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError("arrays of compound types are not admitted")
        self.dtype = self.dtype.newbyteorder(state[1])

    def array(self, content: Any, shape: Any, order: Literal["C", "F"] = "C") -> npt.NDArray[Any]:
        """The array with this content; of objects, whose content is a list, each is taken as it is."""
        if self.dtype.hasobject:
            if not isinstance(content, list):
                raise pickle.UnpicklingError("an array of objects needs a list")
            objects = np.empty(len(content), object)
            for position, value in enumerate(content):
                objects[position] = value
            return objects.reshape(shape, order=order)
        raw = content.encode("latin1") if isinstance(content, str) else content
        return np.frombuffer(raw, self.dtype).reshape(shape, order=order)


class _PlainArray:
    """Stands for numpy's array while a pickle is loaded: executes nothing."""

    array: npt.NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self.array = _plain_type(dtype).array(content, shape, "F" if fortran else "C")


def _plain_type(dtype: Any) -> _PlainType:
    if not isinstance(dtype, _PlainType):
        raise pickle.UnpicklingError("only arrays of plain types are admitted")
    return dtype


def _new_array(*_: Any) -> _PlainArray:
    return _PlainArray()


def _array_of_buffer(content: Any, dtype: Any, shape: Any, order: Literal["C", "F"]) -> _PlainArray:
    """What protocol 5 calls instead."""
    made = _PlainArray()
    made.array = _plain_type(dtype).array(bytes(content), shape, order)
    return made


def _number(dtype: Any, content: Any) -> Any:
    """A number or string of numpy, as Python's own."""
    return _plain_type(dtype).array(content, ()).item()


def _latin1(text: str, encoding: str) -> bytes:
    """Bytes as Python 3 writes them for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding!s:.20!r} is not admitted")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """No bytes, as Python 3 writes them for Python 2."""
    return b""


class RestrictedUnpickler(pickle.Unpickler):
    """Admits lists, tuples, dicts, numbers, strings and numpy's arrays of these, refuses every other name."""

    _admitted: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _PlainArray,
        ("numpy", "dtype"): _PlainType,
        ("_codecs", "encode"): _latin1,
        ("__builtin__", "bytes"): _no_bytes,
        **{
            (f"numpy.{core}.{module}", name): stand_in
            for core in ("core", "_core")
            for module, name, stand_in in (
                ("multiarray", "_reconstruct", _new_array),
                ("multiarray", "scalar", _number),
                ("numeric", "_frombuffer", _array_of_buffer),
            )
        },
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in of an admitted name."""
        try:
            return self._admitted[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted") from None


def unpickle(path: Path, kind: type | tuple[type, ...] = dict, content: bytes | None = None) -> Any:
    """Load an untrusted pickle through `RestrictedUnpickler`; UserError when it is refused.

    Args:
        path: of the file.
        kind: what it must hold: a dictionary, whose arrays come as numpy arrays, or one of other kinds.
        content: the file's bytes, if they were read already.
    """
    try:
        with open(path, "rb") if content is None else io.BytesIO(content) as file:
            loaded = _without_stand_ins(RestrictedUnpickler(file, encoding="latin1").load())
    except Exception as error:  # a damaged pickle may raise anything, from MemoryError to UnicodeDecodeError
        raise UserError(f"{path} was refused: {type(error).__name__} {error}") from error
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(loaded) not in kinds:
        expected = " or ".join("dictionary" if one is dict else one.__name__ for one in kinds)
        raise UserError(f"{path} was refused: expected a {expected}, got {type(loaded).__name__}")
    return loaded


def _without_stand_ins(value: Any) -> Any:
    """The arrays themselves, in dictionaries at any depth."""
    if isinstance(value, dict):
        return {str(k): _without_stand_ins(v) for k, v in value.items()}
    return value.array if isinstance(value, _PlainArray) else value


def read_cifar_batches(paths: Iterable[Path], label_key: str, num_classes: int) -> Part:
    """Read official CIFAR "python version" batches: rows of 3072 bytes, planes red, green, blue.

    Args:
        paths: of the batches, in order.
        label_key: name of the labels in a batch.
        num_classes: labels must lie below it.
    """
    images, labels = [], []
    for path in paths:
        batch = unpickle(path)
        data, label = batch.get("data"), batch.get(label_key)
        if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != 3072 or not isinstance(label, list):
            raise UserError(
                f"{path}: expected 'data' (N, 3072) bytes and a list {label_key!r}, as in the official files"
            )
        part = as_part(data.reshape(-1, 3, 32, 32), np.asarray(label), path, num_classes)
        images.append(part[0])
        labels.append(part[1])
    return np.concatenate(images), np.concatenate(labels)


@contextmanager
def open_picture(source: Path | bytes, mode: str = "RGB") -> Iterator[Image.Image]:
    """Open a picture file (or its bytes), converted to `mode`; UserError when it is damaged or too large to decode."""
    from PIL import Image

    where = source if isinstance(source, Path) else "an embedded picture"
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as picture:
            if picture.width * picture.height > MAX_PIXELS:  # known from the header, before anything is decoded
                raise UserError(f"{where} has {picture.width}x{picture.height} pixels, more than {MAX_PIXELS:,}")
            yield picture.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} cannot be read as a picture ({error})") from error


def decode_picture(source: Path | bytes, size: int, crop: int | None = None, whole: bool = False) -> Images:
    """Decode one picture to (3, size, size): its centre square, resized bilinearly.

    Args:
        source: a file, or its bytes.
        size: side of the result.
        crop: side of the centre square that is cut out; the picture's shorter side by default.
        whole: squeeze the whole picture to a square instead.
    """
    with open_picture(source) as picture:
        if whole:
            return np.asarray(picture.resize((size, size), 2)).transpose(2, 0, 1)
        side = crop or min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        box = (left, top, left + side, top + side)
        square = picture.crop(box) if side == size else picture.resize((size, size), 2, box=box)  # 2: bilinear
        return np.asarray(square).transpose(2, 0, 1)


def decode_pictures(sources: Sequence[Path | bytes], size: int, crop: int | None = None, whole: bool = False) -> Images:
    """Decode many pictures to one array (N, 3, size, size), on all cores; arguments as for `decode_picture`."""
    out = np.empty((len(sources), 3, size, size), np.uint8)

    def decode(position: int) -> None:
        out[position] = decode_picture(sources[position], size, crop, whole)

    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow warns about large pictures; our limit stands above it
        for _ in pool.map(decode, range(len(sources))):
            pass
    return out


def class_folders(folder: Path) -> tuple[str, ...]:
    """Names of the class subfolders, sorted; hidden ones are left out."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")))


def list_pictures(folder: Path, classes: Sequence[str]) -> tuple[list[Path], Labels]:
    """Paths and labels of the pictures below ``folder/<class>/``, sorted by class and path.

    UserError when a class has no picture, or a subfolder is none of `classes`.
    """
    if stray := sorted(set(class_folders(folder)) - set(classes)):
        raise UserError(f"{folder / stray[0]} belongs to no class of the training part")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
        if not found:
            raise UserError(f"{folder / name} holds no picture ({', '.join(PICTURE_SUFFIXES)})")
        paths += found
        labels += [label] * len(found)
    return paths, np.asarray(labels, np.int64)


def folder_parts(base: Path) -> tuple[tuple[str, ...], dict[str, tuple[list[Path], Labels]]]:
    """Classes of a folder of pictures, and paths and labels of its parts by name, as `list_pictures` gives them.

    ``train/<class>/…`` with ``test`` and/or ``val`` beside it; a lone ``val`` is taken as test. A folder with nothing
    but class subfolders is training data, of which every tenth picture of a class, by path, makes the test part.

    Raises:
        UserError: neither layout, or a class without pictures for both parts.
    """
    if (base / "train").is_dir():
        classes = class_folders(base / "train")
        parts = {name: list_pictures(base / name, classes) for name in PARTS if (base / name).is_dir()}
        if len(parts) > 1 and classes:
            return classes, parts if "test" in parts else {"train": parts["train"], "test": parts["val"]}
        raise UserError(f"path: {base / 'train'} needs class subfolders, and test/ or val/ with the same beside it")
    if not base.is_dir() or not (classes := class_folders(base)) or set(classes) & set(PARTS):
        raise UserError(
            f"path: expected a folder with a subfolder of pictures a class, alone or under train/ with val/ or test/ "
            f"beside it; got {base}"
        )
    paths, labels = list_pictures(base, classes)
    counts = np.bincount(labels)
    if (counts < 2).any():
        raise UserError(f"path: {base / classes[int(counts.argmin())]} holds one picture; expected at least two")
    position = np.arange(len(paths)) - np.repeat(counts.cumsum() - counts, counts)
    is_test = position % 10 == np.minimum(9, counts - 1)[labels]
    return classes, {
        name: ([paths[i] for i in np.flatnonzero(chosen)], labels[chosen])
        for name, chosen in (("train", ~is_test), ("test", is_test))
    }
