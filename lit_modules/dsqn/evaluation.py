"""Figures of played episodes, and disturbances under which they are played again."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from leanlight.contracts import Episode, GameMeta


def summary(episodes: Sequence[Episode], game: GameMeta) -> dict[str, float]:
    """Figures of at least one episode by name.

    ``score`` (mean), ``score_std`` (over episodes), ``score_max``, ``length`` (decisions), ``max_q`` and ``q_spread``
    (means over episodes); for a game whose random and human scores are known also ``human_normalised``,
    (score - random) / (human - random).
    """
    scores = [episode.score for episode in episodes]
    values = {
        "score": statistics.fmean(scores),
        "score_std": statistics.pstdev(scores),
        "score_max": max(scores),
        "length": statistics.fmean(episode.decisions for episode in episodes),
        "max_q": statistics.fmean(episode.max_q for episode in episodes),
        "q_spread": statistics.fmean(episode.q_spread for episode in episodes),
    }
    low, high = game.random_score, game.human_score
    if low is not None and high is not None:
        values["human_normalised"] = (values["score"] - low) / (high - low)
    return values


def noisy(state: Tensor, level: float) -> Tensor:
    """States in [0, 1] with Gaussian noise of standard deviation `level`, clipped to [0, 1]."""
    return (state + level * torch.randn_like(state)).clamp(0, 1)


@contextmanager
def disturbed_weights(network: nn.Module, level: float) -> Iterator[None]:
    """Inside the block every parameter w is w (1 + level z), z standard normal; afterwards all are as before."""
    before = [parameter.detach().clone() for parameter in network.parameters()]
    try:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1 + level * torch.randn_like(parameter))
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(network.parameters(), before, strict=True):
                parameter.copy_(old)
