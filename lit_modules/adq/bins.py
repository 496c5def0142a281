"""Bins of a class by repeated greedy choice: early ones typical of it, late ones spread out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveInt
from lit_modules.selection.features import Features
from lit_modules.selection.greedy import facility_location, graph_cut
from lit_modules.selection.kernels import kernel_of
from lit_modules.selection.work import Advance


@dataclass(frozen=True)
class Binning:
    """How the items of a class are cut into bins (Zhou et al. 2023): choose a bin, set it aside, choose from the rest.

    The last bin is what remains, in the order of the data. Budget and seed play no part.

    Args:
        num_bins: bins of each class m, at least 1.
        scheme: ``equal`` sizes, which differ by at most 1; ``geometric``, each 1/m of what is left, the last all of it.
        feature: what similarities are taken between: the loss ``gradient`` in the last layer, or the ``embedding``.
        double_softmax: take the gradient of the cross-entropy of softmax(z), as the authors' code does.
        similarity: ``cosine`` (0 to 1), or ``neg_sqeuclid`` for the negative squared distance.
        submodular: ``graph_cut``, or ``facility_location``.
    """

    num_bins: PositiveInt = 10
    scheme: Literal["equal", "geometric"] = "equal"
    feature: Literal["gradient", "embedding"] = "gradient"
    double_softmax: bool = True
    similarity: Literal["cosine", "neg_sqeuclid"] = "cosine"
    submodular: Literal["graph_cut", "facility_location"] = "graph_cut"

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of features that are read."""
        return ("embedding", "logits") if self.feature == "gradient" else ("embedding",)

    def sizes(self, items: int, label: int) -> list[int]:
        """Items of each bin of a class.

        Args:
            items: of the class.
            label: the class, for the error.

        Raises:
            UserError: fewer items than bins.
        """
        if items < self.num_bins:
            raise UserError(f"num_bins: expected 1 to {items}, the items of class {label}; got {self.num_bins}")
        sizes: list[int] = []
        for number in range(self.num_bins - 1):
            parts = self.num_bins - number if self.scheme == "equal" else self.num_bins
            sizes.append(max(round((items - sum(sizes)) / parts), 1))
        return [*sizes, items - sum(sizes)]

    def __call__(self, own: Features, label: int, advance: Advance) -> dict[str, Tensor]:
        """Cut one class.

        Args:
            own: features of the class.
            label: the class.
            advance: told of picks.

        Returns:
            ``bin`` (n,) int64 of each item, from 0, and ``order`` (n,) int64, its place in the bin.
        """
        bin, order = torch.empty(2, len(own), dtype=torch.int64)
        choose = graph_cut if self.submodular == "graph_cut" else facility_location
        *chosen, last = self.sizes(len(own), label)
        kernel = kernel_of(own, self.feature, self.double_softmax, self.similarity)
        left = torch.arange(len(own))
        for number, size in enumerate(chosen):
            picked, _ = choose(kernel, size, advance=advance)
            bin[left[picked]], order[left[picked]] = number, torch.arange(size)
            stays = torch.ones(len(left), dtype=torch.bool)
            stays[picked] = False
            kernel, left = kernel.take(stays.nonzero()[:, 0]), left[stays]
        bin[left], order[left] = self.num_bins - 1, torch.arange(last)
        return {"bin": bin, "order": order}
