"""Where each set of clips is looked for, and what is read from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.catalog import place_of
from datamodules.emotion import readers
from datamodules.emotion.catalog import describe
from datamodules.emotion.clips import Clips
from datamodules.emotion.planted import PlantedConflicts
from leanlight.contracts import UserError


def load(
    name: str,
    root: Path | str,
    path: Path | str | None = None,
    planted: PlantedConflicts | None = None,
    download: bool = False,
    folders: Mapping[str, str] | None = None,
    text: Path | str | None = None,
) -> Clips:
    """Find the set `name` and read it; UserError when nothing is found, naming every place, or a file is damaged.

    Args:
        name: of the catalogue.
        root: folder of data sets.
        path: of the user's own data, or of a published set in place of those in the catalogue.
        planted: how ``planted`` is made.
        download: whether MNIST, for ``planted``, may be downloaded.
        folders: of ``mertools``: folder of the features by modality.
        text: file of vectors that replace the set's own text.
    """
    info = describe(name)
    root = Path(root).expanduser()
    if name == "planted":
        clips = (planted or PlantedConflicts()).make(root, download)
    else:
        place = place_of(info, root, path)
        clips = readers.read_mertools(place, folders) if name == "mertools" else _READERS[name](place)
    return clips if text is None else with_text(clips, Path(text).expanduser())


_READERS: dict[str, Callable[[Path], Clips]] = {
    "mosi": readers.read_mosi,
    "mosei": readers.read_pickle,
    "sims": readers.read_pickle,
    "pickle": readers.read_pickle,
    "npz": readers.read_arrays,
    "safetensors": readers.read_arrays,
    "emotion_folder": readers.read_folder,
}


def with_text(clips: Clips, path: Path) -> Clips:
    """Clips whose text is replaced by the vectors of a file, matched by name.

    Args:
        clips: of any set.
        path: npz or safetensors with ``id`` and one modality, ``text``.
    """
    if not path.is_file():
        raise UserError(f"text: expected a file of text vectors, got {path}")
    other = readers.read_arrays(path)
    if list(other.features) != ["text"]:
        raise UserError(f"text: expected the modality text alone in {path}, got {', '.join(other.features)}")
    place = {name: row for row, name in enumerate(other.names)}
    if missing := [name for name in clips.names if name not in place]:
        raise UserError(f"text: clip {missing[0]!r} of {clips.source} is not in {path}")
    other = other.take(np.array([place[name] for name in clips.names], np.int64))

    def swapped(kind: str) -> Any:
        rest = {name: value for name, value in getattr(clips, kind).items() if name != "text"}
        return dict(getattr(other, kind)) | rest

    return replace(
        clips,
        features=swapped("features"),
        length=swapped("length"),
        present=swapped("present"),
        extractors=swapped("extractors"),
        refused={
            scheme: {name: why for name, why in reasons.items() if name != "text"}
            for scheme, reasons in clips.refused.items()
        },
        source=f"{clips.source} with text from {path}",
    )
