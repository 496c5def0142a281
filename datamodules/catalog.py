"""What catalogues of data have in common, known without loading anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from leanlight.contracts.errors import UserError, nearest

T = TypeVar("T")


def entry(name: str, known: Mapping[str, T]) -> T:
    """The entry called `name`; UserError with the nearest name if there is none."""
    if name not in known:
        raise UserError(
            f"dataset: expected one of {', '.join(known)}, got {name!r}{nearest(name, known)}; "
            "`leanlight data list` lists them"
        )
    return known[name]
