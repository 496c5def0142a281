"""What catalogues of data have in common, known without loading anything."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from leanlight.contracts.errors import UserError, nearest

T = TypeVar("T")


class HasPlaces(Protocol):
    """An entry whose files are looked for: below a root, or where the user says."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def get(self) -> str: ...
    @property
    def files(self) -> tuple[str, ...]: ...
    @property
    def by_path(self) -> bool: ...


def entry(name: str, known: Mapping[str, T]) -> T:
    """The entry called `name`; UserError with the nearest name if there is none."""
    if name not in known:
        raise UserError(
            f"dataset: expected one of {', '.join(known)}, got {name!r}{nearest(name, known)}; "
            "`leanlight data list` lists them"
        )
    return known[name]


def place_of(info: HasPlaces, root: Path | str, path: Path | str | None = None) -> Path:
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
