"""Targets and losses of Q-learning."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Loss = Literal["huber", "mse"]
Rule = Literal["dqn", "double", "convergent"]


def chosen(values: Tensor, action: Tensor) -> Tensor:
    """Values (N, A) of the actions (N,) taken → (N,)."""
    return values.gather(1, action[:, None]).squeeze(1)


def td_target(reward: Tensor, discount: Tensor, terminal: Tensor, next_value: Tensor) -> Tensor:
    """``y = r + discount (1 - terminal) V(s')``, all (N,).

    Args:
        reward: r, summed over the steps between s and s'.
        discount: γ to the power of these steps.
        terminal: whether the episode ended there.
        next_value: V(s').
    """
    return reward + discount * next_value.masked_fill(terminal, 0.0)


def next_values(target: Tensor, online: Tensor | None = None) -> Tensor:
    """Value (N,) of the next states from the target network's values (N, A): their maximum.

    With `online` values, the target network judges the action that the online network prefers (Double DQN, van Hasselt
    et al. 2016).
    """
    return target.amax(1) if online is None else chosen(target, online.argmax(1))


def td_loss(value: Tensor, target: Tensor, loss: Loss = "huber") -> Tensor:
    """Loss of each transition, (N,).

    Args:
        value: Q(s, a), (N,).
        target: y, (N,).
        loss: ``huber`` with δ = 1, or ``mse``, the squared error.
    """
    function = F.smooth_l1_loss if loss == "huber" else F.mse_loss
    return function(value, target, reduction="none")


def convergent_loss(value: Tensor, target: Tensor, residual_target: Tensor, loss: Loss = "huber") -> Tensor:
    """Convergent DQN (Wang and Ueda 2022): the larger of the usual loss and of that to a residual target. (N,) each.

    Args:
        value: Q(s, a).
        target: y, of the target network.
        residual_target: y of the online network, through which gradient flows.
        loss: see `td_loss`.
    """
    return td_loss(value, target, loss).maximum(td_loss(value, residual_target, loss))


def update_target(target: nn.Module, online: nn.Module, rate: float = 1.0) -> None:
    """Move the target network's parameters towards the online network's.

    Args:
        target: moves.
        online: stays.
        rate: share of the way, in (0, 1]; 1 copies.
    """
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.data.lerp_(new.data, rate)
