"""Image sets that fit into memory: uint8 tensors, batches by one index, scaling and augmentation on the device."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.images import sources
from datamodules.images.catalog import CATALOG, describe
from datamodules.images.sources import Raw, Variant
from datamodules.images.splits import find_classes, stratified_split
from datamodules.loaders import PartLoaders, TrainLoader, rank_and_world, train_loader
from leanlight.contracts import ImageBatch, ImageMeta, ImageSplit, Split, UserError, nearest
from leanlight.contracts.ranges import PositiveInt, PositiveShare, Seed, Share
from leanlight.ops.augment import AUGMENTATIONS
from leanlight.ops.corruptions import Corruption


def resize(images: Tensor, size: int) -> Tensor:
    """Resize uint8 (N, C, H, W) to (N, C, size, size), bilinear with antialiasing, in pieces to bound memory."""
    if images.shape[-2:] == (size, size):
        return images
    most = max(1, min(4096, 2**26 // size**2))
    pieces = [
        F.interpolate(piece.float(), (size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255).byte()
        for piece in images.split(most)
    ]
    return torch.cat(pieces)


def _check_fits(images: Tensor, size: int) -> None:
    """Refuse a size at which the images alone would be more than the memory of the machine."""
    needed, there = len(images) * images.shape[1] * size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(
            f"image_size: {len(images):,} images of {size} x {size} pixels need {needed / 2**30:,.0f} GiB, this "
            f"machine has {there / 2**30:,.0f} GiB"
        )


def scaled(batch: ImageBatch) -> ImageBatch:
    """uint8 images as float32 in [0, 1]; float images as they are."""
    return replace(batch, image=batch.image.float().div_(255)) if batch.image.dtype == torch.uint8 else batch


def _members(labels: np.ndarray, classes: Sequence[int] | None) -> np.ndarray | None:
    """Positions of the items of some classes; None for all."""
    return None if classes is None else np.flatnonzero(np.isin(labels, classes))


class ImageDataModule(PartLoaders[ImageBatch], pl.LightningDataModule):
    """An image set of the catalogue, held in memory.

    Batches are `ImageBatch`: uint8 until they are on the device, there float32 in [0, 1], in training also augmented.
    The network owns mean and standard deviation. The splits themselves hold the images as they came.

    Args:
        dataset: name in ``leanlight data list``.
        root: folder of data sets; default the environment variable ``LEANLIGHT_DATA``, else ``data``.
        variant: ``full``, ``subset`` (packaged), or ``auto``: the best found.
        batch_size: training items a step and process.
        eval_batch_size: items a step and process elsewhere; default four times `batch_size`.
        val_fraction: share of train held out for validation, in [0, 1), by class; ignored where the source has its own.
            Of ``vtab`` and ``fgvc`` any share holds out the published validation items, and 0 trains on them, too.
        train_fraction: share of the remaining train that is used, in (0, 1], by class.
        split_seed: makes the hold-out; kept apart from `seed`, so that runs of several seeds share their split.
        seed: makes the order of training items; default the seed of ``seed_everything``, else 0.
        augment: one of ``flip``, ``crop``, ``shift``, ``flip_crop``; none by default.
        image_size: side of the square to which all images are resized once, at loading.
        drop_last: leave out the last, shorter training batch of an epoch.
        path: folder of data set ``image_folder``, ``vtab`` or ``fgvc``.
        download: whether missing files may be downloaded.
        predict_split: part that `predict` goes through: ``train``, ``val`` or ``test``; without augmentation, in order.
        train_items: number of training items that are used, in place of `train_fraction`: at least one a class, the
            rest in proportion; a larger number holds every item of a smaller one.
        classes: classes that are used, by number or name (of digits alone: by number); they become labels 0, 1, … in
            this order, in all parts. Parts hold the same items of them as without it.
        train_corruption: noise on training and validation images, the same in every epoch: of an item's place in the
            source's own part, not of what is held out. It comes before augmentation; test images stay clean.
        train_rest: train on what `train_fraction` leaves out: items that a run with the same fraction never saw.
        epoch_batches: batches of a training epoch on each process, in place of one pass over the items, which are
            gone through as often as that takes: runs on sets of different sizes then take equally many steps.

    Attributes (after `setup`): ``meta``; ``train_split``, ``val_split`` (None without one), ``test_split``.
    """

    meta: ImageMeta
    train_split: ImageSplit
    val_split: ImageSplit | None
    test_split: ImageSplit

    def __init__(
        self,
        dataset: str = "fashion_mnist",
        root: str | Path | None = None,
        variant: Variant = "auto",
        batch_size: PositiveInt = 128,
        eval_batch_size: PositiveInt | None = None,
        val_fraction: Share = 0.1,
        train_fraction: PositiveShare = 1.0,
        split_seed: Seed = 0,
        seed: Seed | None = None,
        augment: Literal["flip", "crop", "shift", "flip_crop"] | None = None,
        image_size: PositiveInt | None = None,
        drop_last: bool = False,
        path: str | Path | None = None,
        download: bool = True,
        predict_split: Split = "test",
        train_items: PositiveInt | None = None,
        classes: Sequence[int | str] | None = None,
        train_corruption: Corruption | None = None,
        train_rest: bool = False,
        epoch_batches: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        describe(dataset)
        for name, given, known in (
            ("variant", variant, get_args(Variant)),
            ("predict_split", predict_split, get_args(Split)),
        ):
            if given not in known:
                raise UserError(f"{name}: expected one of {', '.join(known)}, got {given!r}")
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "image_size": image_size}
        for name, value in {**sizes, "train_items": train_items, "epoch_batches": epoch_batches}.items():
            if value is not None and value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}")
        if not 0 <= val_fraction < 1:
            raise UserError(f"val_fraction: expected a number in [0, 1), got {val_fraction}")
        if not 0 < train_fraction <= 1:
            raise UserError(f"train_fraction: expected a number in (0, 1], got {train_fraction}")
        if train_items is not None and train_fraction < 1:
            raise UserError(f"train_items: expected none with train_fraction {train_fraction}; give one of them")
        if train_rest and train_fraction == 1:
            raise UserError("train_rest: expected false with train_fraction 1, which leaves nothing out")
        if augment is not None and augment not in AUGMENTATIONS:
            raise UserError(
                f"augment: expected one of {', '.join(AUGMENTATIONS)}, got {augment!r}{nearest(augment, AUGMENTATIONS)}"
            )
        if (path is None) == describe(dataset).by_path:
            named = ", ".join(name for name, info in CATALOG.items() if info.by_path)
            raise UserError(f"path: expected with dataset {named}, and there alone; got {path!r} with {dataset!r}")
        self.dataset, self.variant, self.path, self.download = dataset, variant, path, download
        self.root = Path(root or os.environ.get("LEANLIGHT_DATA") or "data")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or 4 * batch_size
        self.val_fraction, self.train_fraction, self.split_seed = val_fraction, train_fraction, split_seed
        self.seed, self.augment, self.image_size, self.drop_last = seed, augment, image_size, drop_last
        self.predict_split, self.train_items, self.classes = predict_split, train_items, classes
        self.train_corruption, self.train_rest, self.epoch_batches = train_corruption, train_rest, epoch_batches
        self._own_val = False
        self._numbers: dict[str, Tensor] = {}
        self._raw: Raw | None = None

    @property
    def step_shape(self) -> tuple[int, ...]:
        """(N, C, H, W) of a training batch, from the catalogue."""
        channels, *sides = describe(self.dataset).shape
        return (self.batch_size, channels, *([self.image_size] * 2 if self.image_size else sides))

    def ensure_available(self) -> None:
        """Find and check the data, downloading if need be; UserError with every place tried. Starts no run."""
        self._load(self.download)

    def prepare_data(self) -> None:
        """The same; Lightning calls this on one process a node, before `setup`."""
        self.ensure_available()

    def _load(self, download: bool) -> None:
        if self._raw is None and not hasattr(self, "meta"):
            self._raw = sources.load(self.dataset, self.root, self.variant, download, self.path, self.image_size)

    def setup(self, stage: str | None = None) -> None:
        """Build the three splits and `meta`, once."""
        if hasattr(self, "meta"):
            return
        self._load(self.download and rank_and_world()[1] == 1)  # of several processes only `prepare_data`'s downloads
        raw, self._raw = self._raw, None  # the splits hold copies: the source's arrays may go
        assert raw is not None
        chosen = None
        if self.classes is not None:
            if raw.train[1].ndim > 1:
                raise UserError(f"classes: expected none, since {self.dataset} has attributes instead")
            chosen = find_classes(self.classes, raw.classes)
        names = raw.classes if chosen is None else tuple(raw.classes[label] for label in chosen)
        self.test_split = self._split(raw.test, _members(raw.test[1], chosen), chosen)
        self.train_split, self.val_split = self._training_splits(raw, chosen, names)
        self.meta = self._describe(raw.source, names)

    def _training_splits(
        self, raw: Raw, classes: Sequence[int] | None, names: tuple[str, ...]
    ) -> tuple[ImageSplit, ImageSplit | None]:
        """What is trained and validated on; ``test_split`` is there. names: of the classes that are used."""
        train, val = self._positions(raw, classes)
        val_split = self._split(raw.train, val, classes) if len(val) else None
        if raw.val is not None:
            val_split = self._split(raw.val, _members(raw.val[1], classes), classes)
            self._own_val = True
        return self._split(raw.train, train, classes), val_split

    def _positions(self, raw: Raw, classes: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
        """Where the training items, and the validation items held out of them, stand in the source's training part."""
        labels, fraction = raw.train[1], self.val_fraction if raw.val is None else 0.0
        rest, published = np.arange(len(labels)), raw.held_out if fraction else None
        if published is not None:
            rest = np.setdiff1d(rest, published)
        train, val = stratified_split(
            labels[rest],
            fraction if published is None else 0.0,
            self.train_fraction,
            self.split_seed,
            self.train_items,
            classes,
            self.train_rest,
        )
        if published is not None:
            members = _members(labels[published], classes)
            val = published if members is None else published[members]
        if fraction and not len(val):
            raise UserError(f"val_fraction: {fraction} of {len(labels):,} items leaves none for validation")
        return rest[train], val

    def _split(self, part: sources.Part, index: np.ndarray | None, classes: Sequence[int] | None) -> ImageSplit:
        images, labels = (torch.from_numpy(np.require(array, requirements="W")) for array in part)
        origin = torch.arange(len(images)) if index is None else torch.from_numpy(index)
        if index is not None and len(index) < len(images):
            images, labels = images[origin], labels[origin]
        if labels.ndim > 1:
            labels = labels.float()
        if classes is not None:
            labels = torch.tensor(classes).argsort()[torch.searchsorted(torch.tensor(sorted(classes)), labels)]
        if self.image_size:
            _check_fits(images, self.image_size)
            images = resize(images, self.image_size)
        return ImageSplit(images, labels, origin)

    def _describe(self, source: str, classes: tuple[str, ...]) -> ImageMeta:
        splits = {"train": self.train_split, "val": self.val_split, "test": self.test_split}
        digest = hashlib.sha256()
        for name, split in splits.items():
            if split is not None:
                digest.update(f"{name} {tuple(split.images.shape)}".encode())
                digest.update(split.images.numpy().data)
                digest.update(split.labels.numpy().data)
        labels = self.train_split.labels
        channels, height, width = self.train_split.images.shape[1:]
        counts = labels.sum(0).long() if labels.ndim > 1 else torch.bincount(labels, minlength=len(classes))
        return ImageMeta(
            name=self.dataset,
            source=source,
            num_classes=len(classes),
            shape=(channels, height, width),
            classes=classes,
            counts={name: len(split) if split is not None else 0 for name, split in splits.items()},
            class_counts=tuple(counts.tolist()),
            fingerprint=digest.hexdigest(),
        )

    def train_dataloader(self) -> TrainLoader[ImageBatch]:
        """Shuffled batches of train, stateful; in the set's own order when Lightning overfits a few batches."""
        split = self.train_split
        return train_loader(
            self, len(split), split.batches, self.batch_size, self.seed, self.drop_last, self.epoch_batches
        )

    def origin(self, split: Split) -> Tensor:
        """(N,) int64 position of each item of a part in the source's own train, validation or test part."""
        return self._part(split).origin

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Scale to [0, 1] on the device, with the noise of `train_corruption`; augment in training."""
        batch = self.as_seen(batch, self._part_at_work())
        if self.augment is None or self.trainer is None or not self.trainer.training:
            return batch
        return replace(batch, image=AUGMENTATIONS[self.augment](batch.image, None))

    def as_seen(self, batch: ImageBatch, split: Split) -> ImageBatch:
        """Items of a part as a network sees them but for augmentation: float32 in [0, 1], with noise if there is any.

        Args:
            batch: of that part, by its positions; on any device.
            split: the part.
        """
        batch = scaled(batch)
        if self.train_corruption is None or split == "test":
            return batch
        numbers = self._noise_numbers(split, batch.index.device)
        return replace(batch, image=self.train_corruption(batch.image, numbers[batch.index]))

    def _noise_numbers(self, split: Split, device: torch.device) -> Tensor:
        """(N,) number of each item, by which its noise is made; kept on the device."""
        if split not in self._numbers:
            origin = self._part(split).origin
            # Items of a validation part of its own lie below 0: none shares the noise of a training item.
            self._numbers[split] = -1 - origin if split == "val" and self._own_val else origin
        numbers = self._numbers[split] = self._numbers[split].to(device)
        return numbers

    def _part_at_work(self) -> Split:
        """The part whose batches the Trainer goes through; test without a Trainer."""
        if self.trainer is None or self.trainer.testing:
            return "test"
        if self.trainer.predicting:
            return self.predict_split
        return "train" if self.trainer.training else "val"
