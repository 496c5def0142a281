"""Evaluation of an agent by whole games: figures of the episodes, and how it plays them again when disturbed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

from leanlight.contracts import Episode, GameData, GameMeta, QFunction, UnderNoise, isolated_rng
from leanlight.ops.corruptions import gaussian
from lit_modules.nn.checks import device_of

Noise = Literal["gaussian", "weight"]

_PICTURES = 300  # of the episode that is drawn


class GameEvaluation:
    """The episodes of one evaluation and what came out of them.

    Args:
        input_noise: standard deviations of Gaussian noise on the pixels, on the scale [0, 1].
        weight_noise: standard deviations of a random relative change of every weight.

    Attributes:
        levels: the two, under ``gaussian`` and ``weight``.
        episodes: those played since `start`.
        under_noise: mean score at each level, by kind of noise.
    """

    def __init__(self, input_noise: Sequence[float] = (), weight_noise: Sequence[float] = ()) -> None:
        self.levels: dict[Noise, list[float]] = {"gaussian": list(input_noise), "weight": list(weight_noise)}
        self.episodes: list[Episode] = []
        self.under_noise: dict[str, UnderNoise] = {}
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
        """Play the episodes again at every level; return ``score_<kind>_<level>``."""
        return {
            f"score_{kind}_{level:g}": score_under(kind, level, network, games, self._seeds)
            for kind, levels in self.levels.items()
            for level in levels
        }

    def noise_losses(self, figures: Mapping[str, float], game: GameMeta) -> dict[str, float]:
        """What noise costs by name, and keep the scores for `under_noise`.

        ``drop_<kind>``: in points of score. ``retention_<kind>``: the ratio of the scores, where both are positive.
        ``lost_<kind>``: the share of what the score is above that of random play. Where this is within two standard
        errors of the episodes there is nothing to lose, and no share.

        Args:
            figures: what `summary` and `play_under_noise` gave, as means over all processes.
            game: with the score of random play, where it is known, and the number of test episodes.
        """
        clean, values = figures["score"], dict[str, float]()
        doubt = 2 * figures["score_std"] / math.sqrt(game.counts["test"])
        above = 0.0 if game.random_score is None else clean - game.random_score
        for kind, levels in self.levels.items():
            if levels:
                scores = {level: figures[f"score_{kind}_{level:g}"] for level in levels}
                self.under_noise[kind] = result = UnderNoise(clean, {kind: scores})
                losses = result.losses() | ({"lost": (clean - result.mean) / above} if above > doubt else {})
                values |= {f"{name}_{kind}": value for name, value in losses.items()}
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
def score_under(kind: Noise, level: float, network: nn.Module, games: GameData, seeds: Sequence[int]) -> float:
    """Mean score of episodes under noise, drawn from a fixed seed: it is the same for every agent.

    Args:
        kind: noise on the pixels, or on the weights.
        level: its standard deviation.
        network: states in [0, 1] → values, in evaluation mode.
        games: the DataModule that plays.
        seeds: one an episode.
    """
    device = device_of(network)

    def values(state: Tensor) -> Tensor:
        state = scaled(state.to(device))
        return network(gaussian(state, torch.randn_like(state), level) if kind == "gaussian" else state)

    with isolated_rng(0), disturbed_weights(network, level) if kind == "weight" else nullcontext():
        return mean_score(games.play(seeds, values))


def scaled(state: Tensor) -> Tensor:
    """uint8 → float32 in [0, 1]."""
    return state.float() / 255


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
