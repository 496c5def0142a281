"""Evaluation of an agent by whole games: figures of the episodes, and how it plays them again when disturbed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from leanlight.contracts import Episode, GameData, GameMeta, QFunction, isolated_rng

Disturbed = Literal["input", "weight"]

_PICTURES = 300  # of the episode that is drawn


class GameEvaluation:
    """The episodes of one evaluation and what came out of them.

    Args:
        input_noise: standard deviations of Gaussian noise on the pixels, on the scale [0, 1].
        weight_noise: standard deviations of a random relative change of every weight.

    Attributes:
        levels: the two, under ``input`` and ``weight``.
        episodes: those played since `start`.
        scores_under_noise: mean score at each level, by kind; ``clean`` is that without noise.
    """

    def __init__(self, input_noise: Sequence[float] = (), weight_noise: Sequence[float] = ()) -> None:
        self.levels: dict[Disturbed, list[float]] = {"input": list(input_noise), "weight": list(weight_noise)}
        self.episodes: list[Episode] = []
        self.scores_under_noise: dict[str, list[float]] = {}
        self._seeds: list[int] = []

    def start(self) -> None:
        """Forget the episodes of the evaluation before."""
        self.episodes, self._seeds = [], []

    def play(self, games: GameData, seeds: Sequence[int], values: QFunction) -> int:
        """Play one episode a seed, the very first with pictures; return the number of decisions that asked the agent.

        Args:
            games: the DataModule.
            seeds: one an episode.
            values: the agent.
        """
        played = games.play(seeds, values, 0 if self.episodes else _PICTURES)
        self.episodes += played
        self._seeds += seeds
        return sum(episode.greedy for episode in played)

    def play_under_noise(self, games: GameData, network: nn.Module) -> dict[str, float]:
        """Play the episodes again at every level; return scores and mean losses by name.

        ``score_<kind>_noise_<level>`` and ``<kind>_noise_loss``, the latter in points below the score without noise.
        """
        clean = mean_score(self.episodes)
        self.scores_under_noise = {"clean": [clean]}
        values: dict[str, float] = {}
        for kind, levels in self.levels.items():
            scores = [score_under(kind, level, network, games, self._seeds) for level in levels]
            if scores:
                values |= {f"score_{kind}_noise_{at:g}": score for at, score in zip(levels, scores, strict=True)}
                values[f"{kind}_noise_loss"] = clean - sum(scores) / len(scores)
                self.scores_under_noise[kind] = scores
        return values


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


def mean_score(episodes: Sequence[Episode]) -> float:
    """Mean unclipped score."""
    return sum(episode.score for episode in episodes) / len(episodes)


@torch.no_grad()
def score_under(kind: Disturbed, level: float, network: nn.Module, games: GameData, seeds: Sequence[int]) -> float:
    """Mean score of episodes under noise, drawn from a fixed seed: it is the same for every agent.

    Args:
        kind: what is disturbed.
        level: standard deviation of the noise.
        network: states in [0, 1] → values, in evaluation mode.
        games: the DataModule that plays.
        seeds: one an episode.
    """
    device = next(network.parameters()).device

    def values(state: Tensor) -> Tensor:
        state = scaled(state.to(device))
        return network(noisy(state, level) if kind == "input" else state)

    with isolated_rng(0), disturbed_weights(network, level) if kind == "weight" else nullcontext():
        return mean_score(games.play(seeds, values))


def scaled(state: Tensor) -> Tensor:
    """uint8 → float32 in [0, 1]."""
    return state.float() / 255


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
