"""The same random numbers on every device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

_CPU = torch.device("cpu")
_FUNCTIONS: tuple[str, ...] = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like")
_FUNCTIONS += ("bernoulli", "normal", "multinomial", "poisson")
_DROPOUT = ("dropout", "dropout1d", "dropout2d", "dropout3d")
_METHODS = ("bernoulli", "multinomial", "bernoulli_", "normal_", "uniform_", "random_", "exponential_")  # _: in place


@contextmanager
def draws_of_the_cpu() -> Iterator[None]:
    """Inside, what is drawn on any device is drawn on the CPU and copied there.

    So a run on a GPU sees the random numbers of the run on the CPU, and what differs is arithmetic alone. A generator
    on another device stands for one on the CPU with the same seed; setting its state is not followed. What PyTorch
    draws by itself, without a call of one of these functions, is not seen: a dispatch mode would see it, and make each
    operation several times as slow.
    """
    twins, undo = _Twins(), []
    for owner, names in ((torch, _FUNCTIONS), (F, _DROPOUT), (Tensor, _METHODS)):
        for name in names:
            function, own = getattr(owner, name), name in vars(owner)
            setattr(owner, name, _drawn(function, twins, in_place=name.endswith("_")))
            # Tensor inherits its methods: there nothing is put back.
            undo.append((setattr, owner, name, function) if own else (delattr, owner, name))
    try:
        yield
    finally:
        for how, *arguments in undo:
            how(*arguments)


class _Twins:
    """CPU generators that stand for those of other devices."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[torch.Generator, tuple[int, torch.Generator]] = WeakKeyDictionary()

    def here(self, value: Any) -> Any:
        """A tensor or generator on the CPU; anything else as it is."""
        if isinstance(value, Tensor):
            return value.cpu()
        if not isinstance(value, torch.Generator) or value.device == _CPU:
            return value
        seed, twin = self._of.get(value, (None, None))
        if twin is None or seed != value.initial_seed():
            twin = torch.Generator().manual_seed(value.initial_seed())
            self._of[value] = value.initial_seed(), twin
        return twin


def _drawn(function: Callable[..., Any], twins: _Twins, in_place: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Any:
        device = _device(args, kwargs)
        if device == _CPU:
            return function(*args, **kwargs)
        moved = {**tree_map(twins.here, kwargs), **({"device": _CPU} if kwargs.get("device") is not None else {})}
        drawn = function(*tree_map(twins.here, args), **moved)
        return args[0].copy_(drawn) if in_place else tree_map_only(Tensor, lambda value: value.to(device), drawn)

    return draw


def _device(args: Any, kwargs: Any) -> torch.device:
    """Where a call draws."""
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    tensor = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)), None)
    return torch.get_default_device() if tensor is None else tensor.device
