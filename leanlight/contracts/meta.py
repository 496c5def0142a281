"""What a DataModule tells about its data once it is set up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DataMeta:
    """Facts about a data set.

    name: catalogue name, e.g. ``fashion_mnist``. source: where it was found, in words a table can show.
    num_classes: number of labels. shape: (C, H, W) of one item. classes: label names, index = label.
    counts: items per split. class_counts: items per class of the training split.
    fingerprint: sha256 over the items, labels and split, so that two runs can prove they saw the same data.
    extra: further facts a kind of data has (items in a catalogue, category map, modality sizes, …).
    """

    name: str
    source: str
    num_classes: int
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    counts: dict[str, int]
    class_counts: tuple[int, ...]
    fingerprint: str
    extra: dict[str, Any] = field(default_factory=dict)
