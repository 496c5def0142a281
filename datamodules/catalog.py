"""What catalogues of data have in common, known without loading anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from leanlight.contracts.errors import UserError, nearest

T = TypeVar("T")


@dataclass(frozen=True)
class PlacedSet:
    """What is known, before it is loaded, of a set that lies below a root or where the user says.

    Args:
        name: by which its DataModule knows it.
        title: its full name.
        facts: what it has and what is labelled, for ``leanlight data list``.
        licence: under which it may be used.
        origin: who made it.
        size_mb: what its files take in MB; 0 where that is not known or there are none.
        get: how to come by it.
        files: where in ROOT it may lie; the first that is there is taken.
        by_path: whether its files are the user's, at a place that ``path`` names.
    """

    name: str
    title: str
    facts: str
    licence: str
    origin: str
    size_mb: float
    get: str
    files: tuple[str, ...] = ()
    by_path: bool = False


def entry(name: str, known: Mapping[str, T]) -> T:
    """The entry called `name`; UserError with the nearest name if there is none."""
    if name not in known:
        raise UserError(
            f"dataset: expected one of {', '.join(known)}, got {name!r}{nearest(name, known)}; "
            "`leanlight data list` lists them"
        )
    return known[name]


def place_of(info: PlacedSet, root: Path | str, path: Path | str | None = None) -> Path:
    """Where the files of a set are; UserError with every place tried.

    Args:
        info: the set's entry.
        root: folder of data sets.
        path: of the user's own data, or of a published set in place of those in the catalogue.
    """
    root, given = Path(root).expanduser(), None if path is None else Path(path).expanduser()
    if info.by_path and (given is None or not given.exists()):
        raise UserError(
            f"path: expected the place of {info.name} data, got {str(given) if given else None!r}; {info.get}"
        )
    tried = [given] if given is not None else [root / file for file in info.files]
    for place in tried:
        if place.exists():
            return place
    raise UserError(f"{info.title} was not found; tried: {'; '.join(map(str, tried))}; to get it: {info.get}")
