"""Labelled images: their batch, their facts, and what a DataModule of images offers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from leanlight.contracts.batch import Batch
from leanlight.contracts.meta import DataMeta


@dataclass(frozen=True)
class ImageBatch(Batch):
    """Images with labels.

    Args:
        image: (N, C, H, W) float32 in [0, 1]; uint8 in [0, 255] only before the transfer to the device.
        label: (N,) int64 class, or (N, K) float32 soft labels.
        index: (N,) int64 position of each item in its split.
    """

    image: Tensor
    label: Tensor
    index: Tensor


@dataclass(frozen=True, kw_only=True)
class ImageMeta(DataMeta):
    """Facts of a set of labelled images.

    Args:
        num_classes: number of labels K.
        shape: (C, H, W) of one image.
        classes: label names; index = label.
        class_counts: items of each class in the training split.
    """

    num_classes: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    class_counts: tuple[int, ...]


@dataclass(frozen=True)
class ImageSplit:
    """One part of a set that is held in memory.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64 classes or (N, K) float32 attributes.
        origin: (N,) int64 position of each item in the source's own train, validation or test part.
    """

    images: Tensor
    labels: Tensor
    origin: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor) -> ImageBatch:
        """The items at `index` (int64 positions), images still uint8."""
        return ImageBatch(self.images.index_select(0, index), self.labels.index_select(0, index), index)

    def batches(self, blocks: Iterable[Tensor]) -> Iterator[ImageBatch]:
        """One batch for every block of positions."""
        return map(self.batch, blocks)


@runtime_checkable
class ImageData(Protocol):
    """A DataModule of labelled images, in memory or streamed: batches are `ImageBatch`."""

    meta: ImageMeta


@runtime_checkable
class InMemoryImages(ImageData, Protocol):
    """A DataModule of labelled images that holds its splits in memory; `val_split` is None without validation data."""

    train_split: ImageSplit
    val_split: ImageSplit | None
    test_split: ImageSplit
