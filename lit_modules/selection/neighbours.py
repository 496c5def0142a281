"""Rules that compare an item with those nearest to it in its class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveFloat, PositiveInt
from lit_modules.selection.features import Features, class_picks
from lit_modules.selection.rules import ClassRule
from lit_modules.selection.scores import EL2N, ScoreRule
from lit_modules.selection.work import Advance


def nearest(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(N, count) int64 nearest other items of each, nearest first, and (N, count) float64 distances from them.

    Args:
        x: (N, D) float.
        count: neighbours, or all others where there are fewer.
    """
    points = x.double() - x.double().mean(0)
    norm, count = points.square().sum(1), min(count, len(x) - 1)
    index, distance = [], []
    for items in torch.arange(len(x)).split(256):
        square = norm[items, None] + norm - 2 * points[items] @ points.T
        square[torch.arange(len(items)), items] = torch.inf
        near = square.topk(count, largest=False)
        index.append(near.indices)
        distance.append(near.values.clamp_min(0).sqrt())
    return torch.cat(index), torch.cat(distance)


@dataclass(frozen=True)
class CAL(ScoreRule):
    """Items predicted most unlike their neighbours (Margatina et al. 2021): mean symmetric divergence, in nats.

    Args:
        neighbours: of each item, by distance of embeddings.
        deepcore_compat: the most like instead, as DeepCore's code does.
    """

    neighbours: PositiveInt = 10
    deepcore_compat: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1:
            raise UserError(f"neighbours: expected 1 or more, got {self.neighbours}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("embedding", "logits")

    def score(self, features: Features) -> Tensor:
        index, _ = nearest(features["embedding"], self.neighbours)
        log = features["logits"].double().log_softmax(1)
        score = torch.zeros(len(features), dtype=torch.float64)
        for column in index.T:
            score += 0.5 * ((log.exp() - log[column].exp()) * (log - log[column])).sum(1)
        score /= max(index.shape[1], 1)
        return -score if self.deepcore_compat else score


@dataclass(frozen=True)
class D2(ClassRule):
    """Items that are hard and have hard neighbours, but not next to one chosen before (Maharana et al. 2024).

    Difficulty is that of `EL2N`. An item first gains ``exp(-d)`` of what each neighbour at distance d has; when it is
    chosen, its neighbours lose ``exp(-gamma d)`` of what it has.

    Args:
        neighbours: of each item, by distance of embeddings.
        gamma: above 0; the larger, the fewer neighbours lose anything.
    """

    neighbours: PositiveInt = 10
    gamma: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 1:
            raise UserError(f"neighbours: expected 1 or more, got {self.neighbours}")
        if not self.gamma > 0:
            raise UserError(f"gamma: expected more than 0, got {self.gamma}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("embedding", "train_error")

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        difficulty = EL2N().score(features)
        near, distance = nearest(features["embedding"], self.neighbours)
        score = difficulty + ((-distance).exp() * difficulty[near]).sum(1)
        loss = (-self.gamma * distance).exp()
        index, value = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)
        for number in range(count):
            best = int(score.argmax())
            index[number], value[number] = best, score[best]
            score[near[best]] -= loss[best] * score[best]
            score[best] = -torch.inf
            advance(1)
        return class_picks(index, value)
