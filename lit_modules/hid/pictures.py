"""Pictures of recommendations and of intents."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import Bars, Curve, MediaItem, Scatter
from lit_modules.hid.intents import Intents

LENGTHS = (1, 2, 3, 4, 5, 6, 8, 11, 21)  # first length of each group of sessions
_POINTS = 200  # of a curve over items
_NAMED = 12  # intents with a colour of their own
_DRAWN = 2_000  # items of the map


def tenths(clicks: Tensor) -> Tensor:
    """(m + 1,) int64: in which tenth of the items each one is, 0 that of the most clicked; ties by number."""
    items = len(clicks) - 1
    place = torch.empty_like(clicks, dtype=torch.int64)
    place[1 + clicks[1:].argsort(descending=True, stable=True)] = torch.arange(items)
    place[0] = 0
    return place * 10 // max(1, items)


def of_lists(clicks: Tensor, sums: Mapping[str, Tensor]) -> dict[str, MediaItem]:
    """What was recommended, and where it was right.

    Args:
        clicks: (m + 1,) of the items in training.
        sums: of `lit_modules.hid.evaluation.ListStatistics`.
    """
    by_tenth, by_length = ((sums[f"{name}_hits"] / sums[f"{name}_cases"]).tolist() for name in ("tenth", "length"))
    ends = [f" to {after - 1}" if after > first + 1 else "" for first, after in pairwise(LENGTHS)]
    labels = [f"{first}{end}" for first, end in zip(LENGTHS, [*ends, " and more"], strict=True)]
    known = {label: share for label, share in zip(labels, by_length, strict=True) if share == share}
    tenth = Curve(range(1, 11), {"hit rate": by_tenth}, "tenth of the items, most clicked first", "hit rate")
    return {
        "rank_frequency": rank_frequency({"clicks in training": clicks, "recommendations": sums["recommended"]}),
        "hit_rate_by_popularity": tenth,
        "hit_rate_by_length": Bars(known, "hit rate, by clicks of the session"),
    }


def rank_frequency(counts: Mapping[str, Tensor]) -> Curve:
    """Share of each item in several counts (m + 1,), each in an order of its own, the largest first."""
    items = len(next(iter(counts.values()))) - 1
    ranks = torch.linspace(0, 1, min(_POINTS, items)).pow(2).mul(items - 1).round().long().unique()  # close at the head
    lines = {}
    for name, count in counts.items():
        shares = count[1:].sort(descending=True).values.double() / max(1, int(count.sum()))
        lines[name] = shares[ranks].where(shares[ranks] > 0, torch.nan).tolist()  # no logarithm of 0
    return Curve(((ranks + 1) * 100 / items).tolist(), lines, "rank, % of the items", "share", log_y=True)


def of_intents(intents: Intents, clicks: Tensor, table: Tensor) -> dict[str, MediaItem]:
    """Sizes of the intents, and a plane of the items.

    Args:
        intents: with their items, on any device.
        clicks: (m + 1,) of the items in training.
        table: (m + 1, d) embeddings.
    """
    items, clicked = intents.share().cpu(), intents.share(clicks.to(intents.item.device)).cpu()
    order = clicked.argsort(descending=True, stable=True)
    lines = {"items": items[order].tolist(), "clicks": clicked[order].tolist()}
    return {
        "intents": Curve(range(1, len(order) + 1), lines, "intent, most clicked first", "share"),
        "intent_map": _map(table.cpu(), intents.item.cpu(), intents.intent.cpu(), order[:_NAMED].tolist()),
    }


def _map(table: Tensor, item: Tensor, intent: Tensor, named: list[int]) -> Scatter:
    """Directions of the embeddings, on the two axes along which they differ most; an item in its first intent."""
    first = torch.full((len(table),), -1)
    first[item.flip(0)] = intent.flip(0)  # what is written last stays
    shown = first.ge(0).nonzero()[:, 0]
    shown = shown[torch.linspace(0, len(shown) - 1, min(_DRAWN, len(shown))).round().long()]
    points = F.normalize(table[shown].float(), dim=1)
    points = points - points.mean(0)
    axes = torch.linalg.eigh(points.T @ points).eigenvectors[:, -2:].flip(1)
    points, group = points @ axes, first[shown]
    series = {f"intent {number}": points[group == number] for number in named}
    rest = (group[:, None] != torch.tensor(named)).all(1)
    if rest.any():
        series["others"] = points[rest]
    return Scatter(series, "first principal axis", "second principal axis")
