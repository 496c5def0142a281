"""Verdicts on the predicted samples as one file: a line of JSON a sample."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanlight.contracts import SafetySample, Verdict, atomic_path

_WORDS = {True: "harmful", False: "benign", None: ""}


def as_outputs(verdicts: Sequence[Verdict], fields: Sequence[str]) -> dict[str, list[str]]:
    """Verdicts as fields of a prediction, of text: what each judges, its categories, its reason, what it wrote."""
    found = {name: [_WORDS[verdict.labels.get(name)] for verdict in verdicts] for name in fields}
    found["categories"] = ["; ".join(verdict.categories) for verdict in verdicts]
    found |= {name: [getattr(verdict, name) for verdict in verdicts] for name in ("explanation", "text", "failure")}
    return found


def outputs(
    index: Tensor, samples: Sequence[SafetySample], verdicts: Sequence[Verdict], fields: Sequence[str]
) -> dict[str, Tensor | list[str]]:
    """A batch of predictions.

    Args:
        index: (N,) int64, positions of the samples in their part.
        samples: N of them.
        verdicts: one a sample.
        fields: that are judged.

    Returns:
        ``index``; ``sample``, their names; by field ``p_FIELD`` (N,), P(harmful), NaN where there is none; and what
        `as_outputs` gives.
    """
    found: dict[str, Tensor | list[str]] = {"index": index, "sample": [sample.id for sample in samples]}
    for name in fields:
        found[f"p_{name}"] = torch.tensor([verdict.scores.get(name, math.nan) for verdict in verdicts])
    return found | as_outputs(verdicts, fields)


def write_verdicts(pieces: Iterator[Mapping[str, Any]], fields: Sequence[str], path: Path) -> dict[str, float]:
    """Write predictions as JSON lines, and say how many there are and how much is harmful.

    A line holds ``sample``, and by field ``FIELD``: ``harmful``, ``benign`` or empty where the judge does not say, and
    ``p_FIELD``, P(harmful); ``categories``, ``explanation``, ``text``, and ``failure`` where there is no verdict.

    Args:
        pieces: of the predictions, in the order of the lines.
        fields: that are judged.
        path: of the file.

    Returns:
        ``verdicts``, and by field ``FIELD_harmful_share``.
    """
    by_field = [column for name in fields for column in (name, f"p_{name}")]
    names = ["sample", *by_field, "categories", "explanation", "text", "failure"]  # pieces have them in any order
    verdicts, harmful = 0, dict.fromkeys(fields, 0)
    with atomic_path(path) as part, open(part, "w", encoding="utf-8") as file:
        for piece in pieces:
            for row in zip(*(_column(piece[name]) for name in names), strict=True):
                file.write(json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) + "\n")
            verdicts += len(piece["index"])
            for name in fields:
                harmful[name] += sum(word == "harmful" for word in piece[name])
    shares = {f"{name}_harmful_share": count / verdicts for name, count in harmful.items()} if verdicts else {}
    return {"verdicts": verdicts, **shares}


def _column(values: Any) -> list[Any]:
    if isinstance(values, (tuple, list)):
        return list(values)
    # NaN is no JSON.
    return [round(value, 6) if value == value else None for value in values.tolist()]
