"""What a DataModule tells about its data once it is set up, whatever its kind."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataMeta:
    """Facts that every kind of data has; each kind adds its own (`ImageMeta`, `GameMeta`).

    Args:
        name: name in the catalogue, e.g. ``fashion_mnist``.
        source: where it was found, in words a table can show.
        counts: items of each split.
        fingerprint: sha256 over items, labels and split, so that two runs can prove they saw the same data.
    """

    name: str
    source: str
    counts: dict[str, int]
    fingerprint: str
