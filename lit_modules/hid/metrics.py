"""How good recommended lists are, and how far into the long tail they reach.

Each metric takes lists of items, best first, and the items that were clicked next, both numbered from 1. All of them
keep counts of whole numbers, whose sums over processes are exact: of ranks, or of how often each item is recommended.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from leanlight.contracts import UserError
from leanlight.contracts.sessions import Catalogue
from lit_modules.nn.checks import require_positive


class _OfRanks(Metric):
    """Mean over cases of a gain that follows from the place of the target among the first K; NaN without cases.

    Args:
        k: length K of the lists that count.
        tail: (m + 1,) bool; only cases with such a target count. None: all cases.
        counted: places that are counted, at least `k` of them: metrics that count alike share their counts in a
            collection. None: `k`.
    """

    full_state_update = False
    higher_is_better = True
    #: Cases by the place of their target, from 0; the last entry counts targets that are at none of them.
    places: Tensor
    tail: Tensor | None

    def __init__(self, k: int, tail: Tensor | None = None, counted: int | None = None) -> None:
        super().__init__()
        require_positive(k=k)
        self.k = k
        self.register_buffer("tail", tail, persistent=False)
        self.add_state("places", torch.zeros((counted or k) + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, recommended: Tensor, target: Tensor) -> None:
        """Take in lists (N, at least as long as places are counted) and targets (N,)."""
        found = _first(recommended, len(self.places) - 1) == target[:, None]
        # The place is the number of entries before the first that is right: K where none is.
        place = (found.cumsum(1) == 0).sum(1)
        counted = torch.ones_like(place) if self.tail is None else self.tail[target].long()
        self.places.index_add_(0, place, counted)

    def compute(self) -> Tensor:
        place = torch.arange(self.k, device=self.places.device)
        return (self.gain(place.float()) * self.places[: self.k]).sum() / self.places.sum()

    def gain(self, place: Tensor) -> Tensor:
        """Of a target at `place` (K,), from 0."""
        raise NotImplementedError


class HitRate(_OfRanks):
    """Share of cases whose target is among the first K: also called Recall@K, or P@K in this family of papers."""

    def gain(self, place: Tensor) -> Tensor:
        return torch.ones_like(place)


class MRR(_OfRanks):
    """Mean of 1/rank of the target, 0 where it is not among the first K."""

    def gain(self, place: Tensor) -> Tensor:
        return 1 / (place + 1)


class NDCG(_OfRanks):
    """Mean of 1/log2(1 + rank) of the target, 0 where it is not among the first K."""

    def gain(self, place: Tensor) -> Tensor:
        return 1 / torch.log2(place + 2)


class _OfExposure(Metric):
    """A number that follows from how often each item is recommended.

    Args:
        k: length K of the lists that count.
        num_items: m.
    """

    full_state_update = False
    #: (m + 1,) lists that each item is in.
    exposure: Tensor

    def __init__(self, k: int, num_items: int) -> None:
        super().__init__()
        require_positive(k=k)
        self.k = k
        self.add_state("exposure", torch.zeros(num_items + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, recommended: Tensor, target: Tensor) -> None:
        """Take in lists (N, at least K); targets do not count."""
        items = _first(recommended, self.k).flatten()
        self.exposure.index_add_(0, items, torch.ones_like(items))


class TailShare(_OfExposure):
    """Tail@K: mean over cases of the share of their list that lies in the tail.

    Args:
        k: length K of the lists that count.
        tail: (m + 1,) bool.
    """

    higher_is_better = True
    tail: Tensor

    def __init__(self, k: int, tail: Tensor) -> None:
        super().__init__(k, len(tail) - 1)
        self.register_buffer("tail", tail, persistent=False)

    def compute(self) -> Tensor:
        return (self.exposure * self.tail).sum() / self.exposure.sum()


class Coverage(_OfExposure):
    """Share of the items that are in the list of some case; over processes that is of a union.

    It grows with the number of cases: compare it on the same cases only.

    Args:
        k: length K of the lists that count.
        num_items: m.
        among: (m + 1,) bool, items of which the share is taken, such as the tail. None: all.
    """

    higher_is_better = True
    among: Tensor

    def __init__(self, k: int, num_items: int, among: Tensor | None = None) -> None:
        super().__init__(k, num_items)
        among = torch.arange(num_items + 1) > 0 if among is None else among
        self.register_buffer("among", among, persistent=False)

    def compute(self) -> Tensor:
        return ((self.exposure > 0) & self.among).sum() / self.among.sum()


class Gini(_OfExposure):
    """Inequality of how often items are recommended: 0 where all are alike, towards 1 where one is alone."""

    higher_is_better = False

    def compute(self) -> Tensor:
        ascending = self.exposure[1:].sort().values
        m = len(ascending)
        weight = 2 * torch.arange(1, m + 1, device=ascending.device) - m - 1
        return (weight * ascending).sum() / (m * ascending.sum())


class MeanPopularity(_OfExposure):
    """Mean number of clicks in training of the items in the lists.

    Args:
        k: length K of the lists that count.
        clicks: (m + 1,) int64.
    """

    clicks: Tensor

    def __init__(self, k: int, clicks: Tensor) -> None:
        super().__init__(k, len(clicks) - 1)
        self.register_buffer("clicks", clicks, persistent=False)

    def compute(self) -> Tensor:
        return (self.exposure * self.clicks).sum() / self.exposure.sum()


def ranking_metrics(catalogue: Catalogue, ks: Sequence[int]) -> MetricCollection:
    """All metrics of lists: ``hr_20``, ``mrr_20``, ``ndcg_20``, the same with ``tail_``, ``tail_share_20``, and so on.

    Metrics that are read off the same counts keep them once.

    Args:
        catalogue: its head and clicks are those of training.
        ks: lengths K of the lists; ``update`` takes lists of the longest.

    Raises:
        UserError: a K above the number of items.
    """
    m = catalogue.num_items
    if max(ks) > m:
        raise UserError(f"topk: expected at most {m}, the number of items, got {max(ks)}")
    tail = ~catalogue.head
    tail[0] = False
    metrics: dict[str, Metric | MetricCollection] = {}
    groups: list[list[str]] = []
    for which, of_tail in (("", None), ("tail_", tail)):
        kinds: dict[str, type[_OfRanks]] = {"hr": HitRate, "mrr": MRR, "ndcg": NDCG}
        ranks = {f"{which}{name}_{k}": kind(k, of_tail, max(ks)) for k in ks for name, kind in kinds.items()}
        metrics |= ranks
        groups.append([*ranks])
    for k in ks:
        exposure = {
            f"tail_share_{k}": TailShare(k, tail),
            f"coverage_{k}": Coverage(k, m),
            f"tail_coverage_{k}": Coverage(k, m, tail),
            f"gini_{k}": Gini(k, m),
            f"popularity_{k}": MeanPopularity(k, catalogue.clicks),
        }
        metrics |= exposure
        groups.append([*exposure])
    return MetricCollection(metrics, compute_groups=groups)


def _first(recommended: Tensor, k: int) -> Tensor:
    if recommended.shape[1] < k:
        raise UserError(f"k: expected lists of at least {k} items, got {recommended.shape[1]}")
    return recommended[:, :k]
