"""Batches of like lengths: what is padded costs as much as what is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from datamodules.loaders import TrainOrder
from leanlight.contracts import derived_seed


class LengthOrder(TrainOrder):
    """A `TrainOrder` whose global batches hold items of like lengths.

    The random order of an epoch is cut into windows; each is sorted by length and cut into batches, and the batches of
    all windows are shuffled. So a batch's neighbours in length are others in every epoch. What is left over for the
    last, shorter batch stays where it is, unsorted. Not shuffled, it is the split's own order.

    Args:
        lengths: (size,) int64 of the items.
        order: arguments of `TrainOrder`.
        window: global batches that are sorted together.
    """

    def __init__(self, lengths: Tensor, *order: Any, window: int) -> None:
        super().__init__(*order)
        self.lengths, self.window = lengths, window

    def indices(self, replica: int = 0) -> Tensor:
        """(size,) int64, the order of the present epoch over all ranks; longer where it has a number of batches."""
        order = super().indices(replica)
        if not self.shuffle:
            return order
        batches = len(order) // self.global_batch
        whole, rest = order.split([batches * self.global_batch, len(order) - batches * self.global_batch])
        windows = whole.split(self.window * self.global_batch)
        by_length = torch.cat([window[self.lengths[window].argsort(stable=True)] for window in windows])
        generator = torch.Generator().manual_seed(derived_seed(self.seed + replica, self.epoch, "batches"))
        shuffled = by_length.view(batches, self.global_batch)[torch.randperm(batches, generator=generator)]
        return torch.cat([shuffled.flatten(), rest])
