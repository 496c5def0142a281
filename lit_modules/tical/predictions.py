"""What is told of clips, as a table for people: a row a clip."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from leanlight.contracts import atomic_path
from lit_modules.tical.network import Facts


def write_table(pieces: Iterator[Mapping[str, Any]], facts: Facts, path: Path) -> dict[str, float]:
    """Write predictions as CSV, and say how many there are and how consistent they are.

    Columns: ``clip``; ``class`` and the probability of each, ``p_CLASS``, or ``score``; ``consistency``; a modality,
    ``NAME_says`` (a class), ``NAME_typicality`` and ``NAME_anchor`` (the nearest training clip). What was not predicted
    has no column.

    Args:
        pieces: of the predictions, in the order of the rows.
        facts: classes and modalities.
        path: of the file.

    Returns:
        ``clips``, and the mean ``consistency`` where there is one.
    """
    clips, total = 0, 0.0
    with atomic_path(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        for piece in pieces:
            columns = _columns(piece, facts)
            if not clips:
                rows.writerow(columns)
            rows.writerows(zip(*columns.values(), strict=True))
            clips += len(piece["index"])
            total += float(piece["consistency"].double().sum()) if "consistency" in piece else 0.0
        known = "consistency" in columns if clips else False
    return {"clips": clips, **({"consistency": total / clips} if known else {})}


def _columns(piece: Mapping[str, Any], facts: Facts) -> dict[str, Any]:
    """By head, what stands below it."""
    columns: dict[str, Any] = {"clip": piece["clip"]}
    if "score" in piece:
        columns["score"] = _digits(piece["score"])
    else:
        columns["class"] = [facts.classes[k] for k in piece["probabilities"].argmax(1).tolist()]
        for name, share in zip(facts.classes, piece["probabilities"].unbind(1), strict=True):
            columns[f"p_{name}"] = _digits(share)
    if "consistency" in piece:
        columns["consistency"] = _digits(piece["consistency"])
    for name in facts.modalities:
        if f"says_{name}" in piece:
            columns[f"{name}_says"] = [facts.classes[k] if k >= 0 else "" for k in piece[f"says_{name}"].tolist()]
        if f"anchor_{name}" in piece:
            columns[f"{name}_typicality"] = _digits(piece[f"typicality_{name}"])
            columns[f"{name}_anchor"] = piece[f"anchor_{name}"]
    return columns


def _digits(values: torch.Tensor) -> list[str]:
    return [f"{value:.6g}" for value in values.tolist()]
