"""Counts calls that may hold up the host for an accelerator: on a CPU they are cheap, but they are the same calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"}


class Waits(TorchFunctionMode):
    """Counts, in its context, reads of numbers, copies between devices and tensors made on a device, by `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        copies = name == "to" and not (len(args) == 2 and isinstance(args[1], torch.dtype))
        if name in _READS or copies or (func is torch.tensor and kwargs.get("device") is not None):
            self.calls[name] += 1
        return func(*args, **kwargs)


def waits(function: Callable[..., Any], *args: Any) -> int:
    """How often `function` of `args` would wait."""
    with Waits() as seen:
        function(*args)
    return seen.calls.total()
