"""What the server makes of the weights that clients send."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leanlight.contracts import ClientUpdate
from leanlight.contracts.federated import State

Weighting = Literal["uniform", "items"]


def client_weights(updates: Sequence[ClientUpdate], weighting: Weighting) -> list[float]:
    """Weights of the clients, which sum to 1: all equal, or by the size of their data."""
    sizes = [1 if weighting == "uniform" else update.items for update in updates]
    return [size / sum(sizes) for size in sizes]


def weighted_mean(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> State:
    """Mean of tensors by name, summed in the given order, so that it does not depend on who computed what.

    Integer buffers (batch norm's counters) take the largest value instead.
    """
    names = [name for name, value in states[0].items() if value.is_floating_point()]
    total = [states[0][name] * weights[0] for name in names]
    for state, weight in zip(states[1:], weights[1:], strict=True):
        torch._foreach_add_(total, [state[name] for name in names], alpha=weight)
    mean = dict(zip(names, total, strict=True))
    for name, value in states[0].items():
        if name not in mean:
            mean[name] = torch.stack([state[name] for state in states]).amax(0) if len(states) > 1 else value
    return mean


class Aggregator:
    """Base of all rules."""

    def weights(self, updates: Sequence[ClientUpdate]) -> list[float] | None:
        """Weights with which the rule is a mean of the clients' states; None for a rule that needs each of them.

        updates: as in `__call__`, but without states.
        """
        return None

    def __call__(
        self, start: Mapping[str, Tensor], updates: Sequence[ClientUpdate], parameters: Collection[str]
    ) -> State:
        """The server's new state.

        Args:
            start: its present one.
            updates: at least one, in the order of client ids.
            parameters: names in `start` that are no buffers.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FedAvg(Aggregator):
    """Mean of the clients' parameters and buffers (McMahan et al. 2017, arXiv:1602.05629).

    Args:
        weighting: of the clients: ``uniform``, as in SFedCA's published code, or by ``items``, as in FedAvg's paper.
    """

    weighting: Weighting = "uniform"

    def weights(self, updates: Sequence[ClientUpdate]) -> list[float] | None:
        return client_weights(updates, self.weighting)

    def __call__(
        self, start: Mapping[str, Tensor], updates: Sequence[ClientUpdate], parameters: Collection[str]
    ) -> State:
        return weighted_mean([update.state for update in updates], client_weights(updates, self.weighting))


@dataclass(frozen=True)
class FedNova(FedAvg):
    """Mean of the clients' changes a step, times the mean number of steps (Wang et al. 2020, arXiv:2007.07481).

    ``w = w_r + τ Σ_k p_k (w_k - w_r) / τ_k`` with ``τ = Σ_k p_k τ_k`` and τ_k local steps of plain SGD.

    Args:
        weighting: p_k: ``uniform``, or by ``items``, as in the paper.
    """

    def weights(self, updates: Sequence[ClientUpdate]) -> list[float] | None:
        return None

    def __call__(
        self, start: Mapping[str, Tensor], updates: Sequence[ClientUpdate], parameters: Collection[str]
    ) -> State:
        weights = client_weights(updates, self.weighting)
        state = weighted_mean([update.state for update in updates], weights)
        steps = [max(update.steps, 1) for update in updates]
        mean_steps = sum(weight * step for weight, step in zip(weights, steps, strict=True))
        for name in parameters:
            state[name] = start[name].clone()
            for update, weight, step in zip(updates, weights, steps, strict=True):
                state[name].add_(update.state[name] - start[name], alpha=mean_steps * weight / step)
        return state
