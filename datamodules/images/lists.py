"""Pictures whose parts and labels stand in lists: VTAB-1k in its common layout, and the FGVC sets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from datamodules.images import formats
from datamodules.images.formats import Part
from leanlight.contracts import UserError

Listed = list[tuple[str, int]]
# Classes of the 19 tasks of VTAB-1k (Zhai et al. 2019, arXiv:1910.04867), by the names of their usual folders.
VTAB = {
    "caltech101": 102,
    "cifar": 100,
    "clevr_count": 8,
    "clevr_dist": 6,
    "diabetic_retinopathy": 5,
    "dmlab": 6,
    "dsprites_loc": 16,
    "dsprites_ori": 16,
    "dtd": 47,
    "eurosat": 10,
    "kitti": 4,
    "oxford_flowers102": 102,
    "oxford_iiit_pet": 37,
    "patch_camelyon": 2,
    "resisc45": 45,
    "smallnorb_azi": 18,
    "smallnorb_ele": 9,
    "sun397": 397,
    "svhn": 10,
}
_FGVC_FOLDERS = ("", "images", "Images")


def read_vtab(base: Path, size: int) -> tuple[Part, Part, int, np.ndarray]:
    """A task's folder: ``train800.txt``, ``val200.txt``, ``test.txt`` and, if it is there, ``train800val200.txt``.

    A line is a picture's path in the folder and its label. Pictures are squeezed to squares, since what a task asks for
    may stand at an edge.

    Args:
        base: the folder; by its name the task's number of classes is known.
        size: side of the squares.

    Returns:
        The part of 1,000, training pictures before validation pictures; the test part; the number of classes; positions
        of the validation pictures.

    Raises:
        UserError: a list that is missing or damaged, or labels beyond the task's classes.
    """
    train, val, test = (_lines(base / f"{name}.txt") for name in ("train800", "val200", "test"))
    both = base / "train800val200.txt"
    if both.is_file() and sorted(_lines(both)) != sorted(train + val):
        raise UserError(f"path: {both} lists other pictures than train800.txt and val200.txt together")
    most = 1 + max(label for _, label in train + val + test)
    classes = VTAB.get(base.resolve().name, most)
    if most > classes:
        raise UserError(f"path: {base.resolve().name} has labels below {classes}, {base} lists {most - 1}")
    parts = [_decoded([base], listed, size, whole=True) for listed in (train + val, test)]
    return parts[0], parts[1], classes, np.arange(len(train), len(train) + len(val))


def read_fgvc(base: Path, size: int) -> tuple[Part, Part, tuple[str, ...], np.ndarray]:
    """A folder with ``train.json``, ``val.json`` and ``test.json``, each ``{picture: class id}``.

    Pictures lie in the folder, or in ``images`` or ``Images`` in it; ids need not be 0, 1, … Of each the centre square
    is taken.

    Returns:
        The parts of training and validation as one, the test part, the ids in order as names of the classes, positions
        of the validation pictures.

    Raises:
        UserError: a list that is missing or damaged, or a class without training pictures.
    """
    train, val, test = (_json(base / f"{name}.json") for name in ("train", "val", "test"))
    ids = sorted({label for _, label in train})
    if strange := {label for _, label in val + test} - {*ids}:
        raise UserError(f"path: class {min(strange)} stands in val.json or test.json of {base}, but not in train.json")
    folders = [base / name for name in _FGVC_FOLDERS]
    parts = [
        _decoded(folders, [(name, ids.index(label)) for name, label in listed], size, whole=False)
        for listed in (train + val, test)
    ]
    return parts[0], parts[1], tuple(map(str, ids)), np.arange(len(train), len(train) + len(val))


def _decoded(folders: list[Path], listed: Listed, size: int, whole: bool) -> Part:
    """Pictures of a list, which lie in the first folder that holds the first of them."""
    base = next((folder for folder in folders if (folder / listed[0][0]).is_file()), folders[0])
    paths = [base / name for name, _ in listed]
    if missing := next((path for path in paths if not path.is_file()), None):
        raise UserError(f"path: a list names {missing}, which is not there")
    return formats.decode_pictures(paths, size, whole=whole), np.asarray([label for _, label in listed], np.int64)


def _lines(path: Path) -> Listed:
    try:
        rows = [line.rsplit(maxsplit=1) for line in path.read_text().splitlines() if line.strip()]
        listed = [(name, int(label)) for name, label in rows]
    except (OSError, ValueError) as error:
        raise UserError(f"path: expected lines of a picture and its label in {path} ({error})") from error
    return _checked(listed, path)


def _json(path: Path) -> Listed:
    try:
        listed = [(str(name), int(label)) for name, label in json.loads(path.read_text()).items()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"path: expected {{picture: class id}} in {path} ({error})") from error
    return _checked(listed, path)


def _checked(listed: Listed, path: Path) -> Listed:
    if not listed or min(label for _, label in listed) < 0:
        raise UserError(f"path: expected pictures with labels from 0 in {path}, got {len(listed)} lines")
    return listed
