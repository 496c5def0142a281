"""What travels from a DataModule to a LightningModule: frozen, documented, movable to a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Base of all batches. Lightning moves it through `to`; `len` is the number of items; `select` takes items.

    What a field may hold decides what happens to it:

    - a tensor whose first dimension is the item, or another batch: moved, and selected by item;
    - a tuple with one entry an item, tensors of different lengths (a ragged field) or strings: its tensors are moved,
      its entries selected;
    - a mapping of names to any of these: each value alike;
    - a number, a flag or None: a fact of the whole batch, kept as it is.

    Anything else, a single string or a list among them, is refused with a TypeError when the batch is moved or
    selected.
    """

    def _map(self, each: Callable[[Any], Any]) -> Self:
        return replace(self, **{field.name: each(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Move every tensor to `device`."""
        return self._map(lambda value: _tensors(value, lambda x: x.to(device, non_blocking=non_blocking)))

    def pin_memory(self) -> Self:
        """Page-lock every tensor, for asynchronous copies to a GPU."""
        return self._map(lambda value: _tensors(value, lambda x: x.pin_memory()))

    def select(self, index: Tensor) -> Self:
        """Take the items at `index`: int64 positions or a boolean mask, (N,)."""
        return self._map(lambda value: _select(value, index))

    def __len__(self) -> int:
        for field in fields(self):
            if (size := _items(getattr(self, field.name))) is not None:
                return size
        return 0


def _tensors(value: Any, move: Callable[[Any], Any]) -> Any:
    """Apply `move` to every tensor and batch inside a field."""
    if isinstance(value, (Tensor, Batch)):
        return move(value)
    if isinstance(value, tuple):
        return tuple(item if isinstance(item, str) else _tensors(item, move) for item in value)
    if isinstance(value, Mapping):
        return {name: _tensors(item, move) for name, item in value.items()}
    return _fact(value)


def _select(value: Any, index: Tensor) -> Any:
    """Take items of a field."""
    if isinstance(value, Batch):
        return value.select(index)
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    if isinstance(value, tuple):
        positions = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        return tuple(value[position] for position in positions.tolist())
    if isinstance(value, Mapping):
        return {name: _select(item, index) for name, item in value.items()}
    return _fact(value)


def _items(value: Any) -> int | None:
    """Number of items of a field; None for a fact of the whole batch."""
    if isinstance(value, (Tensor, Batch, tuple)):
        return len(value)
    if isinstance(value, Mapping):
        return next((size for item in value.values() if (size := _items(item)) is not None), None)
    return None


def _fact(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise TypeError(
        f"a batch holds tensors, batches, tuples with one entry an item, mappings of these, numbers and None; "
        f"got a {type(value).__name__}"
    )
