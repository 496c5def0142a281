"""What travels from a DataModule to a LightningModule: frozen, documented, movable to a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

_TAKEN_AT_ONCE = 2**16  # bytes of a copy to a GPU for which CUDA never makes the host wait (its programming guide)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`, without waiting for what an accelerator still has to do.

    A blocking copy waits until all work queued before it has been done, and so may a non-blocking one from ordinary
    memory, unless it is small. So larger tensors go through torch's cache of page-locked memory, which keeps a piece
    until its copy has ended. Copies to the CPU block: their numbers are read right away.

    Args:
        x: a tensor on any device.
        device: where to.
    """
    kind = torch.device(device).type
    if x.device.type != "cpu" or kind in ("cpu", "mps"):  # on MPS non-blocking copies are not safe
        return x.to(device)
    if kind == "cuda" and x.numel() * x.element_size() > _TAKEN_AT_ONCE:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def on_host(values: Mapping[str, Tensor | float]) -> dict[str, Tensor]:
    """`values` with numbers as tensors on the CPU: a number itself Lightning copies to the device, and waits for it."""
    return {name: value if isinstance(value, Tensor) else torch.tensor(float(value)) for name, value in values.items()}


@dataclass(frozen=True)
class Batch:
    """Base of all batches. Lightning moves it through `to`; `len` is the number of items; `select` takes items.

    What a field may hold decides what happens to it:

    - a tensor whose first dimension is the item, or another batch: moved, and selected by item;
    - a tuple with one entry an item, tensors of different lengths (a ragged field) or strings: its tensors are moved,
      its entries selected;
    - a mapping of names to any of these: each value alike;
    - a number, a flag or None: a fact of the whole batch, kept as it is.

    A batch with anything else in a field (a single string or a list among them), or with fields of different numbers
    of items, cannot be made: TypeError and ValueError name the field.
    """

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for field in fields(self):
            _check(f"{type(self).__name__}.{field.name}", getattr(self, field.name), sizes)
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"the fields of a batch have one entry an item; got items: {found}")

    def _map(self, each: Callable[[Any], Any]) -> Self:
        return replace(self, **{field.name: each(getattr(self, field.name)) for field in fields(self)})

    def to(self, device: torch.device | str) -> Self:
        """Move every tensor to `device`, as `to_device` does."""
        return self._map(
            lambda value: _tensors(value, lambda x: to_device(x, device) if isinstance(x, Tensor) else x.to(device))
        )

    def pin_memory(self) -> Self:
        """Page-lock every tensor, for asynchronous copies to a GPU."""
        return self._map(lambda value: _tensors(value, lambda x: x.pin_memory()))

    def select(self, index: Tensor) -> Self:
        """Take the items at `index`: int64 positions or a boolean mask, (N,)."""
        if index.dtype == torch.bool:
            if len(index) != len(self):
                raise IndexError(f"a mask of {len(index)} entries cannot select from {len(self)} items")
            index = index.nonzero()[:, 0]
        index = index.long() if index.numel() == 0 else index  # torch.tensor([]) is float32
        return self._map(lambda value: _select(value, index))

    def __len__(self) -> int:
        sizes: dict[str, int] = {}
        for field in fields(self):
            _check(field.name, getattr(self, field.name), sizes)
            if sizes:
                return next(iter(sizes.values()))
        return 0


def _check(name: str, value: Any, sizes: dict[str, int]) -> None:
    """Note in `sizes` how many items a field has; nothing for a fact of the whole batch."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check(f"{name}[{key!r}]", item, sizes)
    elif isinstance(value, (Batch, tuple)) or (isinstance(value, Tensor) and value.ndim):
        sizes[name] = len(value)
        for entry in value if isinstance(value, tuple) else ():
            _check_entry(name, entry)
    else:
        _check_fact(name, value)


def _check_entry(name: str, value: Any) -> None:
    """What belongs to one item may also be a string, and its tuples and mappings may have any length."""
    if isinstance(value, (tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            _check_entry(name, item)
    elif not isinstance(value, (Tensor, Batch, str)):
        _check_fact(name, value)


def _check_fact(name: str, value: Any) -> None:
    if value is None or isinstance(value, (bool, int, float)):
        return
    what = "tensor without dimensions" if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(
        f"{name}: a batch holds tensors, batches, tuples with one entry an item, mappings of these, numbers and None; "
        f"got a {what}"
    )


def _tensors(value: Any, move: Callable[[Any], Any]) -> Any:
    """Apply `move` to every tensor and batch inside a field."""
    if isinstance(value, (Tensor, Batch)):
        return move(value)
    if isinstance(value, tuple):
        return tuple(_tensors(item, move) for item in value)
    if isinstance(value, Mapping):
        return {name: _tensors(item, move) for name, item in value.items()}
    return value


def _select(value: Any, index: Tensor) -> Any:
    """Take the items at int64 positions of a field."""
    if isinstance(value, Batch):
        return value.select(index)
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    if isinstance(value, tuple):
        return tuple(value[position] for position in index.tolist())
    if isinstance(value, Mapping):
        return {name: _select(item, index) for name, item in value.items()}
    return value
