"""Prediction that can be killed: what the writer of predictions asks of a DataModule, and items seen once."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class ResumablePrediction(Protocol):
    """A DataModule that goes through a named part of its data in prediction, and can leave items of it out."""

    #: The part, ``train``, ``val`` or ``test``.
    predict_split: str

    def skip_predicted(self, index: Tensor) -> None:
        """Leave the items at these positions of the part, (N,) int64, out of predict loaders made from now on."""


class SeenItems:
    """Which positions of a part have been met so far; a byte an item."""

    def __init__(self) -> None:
        self._seen = torch.zeros(0, dtype=torch.bool)

    def add(self, index: Tensor) -> Tensor:
        """Meet the items at `index` (N,) int64, all different; return (N,) bool, which of them are new."""
        if missing := max(0, int(index.max()) + 1 - len(self._seen)) if len(index) else 0:
            # At least doubled, so that growing costs little in all.
            self._seen = torch.cat([self._seen, self._seen.new_zeros(max(missing, len(self._seen)))])
        new = ~self._seen[index]
        self._seen[index] = True
        return new

    def __len__(self) -> int:
        return int(self._seen.sum())
