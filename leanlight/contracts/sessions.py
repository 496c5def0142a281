"""Sessions of clicks: their batch, their facts, and what a DataModule of sessions offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from leanlight.contracts.batch import Batch
from leanlight.contracts.meta import DataMeta


@dataclass(frozen=True)
class SessionBatch(Batch):
    """Beginnings of sessions, and the item that was clicked next. Items are numbered from 1; 0 is padding.

    Args:
        items: (N, L) int64, the clicks in their order, from the left; 0 behind them.
        length: (N,) int64 number of clicks, at least 1.
        target: (N,) int64 next item.
        index: (N,) int64 position of each case in its split.
    """

    items: Tensor
    length: Tensor
    target: Tensor
    index: Tensor


@dataclass(frozen=True, kw_only=True)
class SessionMeta(DataMeta):
    """Facts of a set of sessions. `counts` are cases: one for every click of a session but its first.

    Args:
        num_items: m, items of the catalogue: those with a click in training.
        num_categories: k, categories that they belong to; 0 where there are none.
        num_head: items in the head, the others are the tail.
        max_length: clicks of the longest case.
        items_sha256: of the original ids, in the order of their numbers.
    """

    num_items: int
    num_categories: int
    num_head: int
    max_length: int
    items_sha256: str


@dataclass(frozen=True)
class Sessions:
    """Whole sessions, one after the other.

    Args:
        items: (clicks,) int64, numbered from 1.
        offsets: (S + 1,) int64; session s is ``items[offsets[s] : offsets[s + 1]]``.
    """

    items: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class Catalogue:
    """What is known of the items, by number. Row 0 of the tensors is padding.

    Args:
        names: (m,) the items' original ids; that of item i at i - 1.
        categories: (k,) names of categories.
        item: (P,) int64, with `category` the pairs of an item and a category that it belongs to, by item.
        category: (P,) int64, from 0.
        clicks: (m + 1,) int64, clicks in training.
        head: (m + 1,) bool, whether an item is among the most clicked.
    """

    names: tuple[str, ...]
    categories: tuple[str, ...]
    item: Tensor
    category: Tensor
    clicks: Tensor
    head: Tensor

    @property
    def num_items(self) -> int:
        """Items m, without padding."""
        return len(self.names)


@runtime_checkable
class SessionData(Protocol):
    """A DataModule of sessions: batches are `SessionBatch`."""

    meta: SessionMeta
    catalogue: Catalogue
    #: The training sessions as a whole, each once.
    train_sessions: Sessions
