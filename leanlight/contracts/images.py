"""Labelled images: their batch, their facts, and what a DataModule of images offers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from leanlight.contracts.batch import Batch
from leanlight.contracts.meta import DataMeta
from leanlight.contracts.protocols import Split


@dataclass(frozen=True)
class ImageBatch(Batch):
    """Images with labels.

    Args:
        image: (N, C, H, W) float32 in [0, 1]; uint8 in [0, 255] only before the transfer to the device.
        label: (N,) int64 class, or (N, K) float32 soft labels.
        index: (N,) int64 position of each item in its split.
        weight: (N,) float32 factor of each item's loss in training; None: all alike.
    """

    image: Tensor
    label: Tensor
    index: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class NoiseBatch(Batch):
    """What images are to be made from.

    Args:
        latent: (N, Z) float32 standard normal.
        label: (N,) int64 class that each image shall show.
        index: (N,) int64 number of each image.
    """

    latent: Tensor
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


def same_classes(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two lists of label names mean the same classes: plain numbers stand for names that only files know."""
    numbers = tuple(map(str, range(len(one))))
    return tuple(one) == tuple(other) or (len(one) == len(other) and numbers in (tuple(one), tuple(other)))


@dataclass(frozen=True)
class ImageSplit:
    """One part of a set that is held in memory.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64 classes or (N, K) float32 attributes.
        origin: (N,) int64 position of each item in the source's own train, validation or test part.
        weight: (N,) float32 factor of each item's loss in training; None: all alike.
    """

    images: Tensor
    labels: Tensor
    origin: Tensor
    weight: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: Tensor) -> ImageBatch:
        """The items at `index` (int64 positions), images still uint8."""
        weight = None if self.weight is None else self.weight.index_select(0, index)
        return ImageBatch(self.images.index_select(0, index), self.labels.index_select(0, index), index, weight)

    def batches(self, blocks: Iterable[Tensor]) -> Iterator[ImageBatch]:
        """One batch for every block of positions."""
        return map(self.batch, blocks)


@runtime_checkable
class ImageData(Protocol):
    """A DataModule of labelled images, in memory or streamed: batches are `ImageBatch`."""

    meta: ImageMeta


@runtime_checkable
class TracedImages(Protocol):
    """A DataModule that knows where each of its items stands in the source."""

    #: The part that `predict` goes through.
    predict_split: Split

    def origin(self, split: Split) -> Tensor:
        """(N,) int64 position of each item of a part in the source's own train, validation or test part."""


def predicted_origin(module: Any, index: Tensor) -> dict[str, Tensor]:
    """``origin`` of predicted items, for what `predict_step` returns; nothing where the data does not know it.

    Args:
        module: the LightningModule that predicts.
        index: (N,) int64 positions in the predicted part.
    """
    data = module.trainer.datamodule
    if not isinstance(data, TracedImages):
        return {}
    origin = data.origin(data.predict_split)
    return {"origin": origin[index.to(origin.device)]}


@runtime_checkable
class InMemoryImages(ImageData, Protocol):
    """A DataModule of labelled images that holds its splits in memory; `val_split` is None without validation data."""

    train_split: ImageSplit
    val_split: ImageSplit | None
    test_split: ImageSplit
