"""Made samples as files, for whatever reads files: a table a part and its pictures."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.safety.layouts import Found
from datamodules.safety.tables import LABELS
from leanlight.contracts import SafetySample, UserError

_WORDS = {LABELS[word]: word for word in ("harmful", "benign")}


def write_samples(found: Sequence[Found], folder: Path) -> bool:
    """Write ``PART.jsonl`` for each part, and its pictures as ``PART/ID.png``, which `read_samples` reads back.

    The folder appears at once, whole.

    Args:
        found: samples with their parts; each has both a picture and a part.
        folder: that does not exist yet, or was written of the same samples.

    Returns:
        Whether it has been written; False where it was there.

    Raises:
        UserError: something else is there.
    """
    tables: dict[str, str] = {}
    for sample, part in found:
        line = json.dumps(_row(sample, f"{part}/{sample.id}.png"), ensure_ascii=False)
        tables[str(part)] = f"{tables.get(str(part), '')}{line}\n"
    if folder.exists():
        _require_same(folder, tables)
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        whole = Path(place) / folder.name
        for name, table in tables.items():
            (whole / name).mkdir(parents=True)
            (whole / f"{name}.jsonl").write_text(table, "utf-8")
        for sample, part in found:
            _write_picture(sample, whole / f"{part}/{sample.id}.png")
        os.replace(whole, folder)
    return True


def _row(sample: SafetySample, image: str) -> dict[str, Any]:
    return {
        "id": sample.id,
        "instruction": sample.instruction,
        "image": image,
        "response": sample.response,
        **{f"{field}_label": _WORDS[harmful] for field, harmful in sample.labels.items()},
        "categories": list(sample.categories),
        "explanation": sample.explanation,
        "source": sample.source,
        "topic": sample.topic,
    }


def _require_same(folder: Path, tables: dict[str, str]) -> None:
    for name, table in tables.items():
        file = folder / f"{name}.jsonl"
        if not file.is_file() or file.read_text("utf-8") != table:
            raise UserError(f"{folder}: expected no such folder, or {file.name} as it is made here; move it away")


def _write_picture(sample: SafetySample, path: Path) -> None:
    from PIL import Image

    assert sample.image is not None
    Image.fromarray(sample.image.pixels().permute(1, 2, 0).numpy()).save(path, "PNG")
