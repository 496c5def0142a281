"""Samples as files, for whatever reads files: a table a part and its pictures."""

from __future__ import annotations

import json
import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.safety.tables import LABELS
from leanlight.contracts import Picture, SafetySample, UserError

_WORDS = {LABELS[word]: word for word in ("harmful", "benign")}


def write_samples(
    found: Sequence[tuple[SafetySample, str]], folder: Path, notes: Mapping[str, Mapping[str, Any]] | None = None
) -> bool:
    """Write ``PART.jsonl`` for each part, with its pictures in ``PART``, which `read_samples` reads back.

    The folder appears at once, whole.

    Args:
        found: samples with the names of their parts.
        folder: that does not exist yet, or was written of the same samples.
        notes: by id of a sample, further columns of its row.

    Returns:
        Whether it has been written; False where it was there.

    Raises:
        UserError: something else is there.
        UnreadablePictureError: a picture that cannot be decoded.
    """
    tables: dict[str, list[str]] = defaultdict(list)
    pictures: dict[str, Picture] = {}
    for sample, part in found:
        image = ""
        if sample.image is not None:
            image = f"{part}/{sample.image.sha256[:16]}.png"  # ids may be anything, and no names of files
            pictures[image] = sample.image
        row = _row(sample, image) | dict((notes or {}).get(sample.id, {}))
        tables[part].append(json.dumps(row) + "\n")
    if folder.exists():
        _require_same(folder, tables)
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        whole = Path(place) / folder.name
        for name, lines in tables.items():
            (whole / name).mkdir(parents=True)
            (whole / f"{name}.jsonl").write_text("".join(lines))
        for name, picture in pictures.items():
            _write_picture(picture, whole / name)
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
        "group": sample.group,
        "source": sample.source,
        "topic": sample.topic,
    }


def _require_same(folder: Path, tables: Mapping[str, Sequence[str]]) -> None:
    for name, lines in tables.items():
        file = folder / f"{name}.jsonl"
        if not file.is_file() or file.read_text() != "".join(lines):
            raise UserError(f"{folder}: expected no such folder, or {file.name} as it is made here; move it away")


def _write_picture(picture: Picture, path: Path) -> None:
    from PIL import Image

    Image.fromarray(picture.pixels().permute(1, 2, 0).numpy()).save(path, "PNG")
