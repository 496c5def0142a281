"""Policies that look at nothing: what a trained agent has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from leanlight.contracts import GameData
from lit_modules.dsqn.evaluation import mean_score

Policy = Literal["constant", "random"]


class FixedValues(nn.Module):
    """States (N, K, H, W) → values (N, A) that no state changes.

    Args:
        num_actions: A.
        policy: ``constant``: 1 for the action `always`, 0 for all others; ``random``: drawn anew for every state.
    """

    #: (A,) values of ``constant``.
    values: Tensor

    def __init__(self, num_actions: int, policy: Policy) -> None:
        super().__init__()
        self.policy = policy
        self.register_buffer("values", torch.zeros(num_actions))

    @property
    def always(self) -> int:
        """The action that ``constant`` prefers."""
        return int(self.values.argmax())

    @always.setter
    def always(self, action: int) -> None:
        self.values.zero_()[action] = 1.0

    def forward(self, state: Tensor) -> Tensor:
        shape = state.shape[0], len(self.values)
        return torch.rand(shape, device=state.device) if self.policy == "random" else self.values.expand(shape)


def constant_score(games: GameData, num_actions: int, action: int, seeds: Sequence[int]) -> float:
    """Mean score of an action that is taken at every greedy decision of the episodes of these seeds."""
    network = FixedValues(num_actions, "constant")
    network.always = action
    return mean_score(games.play(seeds, network))
