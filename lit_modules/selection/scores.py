"""Rules that rank the items of a class by a number each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveFloat, PositiveInt, Share
from lit_modules.selection.features import Features, class_picks
from lit_modules.selection.rules import ClassRule
from lit_modules.selection.work import Advance


@dataclass(frozen=True)
class ScoreRule(ClassRule):
    """Base of rules that go by a score of each item: they keep the largest of each class, of equals the first."""

    def score(self, features: Features) -> Tensor:
        """(N,) float64 of the items of one class."""
        raise NotImplementedError

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        score, index = self.score(features).sort(descending=True, stable=True)
        advance(count)
        return class_picks(index[:count], score[:count])


@dataclass(frozen=True)
class Forgetting(ScoreRule):
    """Items that the selector classified correctly and then wrongly most often (Toneva et al. 2019)."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("train_margin",)

    def score(self, features: Features) -> Tensor:
        correct = features["train_margin"] > 0
        if correct.shape[1] < 2:
            raise UserError("features: expected train_margin of 2 epochs or more, got 1; train the selector longer")
        return (correct[:, :-1] & ~correct[:, 1:]).sum(1).double()


@dataclass(frozen=True)
class EL2N(ScoreRule):
    """Items with the largest distance between softmax and label early in training (Paul et al. 2021).

    Args:
        epochs: the first so many are averaged, or all where fewer are recorded.
    """

    epochs: PositiveInt = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise UserError(f"epochs: expected 1 or more, got {self.epochs}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("train_error",)

    def score(self, features: Features) -> Tensor:
        return features["train_error"][:, : self.epochs].double().mean(1)


@dataclass(frozen=True)
class Entropy(ScoreRule):
    """Items whose prediction has the largest entropy, in nats.

    Args:
        deepcore_compat: the smallest instead, as the unbalanced branch of DeepCore's code does.
    """

    deepcore_compat: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("logits",)

    def score(self, features: Features) -> Tensor:
        log = features["logits"].double().log_softmax(1)
        entropy = -(log.exp() * log).sum(1)
        return -entropy if self.deepcore_compat else entropy


@dataclass(frozen=True)
class LeastConfidence(ScoreRule):
    """Items whose most probable class is the least probable.

    Args:
        deepcore_compat: go by the largest logit, as DeepCore's code does.
    """

    deepcore_compat: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("logits",)

    def score(self, features: Features) -> Tensor:
        logits = features["logits"].double()
        return -(logits if self.deepcore_compat else logits.softmax(1)).amax(1)


@dataclass(frozen=True)
class Margin(ScoreRule):
    """Items whose two most probable classes are the nearest to each other.

    Args:
        deepcore_compat: the farthest instead, as the unbalanced branch of DeepCore's code does.
    """

    deepcore_compat: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("logits",)

    def score(self, features: Features) -> Tensor:
        first, second = features["logits"].double().softmax(1).topk(2).values.unbind(1)
        return first - second if self.deepcore_compat else second - first


@dataclass(frozen=True)
class Moderate(ScoreRule):
    """Items whose distance to the mean of the class is nearest to the median one (Xia et al. 2023)."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("embedding",)

    def score(self, features: Features) -> Tensor:
        x = features["embedding"].double()
        distance = (x - x.mean(0)).norm(dim=1)
        return -(distance - distance.quantile(0.5)).abs()


@dataclass(frozen=True)
class DUAL(ClassRule):
    """Items whose probability of the own class is low and varies, drawn at random (DUAL, arXiv:2502.06905).

    The score is the mean over windows of epochs of ``std(p) (1 - mean p)``. Chances are in proportion to it, times a
    beta density of the item's mean p, which turns to easier items the fewer are kept.

    Args:
        epochs: the first so many are looked at, or all where fewer are recorded.
        window: epochs of a window, at most.
        power: how fast the density turns with the part that is left out; 4 in the code of its authors.
    """

    epochs: PositiveInt = 30
    window: PositiveInt = 10
    power: PositiveFloat = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.window <= self.epochs:
            raise UserError(f"window: expected 2 to {self.epochs}, the epochs looked at; got {self.window}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("train_probability",)

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        probability = features["train_probability"][:, : self.epochs].double()
        if probability.shape[1] < 2:
            raise UserError("features: expected train_probability of 2 epochs or more, got 1")
        windows = probability.unfold(1, min(self.window, probability.shape[1]), 1)
        score = (windows.std(2) * (1 - windows.mean(2))).mean(1)
        mean = probability.mean(1).clamp(1e-6, 1 - 1e-6)
        hardest = mean[score.sort(descending=True, stable=True).indices[:10]].mean()
        b = 15 * (1 - hardest) * (1 - (1 - count / len(score)) ** self.power)
        chance = score.log() + (15 - b) * mean.log() + (b - 1) * (1 - mean).log()
        # The largest of such sums are draws without replacement (Gumbel).
        noise = -torch.empty_like(chance).exponential_(generator=generator).log()
        index = (chance + noise).sort(descending=True, stable=True).indices[:count]
        advance(count)
        return class_picks(index, score[index])


@dataclass(frozen=True)
class CCS(ScoreRule):
    """Coverage-centric selection (Zheng et al. 2023): as many from each stratum of the margin, the hardest left out.

    The score is the mean over epochs of the logit of the own class above the largest other one.

    Args:
        beta: part with the smallest margins that is left out, in [0, 1). By default 0.3 where 10 % or less of a class
            is kept, as published, and above that in proportion to the part that is not kept.
        strata: of equal width between the smallest margin left and the largest.
    """

    beta: Share | None = None
    strata: PositiveInt = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None and not 0 <= self.beta < 1:
            raise UserError(f"beta: expected a share in [0, 1), got {self.beta}")
        if self.strata < 1:
            raise UserError(f"strata: expected 1 or more, got {self.strata}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("train_margin",)

    def score(self, features: Features) -> Tensor:
        return features["train_margin"].double().mean(1)

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        score, order = self.score(features).sort(stable=True)
        beta = self.beta if self.beta is not None else 0.3 * min((1 - count / len(score)) / 0.9, 1.0)
        # Never so many that the budget cannot be spent.
        dropped = min(int(beta * len(score) + 1e-9), len(score) - count)
        score, order = score[dropped:], order[dropped:]
        chosen = [
            members[torch.randperm(len(members), generator=generator)[:number]]
            for members, number in self._fill(score, count)
        ]
        index = torch.cat(chosen)
        advance(count)
        return class_picks(order[index], score[index])

    def _fill(self, score: Tensor, count: int) -> list[tuple[Tensor, int]]:
        """Items of each stratum of ascending scores, and how many of them to draw; small strata give all they have."""
        width = (score[-1] - score[0]) / self.strata
        place = (
            ((score - score[0]) / width.clamp_min(torch.finfo(torch.float64).tiny)).long().clamp_max(self.strata - 1)
        )
        members = [(place == number).nonzero()[:, 0] for number in range(self.strata)]
        found = []
        for done, each in enumerate(sorted(members, key=len)):
            number = min(len(each), count // (self.strata - done))
            found.append((each, number))
            count -= number
        return found
