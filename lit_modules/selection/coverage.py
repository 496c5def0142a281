"""Rules that choose items of a class by where they lie among the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leanlight.contracts.ranges import NonNegativeFloat
from lit_modules.selection.features import Features, class_picks
from lit_modules.selection.greedy import facility_location, graph_cut, herding, k_center
from lit_modules.selection.kernels import GradientCloseness, Kernel, error_of, kernel_of
from lit_modules.selection.rules import ClassRule
from lit_modules.selection.work import Advance


@dataclass(frozen=True)
class Herding(ClassRule):
    """Keep the mean of the class's embeddings (Welling 2009); the score is what is left of the distance to it.

    Args:
        deepcore_compat: take the item that leads farthest away, as DeepCore's code does.
    """

    deepcore_compat: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("embedding",)

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        return class_picks(*herding(features["embedding"], count, advance, farthest=self.deepcore_compat))


@dataclass(frozen=True)
class KCenter(ClassRule):
    """Farthest first, from a random item (Sener & Savarese 2018); the score is the distance to those before."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("embedding",)

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        first = int(torch.randint(len(features), (1,), generator=generator))
        return class_picks(*k_center(features["embedding"], count, first, advance))


@dataclass(frozen=True)
class KernelRule(ClassRule):
    """Base of rules that go by similarities.

    Args:
        feature: what similarities are taken between: the loss ``gradient`` in the last layer, or the ``embedding``.
        double_softmax: of the gradient, see `error_of`.
        similarity: ``cosine``, or ``neg_sqeuclid`` for the negative squared distance of embeddings.
    """

    feature: Literal["gradient", "embedding"] = "gradient"
    double_softmax: bool = False
    similarity: Literal["cosine", "neg_sqeuclid"] = "cosine"

    @property
    def needs(self) -> tuple[str, ...]:
        return ("embedding", "logits") if self.feature == "gradient" else ("embedding",)

    def kernel(self, features: Features) -> Kernel:
        """Of the items of one class."""
        return kernel_of(features, self.feature, self.double_softmax, self.similarity)


@dataclass(frozen=True)
class GraphCut(KernelRule):
    """Items near all others and far from those chosen before: dataset quantization with a single bin.

    Args:
        double_softmax: as in the code of DQ, so that its first bins and this rule's choice are the same.
        trade_off: weight of the nearness to all.
    """

    double_softmax: bool = True
    trade_off: NonNegativeFloat = 1.0

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        return class_picks(*graph_cut(self.kernel(features), count, self.trade_off, advance))


@dataclass(frozen=True)
class FacilityLocation(KernelRule):
    """Items such that each of the class has one of them near."""

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        return class_picks(*facility_location(self.kernel(features), count, advance))


@dataclass(frozen=True)
class Craig(ClassRule):
    """Items whose gradients stand for those near them, weighted by how many these are (Mirzasoleiman et al. 2020).

    Args:
        deepcore_compat: add 1 to each weight, as DeepCore's code does.
    """

    deepcore_compat: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("embedding", "logits")

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        kernel = GradientCloseness(error_of(features["logits"], features.label), features["embedding"])
        index, gain = facility_location(kernel, count, advance)
        weight = cluster_sizes(kernel, index) + float(self.deepcore_compat)
        return class_picks(index, gain, weight)


def cluster_sizes(kernel: Kernel, chosen: Tensor) -> Tensor:
    """(n,) float64: to how many items each of the chosen is the most similar; of equals the one chosen first.

    Args:
        kernel: of all items.
        chosen: (n,) int64.
    """
    nearest = torch.zeros(len(kernel), dtype=torch.int64)
    closeness = torch.full((len(kernel),), -torch.inf)
    for number, item in enumerate(chosen):
        row = kernel.rows(item[None])[0]
        nearest[row > closeness] = number
        closeness = torch.maximum(closeness, row)
    return nearest.bincount(minlength=len(chosen)).double()
