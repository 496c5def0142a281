"""Convert compact layouts of image sets to the npz files that `ImageDataModule` reads (ROOT/<name>/<name>.npz).

Layouts understood in SOURCE/<name>/:
  tiles     train_00.webp, …, test_00.webp, …: lossless RGB sheets of 32x32 tiles in row-major order; labels.npz with
            train_labels, test_labels (the first ones belong to the sheets) and classes         (cifar10, cifar100)
  pictures  train.npz, val.npz: encoded pictures end to end (jpeg), their offsets, labels y, and classes.txt with
            "label<TAB>WordNet id<TAB>words" a line                                             (tiny_imagenet)
  arrays    <name>.npz with x_train, y_train, x_test, y_test                                    (mnist)

    python scripts/convert_tiles.py SOURCE ROOT [NAME …]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from datamodules.images import formats
from datamodules.images.catalog import describe
from datamodules.images.formats import Part
from leanlight.contracts import UserError

TILE = 32
Converted = tuple[dict[str, Part], tuple[str, ...]]


def untile(path: Path) -> formats.Images:
    """Cut a sheet into (N, 3, 32, 32)."""
    with formats.open_picture(path) as picture:
        sheet = np.asarray(picture)
    rows, columns = sheet.shape[0] // TILE, sheet.shape[1] // TILE
    if sheet.shape[:2] != (rows * TILE, columns * TILE):
        raise UserError(f"{path}: {sheet.shape[1]}x{sheet.shape[0]} pixels are no multiple of {TILE}")
    tiles = sheet.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(tiles).reshape(-1, 3, TILE, TILE)


def from_tiles(folder: Path, num_classes: int) -> Converted:
    """Sheets of tiles and their labels."""
    labels = formats.read_arrays(folder / "labels.npz")
    parts = {}
    for name in ("train", "test"):
        images = np.concatenate([untile(path) for path in sorted(folder.glob(f"{name}_*.webp"))])
        parts[name] = formats.as_part(images, labels[f"{name}_labels"][: len(images)], folder, num_classes)
    return parts, tuple(map(str, labels["classes"]))


def from_pictures(folder: Path, num_classes: int) -> Converted:
    """Encoded pictures in a buffer; the validation part becomes test."""
    parts = {}
    for name, file in (("train", "train.npz"), ("test", "val.npz")):
        arrays = formats.read_arrays(folder / file)
        buffer, offsets = arrays["jpeg"].tobytes(), arrays["offsets"].tolist()
        encoded = [buffer[low:high] for low, high in itertools.pairwise(offsets)]
        parts[name] = formats.as_part(formats.decode_pictures(encoded, 64), arrays["y"], folder / file, num_classes)
    lines = (folder / "classes.txt").read_text().splitlines()
    return parts, tuple(line.split("\t")[1] for line in lines)


def from_arrays(folder: Path, num_classes: int) -> Converted:
    """An npz that needs checking only."""
    return formats.read_npz(folder / f"{folder.name}.npz", num_classes)


CONVERTERS: dict[str, Callable[[Path, int], Converted]] = {
    "cifar10": from_tiles,
    "cifar100": from_tiles,
    "tiny_imagenet": from_pictures,
    "mnist": from_arrays,
}


def convert(source: Path, root: Path, name: str) -> Path:
    """Convert one set; return the file written."""
    parts, classes = CONVERTERS[name](source / name, describe(name).num_classes)
    target = root / name / f"{name}.npz"
    formats.write_npz(target, parts, classes)
    return target


def main() -> None:
    """Convert the named sets, or all that SOURCE holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("root", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CONVERTERS)}")
    arguments = parser.parse_args()
    for name in arguments.names or [name for name in CONVERTERS if (arguments.source / name).is_dir()]:
        if name not in CONVERTERS:
            parser.error(f"{name!r} is none of {', '.join(CONVERTERS)}")
        print(convert(arguments.source, arguments.root, name))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
