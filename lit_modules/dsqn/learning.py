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
    """``y = r + discount (1 - terminal) V(s')``; discount is γ to the power of the steps between s and s'. All (N,)."""
    return reward + discount * next_value.masked_fill(terminal, 0.0)


def next_values(target: Tensor, online: Tensor | None = None) -> Tensor:
    """Value (N,) of the next states from the target network's values (N, A): their maximum.

    With `online` values, the target network judges the action that the online network prefers (Double DQN, van Hasselt
    et al. 2016).
    """
    return target.amax(1) if online is None else chosen(target, online.argmax(1))


def td_loss(value: Tensor, target: Tensor, loss: Loss = "huber") -> Tensor:
    """Loss of each transition (N,): Huber with δ = 1, or the squared error."""
    function = F.smooth_l1_loss if loss == "huber" else F.mse_loss
    return function(value, target, reduction="none")


def convergent_loss(value: Tensor, target: Tensor, residual_target: Tensor, loss: Loss = "huber") -> Tensor:
    """Convergent DQN (Wang and Ueda 2022): the larger of the usual loss and of that to `residual_target`.

    The latter is made by the online network, and gradient flows through it. (N,) each.
    """
    return td_loss(value, target, loss).maximum(td_loss(value, residual_target, loss))


def update_target(target: nn.Module, online: nn.Module, rate: float = 1.0) -> None:
    """Move the target network's parameters towards the online network's, by `rate` in (0, 1]; 1 copies them."""
    for old, new in zip(target.parameters(), online.parameters(), strict=True):
        old.data.lerp_(new.data, rate)
