"""Where images made from a teacher lie: in a file mapped into memory while they are made, in a bank's folder after."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn

from leanlight.contracts import (
    BANK_COLUMNS,
    BANK_IMAGES,
    BANK_MANIFEST,
    BANK_RECORD,
    UserError,
    atomic_path,
    atomic_write,
    sha256_file,
)

_CHUNK = 1024  # images that are written at once


class ImagePool:
    """Images by number in files mapped into memory, written by any process of a run; they survive a kill.

    Image i lies at position i. Whoever makes images first says `put` and then, when those of all processes are there,
    `grow`; what is below `len` may be read. A run that was killed makes what it had not counted yet again.

    Args:
        folder: of the files; those of an earlier process are taken over.
        capacity: images there is room for.
        shape: (C, H, W) of an image.
        create: make the files where they lack; else UserError.
    """

    def __init__(self, folder: Path, capacity: int, shape: Sequence[int], create: bool = True) -> None:
        self.folder, self.capacity, self.shape = Path(folder), capacity, tuple(shape)
        self._size = 0
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
        self._may_create = create
        self.images = self._map("images", np.uint8, self.shape)
        self.labels = self._map("labels", np.int64)
        self.teacher_labels = self._map("teacher_labels", np.int64)
        self._written = self._map("written", np.bool_)

    def _map(self, name: str, kind: Any, shape: tuple[int, ...] = ()) -> np.ndarray:
        path, whole = self.folder / f"{name}.npy", (self.capacity, *shape)
        if path.is_file():
            array = open_memmap(path, mode="r+" if self._may_create else "r")
            if array.shape == whole and array.dtype == kind:
                return array
        if not self._may_create:
            raise UserError(
                f"{self.folder}: expected the pool of {self.capacity:,} images of shape {self.shape} that this "
                "checkpoint was written with, and it is not there; keep the run folder where it was, or start anew"
            )
        needed, free = int(np.prod(whole)) * np.dtype(kind).itemsize, shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"{self.folder}: {self.capacity:,} images need {needed / 1e9:.1f} GB there, {free / 1e9:.1f} GB are "
                "free; make fewer, or choose another trainer.default_root_dir"
            )
        return open_memmap(path, mode="w+", dtype=kind, shape=whole)

    def __len__(self) -> int:
        return self._size

    def put(self, index: Tensor, images: Tensor, labels: Tensor, teacher_labels: Tensor | None = None) -> None:
        """Write images at their numbers.

        Args:
            index: (N,) int64 in [0, capacity).
            images: (N, C, H, W) uint8.
            labels: (N,) int64 class that each was made for.
            teacher_labels: (N,) int64 class that the teacher gives it; -1 without.
        """
        at = index.cpu().numpy()
        self.images[at] = images.cpu().numpy()
        self.labels[at] = labels.cpu().numpy()
        self.teacher_labels[at] = -1 if teacher_labels is None else teacher_labels.cpu().numpy()
        self._written[at] = True

    def grow(self, size: int) -> None:
        """Count the first `size` images in; RuntimeError where one of them is not written."""
        missing = np.flatnonzero(~self._written[:size])
        if len(missing) or size > self.capacity:
            first = int(missing[0]) if len(missing) else self.capacity
            raise RuntimeError(f"image {first:,} of {size:,} was never written")
        self._size = size

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the images (N, C, H, W) uint8 and labels (N,) int64 at positions (N,)."""
        at = index.cpu().numpy()
        return torch.from_numpy(self.images[at]), torch.from_numpy(self.labels[at])

    def chunks(self) -> Iterator[Tensor]:
        """All images that count, in order, some at a time."""
        for start in range(0, self._size, _CHUNK):
            yield torch.from_numpy(self.images[start : min(start + _CHUNK, self._size)].copy())

    def flush(self) -> None:
        """Have what was written reach the disk."""
        for array in (self.images, self.labels, self.teacher_labels, self._written):
            array.flush()  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        """How many images there are, after they have reached the disk, and of which files."""
        self.flush()
        shape = list(self.shape)
        return {"size": self._size, "capacity": self.capacity, "shape": shape, "folder": str(self.folder.resolve())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; UserError when the files are not those it describes."""
        same = (state["capacity"], tuple(state["shape"])) == (self.capacity, self.shape)
        written = int(self._written[: state["size"]].sum())
        if not same or written < state["size"]:
            raise UserError(
                f"{self.folder}: the pool of this checkpoint ({state['size']:,} of {state['capacity']:,} images of "
                f"shape {tuple(state['shape'])}) is not there (found {written:,} of {self.capacity:,}, "
                f"{self.shape}); start the run anew"
            )
        self._size = state["size"]

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> ImagePool:
        """The pool of a checkpoint, where it lay then, to be read alone; UserError when it is gone."""
        pool = cls(Path(state["folder"]), state["capacity"], state["shape"], create=False)
        pool.load_state_dict(state)
        return pool

    def delete(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def in_8_bits(images: Tensor) -> Tensor:
    """Images in [0, 1], of any shape, as uint8."""
    return (images * 255).round().to(torch.uint8)


def originals(labels: np.ndarray, teacher_labels: np.ndarray, seeds: np.ndarray | int = -1) -> dict[str, np.ndarray]:
    """Columns of a manifest of images that vary no others.

    Args:
        labels: (M,) class that each was made for.
        teacher_labels: (M,) class that the teacher gives it.
        seeds: (M,) of what was drawn for each.
    """
    item = np.arange(len(labels))
    values = (item, item, 0, seeds, 1.0, 1, labels, teacher_labels)
    return {
        name: np.broadcast_to(np.asarray(value), item.shape) for name, value in zip(BANK_COLUMNS, values, strict=True)
    }


def write_bank(
    directory: Path,
    images: Tensor | Iterable[Tensor],
    rows: Mapping[str, Any],
    classes: Sequence[str],
    teacher: str | None,
    about: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a bank; its record comes last, so that a bank is whole or none.

    Args:
        directory: of the bank.
        images: (M, C, H, W) uint8, or pieces of that which are written one after the other.
        rows: column of `BANK_COLUMNS` → (M,) values.
        classes: names; index = label.
        teacher: `teacher_digest` of the network it was made from; None without one.
        about: further facts for the record, numbers above all.

    Returns:
        images, manifest, record.

    Raises:
        ValueError: other columns, columns of different lengths, or another number of images.
    """
    columns = {name: np.asarray(rows[name]) for name in BANK_COLUMNS if name in rows}
    items = len(columns.get(BANK_COLUMNS[0], ()))
    if set(rows) != set(BANK_COLUMNS) or any(column.shape != (items,) for column in columns.values()):
        raise ValueError(f"expected columns {BANK_COLUMNS} of one length, got {dict.fromkeys(rows)}")
    directory = Path(directory)
    paths = [directory / name for name in (BANK_IMAGES, BANK_MANIFEST, BANK_RECORD)]
    paths[-1].unlink(missing_ok=True)
    with atomic_path(paths[0]) as part, open(part, "wb") as file:
        shape = _write_images(file, images.split(_CHUNK) if isinstance(images, Tensor) else images, items)
    with atomic_path(paths[1]) as part, open(part, "w", encoding="utf-8") as table:
        table.write(",".join(BANK_COLUMNS) + "\n")
        for row in zip(*columns.values(), strict=True):
            table.write(",".join(_cell(value) for value in row) + "\n")
    record = {
        "items": items,
        "shape": list(shape),
        "classes": list(classes),
        "teacher": teacher,
        "images_sha256": sha256_file(paths[0]),
        "manifest_sha256": sha256_file(paths[1]),
        **(about or {}),
    }
    atomic_write(paths[2], json.dumps(record, indent=2) + "\n")
    return paths


def _cell(value: Any) -> str:
    """Nine digits give every float32 back."""
    return f"{float(value):.9g}" if isinstance(value, (float, np.floating)) else str(int(value))


def _write_images(file: BinaryIO, pieces: Iterable[Tensor], items: int) -> tuple[int, ...]:
    """Write one tensor in the form of safetensors as its pieces come; return the shape of an image."""
    shape: tuple[int, ...] | None = None
    count = 0
    for piece in pieces:
        if piece.dtype != torch.uint8 or piece.ndim != 4 or shape not in (None, tuple(piece.shape[1:])):
            raise ValueError(f"expected uint8 images (N, C, H, W), got {piece.dtype} of shape {tuple(piece.shape)}")
        if shape is None:
            shape = tuple(piece.shape[1:])
            whole = {"dtype": "U8", "shape": [items, *shape], "data_offsets": [0, items * int(np.prod(shape))]}
            header = json.dumps({"images": whole}).encode()
            header += b" " * (-len(header) % 8)
            file.write(struct.pack("<Q", len(header)) + header)
        file.write(piece.cpu().contiguous().numpy().data)
        count += len(piece)
    if shape is None or count != items:
        raise ValueError(f"expected {items:,} images, one a row, and at least one; got {count:,}")
    return shape


def teacher_digest(network: nn.Module) -> str:
    """sha256 of a network's state, in whatever device and memory format: which teacher a bank was made from."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
