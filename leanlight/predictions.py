"""Read what `leanlight predict` wrote: piece by piece, or all at once. Needs torch and safetensors alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanlight.contracts.errors import UserError
from leanlight.contracts.prediction import SeenItems

Predictions = dict[str, Tensor | tuple[str, ...]]


def describe_predictions(run: Path | str) -> dict[str, Any]:
    """What was predicted: ``split``, number of ``items``, ``fields`` with their dtype and shape, ``pieces``.

    run: a run folder, or the folder of the predictions itself. UserError when the prediction has not finished.
    """
    path = _folder(run) / "predictions.json"
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        helps = f"predict --resume {run}" if path.parent.name == "predictions" else f"predict --from {run}"
        raise UserError(f"{run}: no predictions (no {path}); go on with: leanlight {helps}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error})") from error


def read_predictions(run: Path | str, fields: Collection[str] | None = None) -> Iterator[Predictions]:
    """Yield one piece after the other: ``index`` (N,) and the other fields, (N, …) tensors and tuples of N strings.

    A piece is sorted by index, and pieces come in order of their first item; every item comes once. Memory holds one
    piece. run: a run folder, or the folder of the predictions itself. fields: those to keep; all by default.
    UserError for a damaged piece.
    """
    seen = SeenItems()
    for piece in describe_predictions(run)["pieces"]:
        outputs = _read_piece(_folder(run), piece)
        if fields is not None:
            outputs = {name: value for name, value in outputs.items() if name == "index" or name in fields}
        new = seen.add(outputs["index"])  # type: ignore[arg-type]
        yield outputs if new.all() else _take(outputs, new.nonzero()[:, 0])


def load_predictions(run: Path | str, fields: Collection[str] | None = None) -> Predictions:
    """All items at once, sorted by index; the same fields as `read_predictions` yields."""
    pieces = list(read_predictions(run, fields))
    if not pieces:
        return {"index": torch.zeros(0, dtype=torch.int64)}
    joined: Predictions = {}
    for field, first in pieces[0].items():
        values: list[Any] = [piece[field] for piece in pieces]
        joined[field] = torch.cat(values) if isinstance(first, Tensor) else tuple(x for value in values for x in value)
    return _take(joined, joined["index"].argsort())  # type: ignore[union-attr]


def _folder(run: Path | str) -> Path:
    inside = Path(run) / "artifacts" / "predictions"
    return inside if inside.is_dir() else Path(run)


def _read_piece(folder: Path, piece: dict[str, Any]) -> Predictions:
    from safetensors.torch import load

    contents = {}
    for suffix, sha256 in piece["sha256"].items():
        path = folder / f"{Path(piece['name']).name}.{suffix}"
        contents[suffix] = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(contents[suffix]).hexdigest() != sha256:
            raise UserError(f"{path} is missing or damaged (SHA-256 differs); predict it again")
    outputs: Predictions = dict(load(contents["safetensors"]))
    rows = [json.loads(line) for line in contents.get("jsonl", b"").decode().split("\n") if line]
    return outputs | {
        field: tuple(row[field] for row in rows) for field in (rows[0] if rows else ()) if field != "index"
    }


def _take(outputs: Predictions, positions: Tensor) -> Predictions:
    return {
        field: value[positions] if isinstance(value, Tensor) else tuple(value[i] for i in positions.tolist())
        for field, value in outputs.items()
    }
