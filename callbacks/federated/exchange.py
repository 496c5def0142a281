"""A weighted mean of states that lie on several processes, by one collective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leanlight.contracts.federated import State


def mean_over_processes(
    states: Sequence[tuple[State, float]], like: Mapping[str, Tensor], reduce: Callable[..., Any]
) -> State:
    """The weighted mean of the states of all processes, by name; integers (counters) take the largest value.

    Floating point numbers travel as one vector, and so do integers, where there are any.

    Args:
        states: of this process, each with its weight; maybe none. The weights of all processes sum to 1.
        like: a state of the same names and shapes, on the device to compute on.
        reduce: a strategy's ``reduce``, of (tensor, reduce_op).
    """
    floats = [name for name, value in like.items() if value.is_floating_point()]
    integers = [name for name in like if name not in floats]
    total = [torch.zeros_like(like[name]) for name in floats]
    for state, weight in states:
        torch._foreach_add_(total, [state[name].to(like[name].device) for name in floats], alpha=weight)
    mean = _reduced(dict(zip(floats, total, strict=True)), reduce, "sum")
    if integers:
        none = {name: torch.full_like(like[name], torch.iinfo(like[name].dtype).min) for name in integers}
        counters = [none, *(state for state, _ in states)]
        largest = {
            name: torch.stack([state[name].to(like[name].device) for state in counters]).amax(0) for name in none
        }
        mean |= _reduced(largest, reduce, "max")
    return {name: mean[name] for name in like}


def _reduced(own: State, reduce: Callable[..., Any], how: str) -> State:
    """`own` of all processes, by one collective over one vector."""
    flat = reduce(torch.cat([value.flatten() for value in own.values()]), reduce_op=how)
    pieces = flat.split([value.numel() for value in own.values()])
    return {
        name: piece.view_as(value).to(value.dtype) for (name, value), piece in zip(own.items(), pieces, strict=True)
    }
