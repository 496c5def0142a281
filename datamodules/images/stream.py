"""Folders of pictures too large for memory: decoded and cropped by worker processes, as uint8 until on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from datamodules.images import formats
from datamodules.images.module import scaled
from datamodules.images.splits import stratified_split
from datamodules.loaders import EvalLoader, TrainLoader, rank_and_world, train_loader
from leanlight.contracts import ImageBatch, ImageMeta, Split, UserError, isolated_rng
from leanlight.contracts.ranges import NonNegativeInt, PositiveInt, PositiveShare, Seed, Share


class StreamSplit(NamedTuple):
    """One part of a streamed folder.

    Args:
        paths: of the pictures.
        labels: (N,) int64 classes.
        origin: (N,) int64 position of each picture among those of its folder, in sorted order.
        weight: (N,) float32 factor of each item's loss in training; None: all alike.
    """

    paths: list[Path]
    labels: Tensor
    origin: Tensor
    weight: Tensor | None = None


class PictureFiles(Dataset[ImageBatch]):
    """Pictures by position; an item is a batch of one, uint8 (1, 3, S, S).

    Args:
        split: which pictures.
        transform: from a PIL picture to uint8 (3, S, S).
        seed: the random crop and flip of an item are a function of it and of the position; None where there are none.
    """

    def __init__(self, split: StreamSplit, transform: v2.Transform, seed: str | None) -> None:
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self) -> int:
        return len(self.split.paths)

    def __getitem__(self, index: int) -> ImageBatch:
        digest = hashlib.sha256(f"{self.seed}/{index}".encode()).digest()
        with formats.open_picture(self.split.paths[index]) as picture, isolated_rng(int.from_bytes(digest[:4], "big")):
            image = self.transform(picture)
        item = slice(index, index + 1)
        weight = None if self.split.weight is None else self.split.weight[item]
        return ImageBatch(image[None], self.split.labels[item], torch.tensor([index]), weight)


def collate(items: list[ImageBatch]) -> ImageBatch:
    """Join batches of one."""
    image, label, index = (torch.cat([getattr(item, name) for item in items]) for name in ("image", "label", "index"))
    weight = [item.weight for item in items if item.weight is not None]
    return ImageBatch(image, label, index, torch.cat(weight) if weight else None)


class ImageFolderStream(pl.LightningDataModule):
    """ImageNet-scale folders: ``path/train/<class>/…`` and ``path/val/<class>/…`` (or ``test``), read by workers.

    The part beside train is the test part; validation is held out of train. Of a folder with nothing but class
    subfolders every tenth picture of a class makes the test part. The train order is stateful and, like the random
    crops, a pure function of (seed, epoch).

    Args:
        path: the folder.
        image_size: side S of the crops in pixels; evaluation resizes the shorter side to S * 8 / 7 first.
        batch_size: training items a step and process.
        eval_batch_size: items a step and process elsewhere; default `batch_size`.
        num_workers: processes that decode pictures, on each rank; 0 decodes in the main process.
        val_fraction: share of train held out for validation, in (0, 1), by class.
        split_seed: makes the hold-out; kept apart from `seed`, so that runs of several seeds share their split.
        seed: makes the order and the crops of training items; default the seed of ``seed_everything``, else 0.
        drop_last: leave out the last, shorter training batch of an epoch.
        min_scale: smallest share of a picture's area that a training crop takes, in (0, 1].
        predict_split: part that `predict` goes through: ``train``, ``val`` or ``test``; centre crops, in order.

    Attributes (after `setup`): ``meta``; ``splits``, ``train``, ``val`` and ``test``.
    """

    meta: ImageMeta
    splits: dict[str, StreamSplit]

    def __init__(
        self,
        path: str | Path,
        image_size: PositiveInt = 224,
        batch_size: PositiveInt = 64,
        eval_batch_size: PositiveInt | None = None,
        num_workers: NonNegativeInt = 4,
        val_fraction: Share = 0.01,
        split_seed: Seed = 0,
        seed: Seed | None = None,
        drop_last: bool = True,
        min_scale: PositiveShare = 0.08,
        predict_split: Split = "test",
    ) -> None:
        super().__init__()
        for name, good, expected, given in (
            ("image_size", image_size >= 1, "at least 1", image_size),
            ("batch_size", batch_size >= 1, "at least 1", batch_size),
            ("eval_batch_size", eval_batch_size is None or eval_batch_size >= 1, "at least 1", eval_batch_size),
            ("num_workers", num_workers >= 0, "at least 0", num_workers),
            ("val_fraction", 0 < val_fraction < 1, "a number in (0, 1)", val_fraction),
            ("min_scale", 0 < min_scale <= 1, "a number in (0, 1]", min_scale),
            ("predict_split", predict_split in get_args(Split), "train, val or test", predict_split),
        ):
            if not good:
                raise UserError(f"{name}: expected {expected}, got {given}")
        self.path, self.image_size, self.num_workers, self.min_scale = Path(path), image_size, num_workers, min_scale
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or batch_size
        self.val_fraction, self.split_seed, self.seed, self.drop_last = val_fraction, split_seed, seed, drop_last
        self.predict_split = predict_split
        self._predicted: Tensor | None = None

    def ensure_available(self) -> None:
        """List the files; UserError unless the folder holds a training and a test part."""
        formats.folder_parts(self.path)

    def setup(self, stage: str | None = None) -> None:
        """List the files, make the splits and `meta`, once. Pictures are not opened."""
        if hasattr(self, "meta"):
            return
        classes, parts = formats.folder_parts(self.path)
        (paths, labels), (test_paths, test_labels) = parts["train"], parts["test"]
        train, val = stratified_split(labels, self.val_fraction, 1.0, self.split_seed)
        if not len(val):
            raise UserError(f"val_fraction: {self.val_fraction} of {len(paths):,} items leaves none for validation")
        self.splits = {
            "train": _split(paths, labels, train),
            "val": _split(paths, labels, val),
            "test": _split(test_paths, test_labels, np.arange(len(test_paths))),
        }
        digest = hashlib.sha256()
        for name, split in self.splits.items():
            lines = (f"{path.relative_to(self.path)} {path.stat().st_size}" for path in split.paths)
            digest.update("\n".join([name, *lines]).encode())
        self.meta = ImageMeta(
            name="image_folder",
            source=str(self.path),
            num_classes=len(classes),
            shape=(3, self.image_size, self.image_size),
            classes=classes,
            counts={name: len(split.paths) for name, split in self.splits.items()},
            class_counts=tuple(np.bincount(labels[train], minlength=len(classes)).tolist()),
            fingerprint=digest.hexdigest(),
        )

    def _fetch(self, blocks: Iterable[Tensor], name: str, transform: v2.Transform, seed: str | None) -> Iterator[Any]:
        loader = DataLoader(
            PictureFiles(self.splits[name], transform, seed),
            batch_sampler=[block.tolist() for block in blocks],
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)

    def train_dataloader(self) -> TrainLoader[ImageBatch]:
        """Random crops and flips in shuffled order, stateful."""
        crop = v2.RandomResizedCrop(self.image_size, (self.min_scale, 1.0), antialias=True)
        transform = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
        size = len(self.splits["train"].paths)

        def fetch(blocks: Iterable[Tensor]) -> Iterator[Any]:
            order = loader.sampler  # asked when the epoch begins: Lightning sets it after the loader is made
            return self._fetch(blocks, "train", transform, f"{order.seed}/{order.epoch}")

        loader = train_loader(self, size, fetch, self.batch_size, self.seed, self.drop_last)
        return loader

    def _eval_loader(self, name: str, done: Tensor | None = None) -> EvalLoader[ImageBatch]:
        resize = v2.Resize(round(self.image_size * 8 / 7), antialias=True)
        transform = v2.Compose([resize, v2.CenterCrop(self.image_size), v2.PILToTensor()])
        fetch = partial(self._fetch, name=name, transform=transform, seed=None)
        return EvalLoader(len(self.splits[name].paths), self.eval_batch_size, fetch, *rank_and_world(), done)

    def val_dataloader(self) -> EvalLoader[ImageBatch]:
        """Centre crops of the held-out items."""
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader[ImageBatch]:
        """Centre crops of the test part."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> EvalLoader[ImageBatch]:
        """Centre crops of the part `predict_split`, without the items of `skip_predicted`."""
        return self._eval_loader(self.predict_split, self._predicted)

    def origin(self, split: Split) -> Tensor:
        """(N,) int64 position of each item of a part among the pictures of its folder, in sorted order."""
        return self.splits[split].origin

    def skip_predicted(self, index: Tensor) -> None:
        """Leave the items at these positions of `predict_split`, (N,) int64, out of predict loaders."""
        self._predicted = index

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Scale to [0, 1] on the device."""
        return scaled(batch)


def _split(paths: list[Path], labels: np.ndarray, index: np.ndarray) -> StreamSplit:
    return StreamSplit([paths[i] for i in index], torch.from_numpy(labels[index]), torch.from_numpy(index))
