"""Training on banks: images that stand for data which may not be used, beside real test images."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from datamodules.images import sources
from datamodules.images.catalog import describe
from datamodules.images.module import ImageDataModule, resize
from datamodules.images.sources import Raw
from datamodules.images.splits import stratified_split
from datamodules.images.substitute import read_safetensors
from datamodules.loaders import rank_and_world
from leanlight.contracts import (
    BANK_COLUMNS,
    BANK_IMAGES,
    BANK_MANIFEST,
    BANK_RECORD,
    ImageMeta,
    ImageSplit,
    UserError,
    derived_seed,
    same_classes,
    sha256_file,
)
from leanlight.contracts.ranges import FiniteFloat, PositiveInt, Share
from leanlight.ops import counter

_HELPS = "leanlight run dda/pipelines/fashion_mnist_small makes one"
_PIECE = 4096  # images that are worked on together, to bound memory
Keep = Literal["kept", "all", "random"]
Label = Literal["inherit", "teacher", "drop_if_disagree"]


@dataclass(frozen=True)
class Bank:
    """A bank that has been found whole.

    Args:
        folder: where it lies.
        images: (M, C, H, W) uint8, mapped from the file: what is read of them is not held in memory twice.
        columns: (M,) array of each column of the manifest.
        record: content of ``bank.json``.
    """

    folder: Path
    images: Tensor
    columns: dict[str, np.ndarray]
    record: dict[str, Any]

    def __len__(self) -> int:
        return len(self.images)


def read_bank(folder: Path) -> Bank:
    """Read and check a bank; UserError unless it is whole."""
    record = _read_record(folder)
    for name, key in ((BANK_IMAGES, "images_sha256"), (BANK_MANIFEST, "manifest_sha256")):
        if not (folder / name).is_file():
            raise UserError(f"banks: {folder} is not whole: it lacks {name}; {_HELPS}")
        if sha256_file(folder / name) != record.get(key):
            raise UserError(
                f"banks: {folder / name} is cut, or of another bank: its sha256 is not the {key} in {BANK_RECORD}"
            )
    columns = _read_manifest(folder / BANK_MANIFEST)
    images = _map_images(folder / BANK_IMAGES)
    items, shape, classes = (record.get(key) for key in ("items", "shape", "classes"))
    if not items:
        raise UserError(f"banks: {folder} is empty; {_HELPS}")
    for what, found in (("images", len(images)), ("rows of the manifest", len(columns["item"]))):
        if found != items:
            raise UserError(f"banks: expected {items} {what} in {folder}, as {BANK_RECORD} says; got {found}")
    if list(images.shape[1:]) != shape or images.dtype != torch.uint8:
        raise UserError(
            f"banks: expected uint8 images of shape {shape} in {folder}, as {BANK_RECORD} says; got "
            f"{images.dtype} of shape {list(images.shape[1:])}"
        )
    if not isinstance(classes, list) or not (columns["label"] < len(classes)).all() or (columns["label"] < 0).any():
        raise UserError(f"banks: expected classes of all labels in {folder / BANK_RECORD}, got {classes!r}")
    return Bank(folder, images, columns, record)


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / BANK_RECORD
    if not path.is_file():
        raise UserError(f"banks: expected the folder of a bank, with a {BANK_RECORD}; none in {folder}; {_HELPS}")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"banks: {path} is damaged ({error})") from error
    if not isinstance(record, dict):
        raise UserError(f"banks: {path} is no record of a bank")
    return record


def _read_manifest(path: Path) -> dict[str, np.ndarray]:
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    if tuple(header) != BANK_COLUMNS:
        raise UserError(f"banks: expected the columns {', '.join(BANK_COLUMNS)} in {path}, got {', '.join(header)}")
    values = list(zip(*rows, strict=True)) or [()] * len(BANK_COLUMNS)
    return {
        name: np.array(column, np.float64 if name == "score" else np.int64)
        for name, column in zip(BANK_COLUMNS, values, strict=True)
    }


def _map_images(path: Path) -> Tensor:
    tensors = read_safetensors(path, "banks")
    if "images" not in tensors:
        raise UserError(f"banks: expected images in {path}, which holds {sorted(tensors)}")
    return tensors["images"]


class BankDataModule(ImageDataModule):
    """Trains and validates on banks; real images are in `test` alone.

    Items are numbered through all banks, in their order. Originals are always kept; validation images are originals,
    and no variation of them is trained on.

    Args:
        banks: folders of banks: first the originals, then variations of them.
        keep: which variations are trained on: ``kept``: those that passed the filter; ``all``; ``random``: as many as
            ``kept``, drawn by `split_seed`.
        omega: smallest score ω that passes the filter, in place of what the manifest says.
        label: of a variation: ``inherit``: its source's; ``teacher``: what the teacher takes it for;
            ``drop_if_disagree``: its source's, and those that the teacher takes for another class are left out.
        items: number of originals that are used, with their variations, drawn by `split_seed`; all by default.
        instead: control in the place of banks, `items` images of class 0: ``noise``, uniform grey levels, or the name
            of another set of the catalogue, whose training images are brought to the shape of the real ones.
        val_fraction: share of the originals held out for validation, in [0, 1), by class.
        kwargs: of `ImageDataModule`; they say which real images test, and `split_seed` holds out of the bank.

    Attributes (after `setup`): as those of `ImageDataModule`; ``originals_sha256``, of the originals' images;
    ``made_from``, digest of the teacher that the originals were made from, None where it is not known.
    """

    #: No real image is trained or validated on.
    data_free = True
    originals_sha256: str | None = None
    made_from: str | None = None

    def __init__(
        self,
        banks: Sequence[str | Path] = (),
        keep: Keep = "kept",
        omega: FiniteFloat | None = None,
        label: Label = "inherit",
        items: PositiveInt | None = None,
        instead: str | None = None,
        val_fraction: Share = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            val_fraction=val_fraction,
            train_fraction=1.0,
            train_items=None,
            train_corruption=None,
            train_rest=False,
            **kwargs,
        )
        for name, given, known in (("keep", keep, get_args(Keep)), ("label", label, get_args(Label))):
            if given not in known:
                raise UserError(f"{name}: expected one of {', '.join(known)}, got {given!r}")
        if omega is not None and keep == "all":
            raise UserError(f"omega: expected none with keep: all, got {omega}")
        if items is not None and items < 1:
            raise UserError(f"items: expected at least 1, got {items}")
        if instead is not None:
            self._check_instead(instead, items)
        self.folders, self.keep, self.omega, self.label = [Path(bank) for bank in banks], keep, omega, label
        self.items, self.instead = items, instead
        self._banks: list[Bank] = []
        self._other: np.ndarray | None = None

    def _check_instead(self, instead: str, items: int | None) -> None:
        if instead == self.dataset:
            raise UserError(f"instead: expected noise or another set than {instead}, whose images may not be used")
        if instead != "noise" and describe(instead).by_path:
            raise UserError(f"instead: expected noise or a set that needs no path, got {instead}")
        if items is None:
            raise UserError(f"items: expected how many images of {instead} take the place of banks")

    def ensure_available(self) -> None:
        """Find and check banks, control and real test data; UserError for what is missing or damaged."""
        if not hasattr(self, "meta"):
            self._read_banks()
            self._load_instead(self.download)
        super().ensure_available()

    def _read_banks(self) -> None:
        """Read the banks once, and check that they belong together."""
        if self._banks or self.instead is not None:
            return
        if not self.folders:
            raise UserError(f"banks: expected the folders of banks, got none; {_HELPS}")
        first, *others = banks = [read_bank(folder) for folder in self.folders]
        if (first.columns["k"] != 0).any():
            raise UserError(f"banks: expected a bank of originals first; {first.folder} holds variations")
        for bank in others:
            if (bank.columns["k"] == 0).any():
                raise UserError(f"banks: expected variations after the first bank; {bank.folder} holds originals")
            if bank.record.get("source_sha256") != first.record["images_sha256"]:
                raise UserError(f"banks: {bank.folder} holds variations of another bank than {first.folder}")
        self._banks = banks

    def _load_instead(self, download: bool) -> None:
        """Find the set that stands in the place of banks, if there is one."""
        if self.instead not in (None, "noise") and self._other is None:
            self._other = sources.load(str(self.instead), self.root, download=download).train[0]

    def _training_splits(
        self, raw: Raw, classes: Sequence[int] | None, names: tuple[str, ...]
    ) -> tuple[ImageSplit, ImageSplit | None]:
        """Of banks, or of what stands in their place; the real training images are left alone."""
        if self.test_split.labels.ndim > 1:
            raise UserError(f"dataset: expected images of one class each, {self.dataset} has attributes")
        self._read_banks()
        shape = tuple(self.test_split.images.shape[1:])
        if self.instead is not None:
            assert self.items is not None
            parts = [self._images_instead(self.items, shape)]
            labels = np.zeros(self.items, np.int64)
            train, val = self._hold_out(labels, np.arange(self.items))
        else:
            for bank in self._banks:
                _check_fits(bank, shape, names, self.dataset)
            self.originals_sha256 = self._banks[0].record["images_sha256"]
            self.made_from = self._banks[0].record.get("teacher")
            parts = [bank.images for bank in self._banks]
            labels, train, val = self._choose()
        splits = [
            ImageSplit(_gather(parts, chosen), torch.from_numpy(labels[chosen]), torch.from_numpy(chosen))
            for chosen in (train, val)
        ]
        return splits[0], splits[1] if len(val) else None

    def _choose(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Labels of all items, and the numbers of those that are trained and validated on."""
        columns = {name: np.concatenate([bank.columns[name] for bank in self._banks]) for name in BANK_COLUMNS}
        originals = len(self._banks[0])
        if (self.items or 0) > originals:
            raise UserError(
                f"items: expected at most {originals}, the originals of {self.folders[0]}; got {self.items}"
            )
        train, val = self._hold_out(columns["label"], self._drawn("originals", np.arange(originals), self.items))
        varied, agrees = columns["k"] > 0, columns["teacher_label"] == columns["label"]
        passed = varied & (columns["kept"] == 1 if self.omega is None else columns["score"] >= self.omega)
        if varied.any() and not passed.any() and self.keep != "all":
            raise UserError(
                f"omega: expected at most {columns['score'][varied].max():.4g}, the highest score of a variation; "
                f"{'the filter' if self.omega is None else self.omega} keeps none"
            )
        candidates = varied & np.isin(columns["source"], train)
        if self.label == "drop_if_disagree":
            candidates &= agrees
        chosen = np.flatnonzero(candidates if self.keep == "all" else candidates & passed)
        if self.keep == "random":
            chosen = self._drawn("variations", np.flatnonzero(candidates), len(chosen))
        labels = np.where(varied & (self.label == "teacher"), columns["teacher_label"], columns["label"])
        return labels, np.concatenate([train, chosen]), val

    def _hold_out(self, labels: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The originals at `used` that are trained on, and those that are held out."""
        train, val = stratified_split(labels[used], self.val_fraction, 1.0, self.split_seed)
        if self.val_fraction and not len(val):
            raise UserError(f"val_fraction: {self.val_fraction} of {len(used):,} items leaves none for validation")
        return used[train], used[val]

    def _drawn(self, purpose: str, numbers: np.ndarray, count: int | None) -> np.ndarray:
        """`count` of `numbers`, sorted; all for None."""
        generator = np.random.Generator(np.random.PCG64(derived_seed(self.split_seed, purpose)))
        return np.sort(generator.permutation(numbers)[:count])

    def _images_instead(self, items: int, shape: tuple[int, ...]) -> Tensor:
        """(N, C, H, W) uint8 images of the control."""
        if self.instead == "noise":
            pieces = torch.arange(items).split(_PIECE)
            return torch.cat([counter.pixels(self.split_seed, piece, math.prod(shape)) for piece in pieces]).view(
                -1, *shape
            )
        self._load_instead(self.download and rank_and_world()[1] == 1)
        images, self._other = self._other, None
        assert images is not None
        if items > len(images):
            raise UserError(f"items: expected at most {len(images)}, the images of {self.instead}; got {items}")
        chosen = torch.from_numpy(images[self._drawn("images instead", np.arange(len(images)), items)])
        return resize(_with_channels(chosen, shape[0]), shape[1])

    def _describe(self, source: str, classes: tuple[str, ...]) -> ImageMeta:
        """Facts of what is trained on; the fingerprint also names the banks."""
        meta = super()._describe(f"{self._what()}; tests on {source}", classes)
        digests = [bank.record[key] for bank in self._banks for key in ("images_sha256", "manifest_sha256")]
        return replace(meta, fingerprint="+".join([meta.fingerprint, *digests]))

    def _what(self) -> str:
        if self.instead is not None:
            return f"{self.items:,} images of {self.instead}"
        first, *others = map(len, self._banks)
        used = int((self.train_split.origin >= first).sum())
        return f"a bank of {first:,}" + (f", {used:,} of {sum(others):,} variations" if others else "")


def _check_fits(bank: Bank, shape: tuple[int, ...], names: tuple[str, ...], dataset: str) -> None:
    """Raise UserError unless a bank has the shape and classes of the real images."""
    got = tuple(bank.images.shape[1:])
    if got != shape:
        raise UserError(f"banks: expected images of shape {shape}, as {dataset} has here; {bank.folder} has {got}")
    own = tuple(bank.record["classes"])
    if not same_classes(own, names):
        raise UserError(f"banks: expected the classes {names}, as {dataset} has here; {bank.folder} has {own}")


def _with_channels(images: Tensor, channels: int) -> Tensor:
    """uint8 (N, C, H, W) with another number of channels: grey repeated, or the mean of colours."""
    if images.shape[1] == 1:
        return images.repeat(1, channels, 1, 1)
    if images.shape[1] == channels:
        return images
    return torch.cat([piece.float().mean(1, keepdim=True).round_().byte() for piece in images.split(_PIECE)])


def _gather(parts: Sequence[Tensor], numbers: np.ndarray) -> Tensor:
    """The items at sorted numbers through all parts; a part that is all of it as it is, without a copy."""
    if len(parts) == 1 and len(numbers) == len(parts[0]):
        return parts[0]
    images = parts[0].new_empty(len(numbers), *parts[0].shape[1:])
    first = 0
    for part in parts:
        begin, end = np.searchsorted(numbers, (first, first + len(part)))
        torch.index_select(part, 0, torch.from_numpy(numbers[begin:end] - first), out=images[begin:end])
        first += len(part)
    return images
