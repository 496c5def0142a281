"""Pictures of a selection: what was taken, from which bins, of which classes, with which scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leanlight.contracts import Curve, Histogram, ImageGrid, MediaItem
from lit_modules.selection import Features, Picks, TrainingDynamics

_COLUMNS, _ROWS = 10, 20  # what a montage shows at most
#: In `Picks.details`: a number a bin → what it is.
_BIN_CURVES = {
    "texture": "mean Sobel magnitude",
    "diversity": "diversity of views",
    "spread": "mean distance to the centre of the class",
    "importance": "importance",
}


def selection_pictures(
    features: Features,
    picks: Picks,
    score: Tensor | None = None,
    images: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, MediaItem]:
    """Everything there is to draw of a selection, by name.

    Args:
        features: the items it was made of.
        picks: the selection.
        score: (N,) what the rule ranks by, of all items; None where it ranks by nothing that dropped items have.
        images: from (n,) positions in `features` to (n, C, H, W) images in [0, 1], C 1 or 3; None draws none.
    """
    drawn: dict[str, MediaItem] = {"classes": class_histogram(features.label, picks.index, features.num_classes)}
    drawn |= bin_curves(picks.details.get("bins", {}))
    if score is not None:
        drawn["scores"] = score_histogram(picks.index, score)
    if images is not None:
        drawn["montage"] = montage(features.label, picks, images)
    return drawn


def class_histogram(label: Tensor, index: Tensor, num_classes: int) -> Histogram:
    """Shares of the classes in the selection and in the whole. label: (N,). index: (n,) positions chosen."""
    edges = [label - 0.5 for label in range(num_classes + 1)]
    return Histogram({"all items": label, "kept": label[index]}, "class", edges)


def bin_curves(bins: Mapping[str, Sequence[Any]]) -> dict[str, MediaItem]:
    """Scores and shares over the number of the bin. bins: name → one number a bin, those of `Picks.details`."""
    drawn: dict[str, MediaItem] = {
        f"bin_{name}": _curve({name: bins[name]}, ylabel) for name, ylabel in _BIN_CURVES.items() if bins.get(name)
    }
    if bins.get("drawn") and bins.get("size"):
        drawn["bin_share"] = _curve(
            {"drawn": _shares(bins["drawn"]), "in proportion to size": _shares(bins["size"])}, "share of the selection"
        )
    return drawn


def _shares(counts: Sequence[int]) -> list[float]:
    return [count / sum(counts) for count in counts]


def _curve(series: Mapping[str, Sequence[float]], ylabel: str) -> Curve:
    return Curve(range(max(map(len, series.values()))), series, "bin", ylabel)


def score_histogram(index: Tensor, score: Tensor) -> Histogram:
    """Scores of the kept items and of those dropped. index: (n,) positions kept. score: (N,) of all items."""
    kept = torch.zeros(len(score), dtype=torch.bool).index_fill(0, index, True)
    return Histogram({"kept": score[kept], "dropped": score[~kept]}, "score")


def montage(label: Tensor, picks: Picks, images: Callable[[Tensor], Tensor]) -> ImageGrid:
    """Chosen images, a row a bin or, without bins, a row a class: at even distances in the order of the selection.

    Args:
        label: (N,) of all items.
        picks: the selection.
        images: see `selection_pictures`; asked once, for what is shown alone.
    """
    word, group = ("bin", picks.bin) if (picks.bin >= 0).any() else ("class", label[picks.index])
    rows, captions = [], []
    for value in group.unique()[:_ROWS].tolist():
        members = (group == value).nonzero()[:, 0]
        shown = members[torch.linspace(0, len(members) - 1, min(_COLUMNS, len(members))).long()]
        rows.append(torch.nn.functional.pad(picks.index[shown], (0, _COLUMNS - len(shown)), value=-1))
        captions += [f"{word} {value}"] + [""] * (_COLUMNS - 1)
    position = torch.cat(rows)
    there = images(position[position >= 0]).float().cpu()
    tiles = there.new_ones(len(position), *there.shape[1:])  # white where a row is short
    tiles[position >= 0] = there
    return ImageGrid(tiles, _COLUMNS, captions)


def margins(dynamics: TrainingDynamics) -> dict[str, MediaItem]:
    """How sure training is of its items, in its first and in its last finished epoch; nothing before there is one."""
    numbers = sorted({0, len(dynamics) - 1}) if len(dynamics) else []
    values = {f"epoch {number + 1}": dynamics.epoch(number)["train_margin"] for number in numbers}
    seen = {name: value[~value.isnan()] for name, value in values.items()}
    return {"margins": Histogram(seen, "logit of the own class above the largest other one")} if seen else {}
