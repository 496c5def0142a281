"""Pictures of recognised emotions: where modalities lie, what they say of one another, and when that is right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from leanlight.contracts import Bars, Curve, Heatmap, Histogram, MediaItem, Scatter
from lit_modules.history import History

PAIRS = 3  # of modalities whose verdicts are drawn against one another
POINTS = 1_500  # of a disk
_RIM = 300  # points of a circle
_NEAR = 0.5  # radius of the disk within which all points lie too close together to draw its rim
TERCILES = {f"accuracy_consistency_{name}": f"{name} κ" for name in ("low", "middle", "high")}
_LEVELS = ("least typical third", "middle third", "most typical third")


def plane(vectors: Tensor, curved: bool) -> Tensor:
    """(P, 2): vectors (P, d) of the tangent space at the origin on the two axes along which they reach farthest.

    curved: whether to draw them in the disk of Poincaré of curvature -1, where distances to the origin stay.
    """
    vectors = vectors.double()
    flat = vectors @ torch.linalg.eigh(vectors.T @ vectors).eigenvectors[:, -2:].flip(1)
    if not curved:
        return flat.float()
    norm = flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return (flat / norm * norm.tanh()).float()


def disks(
    flat: Mapping[str, Tensor],
    label: Tensor,
    typicality: Mapping[str, Tensor],
    classes: Sequence[str],
    curved: bool,
) -> dict[str, MediaItem]:
    """Each modality's points by class, and by how typical they are.

    Args:
        flat: by modality, (P, 2) of `plane`.
        label: (P,) int64 class of each clip.
        typicality: by modality, (P,) in [0, 1]; empty where it is not known.
        classes: names of the classes.
        curved: whether to draw the rim of the disk.
    """
    items: dict[str, MediaItem] = {}
    for name, points in flat.items():
        by_class = {kind: points[label == k] for k, kind in enumerate(classes) if (label == k).any()}
        items[f"disk_by_class_{name}"] = _disk(by_class, curved)
        if name in typicality:
            third = _thirds(typicality[name])
            levels = {level: points[third == k] for k, level in enumerate(_LEVELS) if (third == k).any()}
            items[f"disk_by_typicality_{name}"] = _disk(levels, curved)
    return items


def _disk(series: dict[str, Tensor], curved: bool) -> Scatter:
    if curved and max(float(points.norm(dim=1).max()) for points in series.values()) > _NEAR:
        angle = torch.linspace(0, 2 * math.pi, _RIM)
        series = {**series, "rim": torch.stack([angle.cos(), angle.sin()], 1)}
    return Scatter(series, "first axis", "second axis", equal=True)


def _thirds(value: Tensor) -> Tensor:
    """(P,) int64, 0 for the lowest third; ties by position."""
    place = torch.empty(len(value), dtype=torch.int64)
    place[value.argsort(stable=True)] = torch.arange(len(value))
    return place * 3 // max(1, len(value))


def consistency(kappa: Tensor, conflict: Tensor | None, right: Tensor) -> Histogram:
    """κ of conflicted and of agreeing clips; where nobody knows, of clips recognised and not; all (P,)."""
    if conflict is not None:
        series = {"conflicted": kappa[conflict], "agreeing": kappa[~conflict]}
    else:
        series = {"recognised": kappa[right], "mistaken": kappa[~right]}
    return Histogram({name: value for name, value in series.items() if len(value)}, "consistency κ", bins=30)


def counts(shown: Mapping[str, Tensor], classes: Sequence[str], names: Sequence[str]) -> dict[str, MediaItem]:
    """The confusion matrix, what modalities say against one another, and accuracy by tercile of κ.

    Args:
        shown: ``confusion`` (C, C) clips, true classes in rows; ``says`` (P, C, C) clips by what the first and what the
            second modality of each pair says; accuracy by tercile where κ is known.
        classes: names of the classes.
        names: of the modalities; pairs come in the order of `pairs`.
    """
    items: dict[str, MediaItem] = {"confusion": Heatmap(shown["confusion"], "predicted", "true", classes, classes)}
    for (first, second), matrix in zip(pairs(names), shown["says"], strict=True):
        if matrix.any():
            items[f"{first}_says_{second}_says"] = Heatmap(matrix, f"{second} says", f"{first} says", classes, classes)
    known = {label: float(shown[name]) for name, label in TERCILES.items() if name in shown}
    if known:
        items["accuracy_by_tercile"] = Bars(known, "accuracy, by tercile of κ")
    return items


def pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of modalities that are drawn."""
    return list(combinations(names, 2))[:PAIRS]


def anchors(history: History, classes: Sequence[str], names: Sequence[str]) -> dict[str, MediaItem]:
    """Anchors of each class over the epochs, once where all modalities have the same.

    Args:
        history: ``epoch``, and by modality the counts (C,) at its end.
        classes: names of the classes.
        names: of the modalities.
    """
    epochs = history["epoch"]
    if len(epochs) < 2:
        return {}
    alike = all(history[name] == history[names[0]] for name in names)
    lines = {name: dict(zip(classes, zip(*history[name], strict=True), strict=True)) for name in names}
    shown = {"anchors": lines[names[0]]} if alike else {f"anchors_{name}": lines[name] for name in names}
    return {name: Curve(epochs, by_class, "epoch", "anchors") for name, by_class in shown.items()}
