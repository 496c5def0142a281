"""DQ and ADQ: draw from bins, evenly or by what each is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leanlight.contracts import UserError
from leanlight.contracts.ranges import NonNegativeInt, PositiveInt, UnitInterval
from lit_modules.adq.allocation import apportion, bin_shares, quotas
from lit_modules.adq.bins import Binning
from lit_modules.adq.scores import (
    bin_means,
    bin_spread,
    contrastive_diversity,
    importance,
    mean_cosine_diversity,
    within_classes,
)
from lit_modules.selection.features import Features, Picks, class_members, class_picks, join_picks
from lit_modules.selection.rules import Rule, class_generator
from lit_modules.selection.work import Work


@dataclass(frozen=True)
class BinRule(Rule):
    """Base of the rules that cut each class into bins and draw from each bin at random.

    Args:
        num_bins: bins of each class, see `Binning`.
        bin_scheme: sizes of bins, see `Binning.scheme`.
        feature: what similarities are taken between, see `Binning`.
        double_softmax: of the gradient, see `Binning`.
        similarity: see `Binning`.
        submodular: what the greedy choice maximises, see `Binning`.
        single_bin: draw from this bin alone, counted from 0: shows what a bin is worth.
    """

    num_bins: PositiveInt = 10
    bin_scheme: Literal["equal", "geometric"] = "equal"
    feature: Literal["gradient", "embedding"] = "gradient"
    double_softmax: bool = True
    similarity: Literal["cosine", "neg_sqeuclid"] = "cosine"
    submodular: Literal["graph_cut", "facility_location"] = "graph_cut"
    single_bin: NonNegativeInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_bins < 1:
            raise UserError(f"num_bins: expected at least 1, got {self.num_bins}")
        if self.single_bin is not None and not 0 <= self.single_bin < self.num_bins:
            raise UserError(f"single_bin: expected 0 to {self.num_bins - 1}, got {self.single_bin}")
        if self.feature == "gradient" and self.similarity == "neg_sqeuclid":
            raise UserError("similarity: expected cosine with feature: gradient, got neg_sqeuclid")

    @property
    def needs(self) -> tuple[str, ...]:
        return self.binning.needs

    @property
    def binning(self) -> Binning:
        """How classes are cut: rules for which this is the same have the same bins."""
        return Binning(
            self.num_bins, self.bin_scheme, self.feature, self.double_softmax, self.similarity, self.submodular
        )

    def judge(self, features: Features, bin: Tensor) -> dict[str, Tensor]:
        """Scores of the bins by name, (m,) float64 each; ``importance`` among them where the rule goes by it.

        Args:
            features: of all items.
            bin: (N,) int64 bin of each item.
        """
        return {}

    def share(self, worth: Sequence[float], sizes: list[int], keep: float) -> list[float]:
        """Shares of a class's budget for each of its bins.

        Args:
            worth: importance of each bin; zeros where `judge` gives none.
            sizes: items of each bin.
            keep: part of all items, of all classes, to keep.
        """
        return bin_shares(worth, sizes, "uniform")

    def whole(self, quota: list[float], owed: list[float], generator: torch.Generator) -> list[int]:
        """Items to draw from each bin of a class, see `apportion`."""
        return apportion(quota, owed, generator)

    def select(self, features: Features, budget: Tensor, seed: int, work: Work | None = None) -> Picks:
        binning, counts = self.binning, features.label.bincount(minlength=features.num_classes).tolist()
        steps = [sum(binning.sizes(items, label)[:-1]) for label, items in enumerate(counts)]
        cut = [one["bin"] for one in (work or Work()).classes(features, binning, steps)]
        bin = torch.empty(len(features), dtype=torch.int64)
        for label, own in enumerate(cut):
            bin[class_members(features.label, label)] = own
        spread = bin_spread(features["embedding"], features.label, features.num_classes, bin, self.num_bins)
        scores = {"spread": spread, **self.judge(features, bin)}
        worth = scores["importance"].tolist() if "importance" in scores else [0.0] * self.num_bins
        keep = float(budget.sum()) / len(features)
        owed, planned, drawn, choices = [0.0] * self.num_bins, torch.zeros(self.num_bins).double(), [], []
        for label, (own, wanted) in enumerate(zip(cut, budget.tolist(), strict=True)):
            sizes: list[int] = own.bincount(minlength=self.num_bins).tolist()
            quota = quotas(self._shares(worth, sizes, wanted, keep, label), sizes, wanted)
            drawn.append(self.whole(quota, owed, class_generator(seed, label, "remainders")))
            owed = [rest + due - got for rest, due, got in zip(owed, quota, drawn[-1], strict=True)]
            planned += torch.tensor(quota).double()
            choices.append(_draw(own, drawn[-1], seed, label))
        bins = {
            "size": bin.bincount(minlength=self.num_bins).tolist(),
            **{name: score.tolist() for name, score in scores.items()},
            "share": (planned / planned.sum()).tolist(),
            "drawn": torch.tensor(drawn).sum(0).tolist(),
        }
        return join_picks(features, choices, {"bins": bins})

    def _shares(self, worth: Sequence[float], sizes: list[int], budget: int, keep: float, label: int) -> list[float]:
        if self.single_bin is None:
            return self.share(worth, sizes, keep)
        if budget > (size := sizes[self.single_bin]):
            raise UserError(f"single_bin: bin {self.single_bin} of class {label} has {size} items, not {budget}")
        return [float(number == self.single_bin) for number in range(self.num_bins)]


def _draw(bin: Tensor, numbers: Sequence[int], seed: int, label: int) -> dict[str, Tensor]:
    """Draw so many items of each bin of a class, each as likely as any other, every bin from a stream of its own."""
    index = []
    for number, count in enumerate(numbers):
        members = class_members(bin, number)
        generator = class_generator(seed, label, "bin", number)
        index.append(members[torch.randperm(len(members), generator=generator)[:count]])
    chosen = torch.cat(index)
    return class_picks(chosen, bin=bin[chosen])


@dataclass(frozen=True)
class DQ(BinRule):
    """Dataset quantization (Zhou et al., ICCV 2023): the same fraction of each bin.

    Args:
        rounding: ``budget`` spends the budget exactly; ``repo`` rounds each bin of each class for itself, halves to
            even, as the authors' code does: 6,200 of 50,000 items where 6,250 are asked for.
    """

    rounding: Literal["budget", "repo"] = "budget"

    def whole(self, quota: list[float], owed: list[float], generator: torch.Generator) -> list[int]:
        return [round(each) for each in quota] if self.rounding == "repo" else super().whole(quota, owed, generator)


@dataclass(frozen=True)
class ADQ(BinRule):
    """Adaptive dataset quantization (Li et al., AAAI 2025): more of the bins with much texture and diversity.

    Args:
        scores: what importance adds up: ``texture``, ``diversity``, ``both``, or ``none``, which makes it DQ.
        alpha: part of importance in the shares α, in [0, 1]; by default 0.6, above 30 % kept 0.7.
        allocation: from importance to shares, see `bin_shares`.
        diversity: ``mean_cosine`` of views, which is what the authors' code runs; ``contrastive``, what the paper says.
        heads: projection heads that diversity is averaged over; 0 for none.
        texture_within_class: standardise texture in each class first, for data whose classes differ much in it.
    """

    scores: Literal["none", "texture", "diversity", "both"] = "both"
    alpha: UnitInterval | None = None
    allocation: Literal["uniform", "paper_norm", "paper_literal", "repo"] = "paper_norm"
    diversity: Literal["mean_cosine", "contrastive"] = "mean_cosine"
    heads: NonNegativeInt = 3
    texture_within_class: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UserError(f"alpha: expected 0 to 1, got {self.alpha}")
        if self.heads < 0:
            raise UserError(f"heads: expected 0 or more, got {self.heads}")

    @property
    def needs(self) -> tuple[str, ...]:
        texture = ("texture",) if self.scores in ("texture", "both") else ()
        views = ("views",) if self.scores in ("diversity", "both") else ()
        return (*super().needs, *texture, *views)

    def judge(self, features: Features, bin: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        if "texture" in self.needs:
            level = features["texture"]
            if self.texture_within_class:
                level = within_classes(level, features.label, features.num_classes)
            found["texture"] = bin_means(level, bin, self.num_bins)
        if "views" in self.needs:
            judge = mean_cosine_diversity if self.diversity == "mean_cosine" else contrastive_diversity
            found["diversity"] = judge(features["views"], bin, self.num_bins, self.heads)
        return {**found, "importance": importance(*found.values())} if found else {}

    def share(self, worth: Sequence[float], sizes: list[int], keep: float) -> list[float]:
        alpha = self.alpha if self.alpha is not None else 0.6 if round(keep, 2) <= 0.3 else 0.7
        return bin_shares(worth, sizes, self.allocation, alpha)
