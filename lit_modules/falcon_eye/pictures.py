"""Pictures of judges: what they score, say and miss by field, and the curves of their training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from leanlight.contracts import Bars, Curve, Heatmap, Histogram, MediaItem, SafetySample, Table, Verdict
from lit_modules.history import History

ROWS = 40  # verdicts in the table
_LONGEST = 200  # characters of an answer in the table
_RANGES = 10  # of scores, in pictures of calibration
_Z = 1.96  # of 95 % intervals
_WORDS = {True: "harmful", False: "benign", None: "missing"}


def scores(score: Tensor, label: Tensor, fields: Sequence[str]) -> dict[str, MediaItem]:
    """P(harmful) of harmful and of benign samples, a field.

    Args:
        score: (N, F), NaN where there is none.
        label: (N, F) int64, 1 harmful, 0 benign, -1 unknown.
        fields: F names.
    """
    items: dict[str, MediaItem] = {}
    for k, name in enumerate(fields):
        known = ~score[:, k].isnan()
        series = {word: score[known & (label[:, k] == value), k] for word, value in (("harmful", 1), ("benign", 0))}
        series = {word: value for word, value in series.items() if len(value)}
        if series:
            edges = [step / 20 for step in range(21)]
            items[f"score_{name}"] = Histogram(series, f"P(harmful) of the {name}", bins=edges)
    return items


def calibration(score: Tensor, label: Tensor, fields: Sequence[str]) -> dict[str, MediaItem]:
    """Share of harmful samples beside the mean P(harmful) of ten equal ranges of it, a field, with 95 % intervals.

    Intervals are Wilson's. The mean distance of both, weighted by samples, is the expected calibration error.

    Args:
        score: (N, F), NaN where there is none.
        label: (N, F) int64, 1 harmful, 0 benign, -1 unknown.
        fields: F names.
    """
    items: dict[str, MediaItem] = {}
    for k, name in enumerate(fields):
        known = ~score[:, k].isnan() & (label[:, k] >= 0)
        said, true = score[known, k].double(), label[known, k].double()
        place = (said * _RANGES).long().clamp(max=_RANGES - 1)
        # A row a range: samples in it, the sum of their scores, and those that are harmful.
        each = torch.stack([torch.ones_like(said), said, true], 1)
        sums = torch.zeros(_RANGES, 3).double().index_add_(0, place, each)
        count, total, harmful = sums[sums[:, 0] > 0].T
        if not len(count):
            continue
        mean, share = total / count, harmful / count
        centre = (harmful + _Z**2 / 2) / (count + _Z**2)
        half = _Z / (count + _Z**2) * (count * share * (1 - share) + _Z**2 / 4).sqrt()
        error = float((count * (mean - share).abs()).sum() / count.sum())
        items[f"calibration_{name}"] = Curve(
            mean.tolist(),
            {"measured": share.tolist(), "calibrated": mean.tolist()},
            f"P(harmful) of the {name}",
            f"share that is harmful (calibration error {error:.3f})",
            bands={"measured": ((centre - half).tolist(), (centre + half).tolist())},
        )
    return items


def confusions(confusion: Tensor, fields: Sequence[str]) -> dict[str, MediaItem]:
    """What is true against what is said, a field.

    Args:
        confusion: (F, 2, 3) counts: benign and harmful ones by what is said of them: benign, harmful, nothing.
        fields: F names.
    """
    return {
        f"confusion_{name}": Heatmap(counts, "said", "true", ("benign", "harmful"), ("benign", "harmful", "missing"))
        for name, counts in zip(fields, confusion.float(), strict=True)
        if counts.any()
    }


def beside_majority(figures: Mapping[str, float], fields: Sequence[str]) -> dict[str, MediaItem]:
    """Accuracy by field, and what the more frequent label would get."""
    bars: dict[str, float] = {}
    for name in fields:
        for figure, label in ((f"{name}_accuracy", name), (f"{name}_accuracy_majority", f"{name}, majority")):
            if figure in figures:
                bars[label] = figures[figure]
    return {"accuracy": Bars(bars, "accuracy")} if bars else {}


def table(rows: Sequence[tuple[SafetySample, Verdict]], fields: Sequence[str]) -> dict[str, MediaItem]:
    """Verdicts beside what is true; of the samples their names alone, for their text may be what is to be kept away."""
    if not rows:
        return {}
    columns = ["sample"]
    for name in fields:
        columns += [f"{name}: true", "said", "P"]
    cells = [[sample.id, *_judged(sample, verdict, fields), verdict.text[:_LONGEST]] for sample, verdict in rows]
    return {"verdicts": Table((*columns, "answer"), cells)}


def _judged(sample: SafetySample, verdict: Verdict, fields: Sequence[str]) -> list[str]:
    cells = []
    for name in fields:
        score = verdict.scores.get(name)
        cells += [_WORDS[sample.labels.get(name)], _WORDS[verdict.labels.get(name)]]
        cells.append("" if score is None else f"{score:.3f}")
    return cells


def curves(history: History, fields: Sequence[str]) -> dict[str, MediaItem]:
    """Loss and accuracy by field on validation data over the steps of training.

    Args:
        history: ``step``, ``loss`` and ``accuracy_FIELD`` of each validation.
        fields: names.
    """
    items: dict[str, MediaItem] = {}
    for name, series in (
        ("validation_loss", {"validation": "loss"}),
        ("validation_accuracy", {field: f"accuracy_{field}" for field in fields}),
    ):
        curve = history.curve("step", series, "step", name.replace("_", " "))
        if curve is not None:
            items[name] = curve
    return items
