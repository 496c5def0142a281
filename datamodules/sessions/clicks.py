"""From a log of clicks to sessions for training and test, by the steps of the published preprocessing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from leanlight.contracts import UserError

Array = npt.NDArray[Any]
DAY = 86_400


@dataclass(frozen=True)
class Part:
    """Sessions, one after the other: session s is ``items[offsets[s] : offsets[s + 1]]``."""

    items: Array
    offsets: Array

    @property
    def lengths(self) -> Array:
        """(S,) clicks of each session."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def take(self, sessions: Array) -> Part:
        """The sessions at these positions, in this order."""
        lengths = self.lengths[sessions]
        return Part(self.items[spans(self.offsets[:-1][sessions], lengths)], offsets_of(lengths))

    def keep(self, clicks: Array, least: int) -> tuple[Part, Array]:
        """Leave clicks out, and then sessions that have become short.

        Args:
            clicks: (n,) bool, which ones stay.
            least: clicks that a session must still have.

        Returns the rest, and the positions of its sessions.
        """
        rest = Part(self.items[clicks], offsets_of(clicks)[self.offsets])
        stays = np.flatnonzero(rest.lengths >= least)
        return (rest if len(stays) == len(rest) else rest.take(stays)), stays


def offsets_of(lengths: Array) -> Array:
    """(S + 1,) int64 where sessions of these lengths begin and end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def spans(starts: Array, lengths: Array) -> Array:
    """Runs of whole numbers one after the other, int64: each from its start, as long as it says."""
    offsets = offsets_of(lengths)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)


@dataclass(frozen=True)
class Items:
    """What a source knows of its items, by number from 0.

    Args:
        names: original ids.
        item: (P,) with `category` the pairs of an item and a category that it belongs to.
        category: (P,) from 0.
        categories: names of categories.
    """

    names: tuple[str, ...]
    item: Array
    category: Array
    categories: tuple[str, ...]


@dataclass(frozen=True)
class Raw:
    """Sessions that are split into training and test, in order of time.

    Args:
        train: training sessions; items from 0.
        test: test sessions.
        items: their items.
        source: where they come from, in words.
    """

    train: Part
    test: Part
    items: Items
    source: str


@dataclass(frozen=True)
class ClickLog:
    """Clicks as they stand in a log.

    Args:
        session: (n,) number of the session, or of the user where the log has no sessions.
        item: (n,) number of the item, from 0.
        time: (n,) seconds.
        order: (n,) by which the clicks of a session are ordered, if not by `time`.
        items: what is known of the items.
        source: where it was found, in words.
    """

    session: Array
    item: Array
    time: Array
    order: Array | None
    items: Items
    source: str


@dataclass(frozen=True)
class Thresholds:
    """Which clicks of a log are used, and where it is cut; see `SessionDataModule` for what each does."""

    min_session_length: int = 2
    min_item_clicks: int = 5
    max_session_length: int | None = None
    long_sessions: Literal["drop", "cut"] = "drop"
    max_items: int | None = None
    first_sessions: int | None = None
    session_gap: float | None = None
    test_days: float = 7.0


def split_log(log: ClickLog, rules: Thresholds) -> Raw:
    """Sessions of a log, without rare items and short sessions, split by the date of their last click.

    As in the published code (SR-GNN's `preprocess.py`): sessions that are too short go, then rare items, then sessions
    that have become too short. Sessions exactly at the cut between training and test are in neither part.

    Args:
        log: clicks in any order.
        rules: see `Thresholds`; ``session_gap`` None keeps the log's sessions.
    """
    clicks, dates = _sessions(_frequent(log, rules.max_items), rules.session_gap)
    if rules.first_sessions is not None:
        chosen = np.sort(np.argsort(dates, kind="stable")[: rules.first_sessions])
        clicks, dates = clicks.take(chosen), dates[chosen]
    clicks, dates = _longer(clicks, dates, rules.min_session_length)
    counts = np.bincount(clicks.items, minlength=len(log.items.names))
    clicks, stays = clicks.keep(counts[clicks.items] >= rules.min_item_clicks, rules.min_session_length)
    clicks, dates = _shorter(clicks, dates[stays], rules)
    if not len(clicks):
        raise UserError(
            f"min_item_clicks: expected a lower threshold than {rules.min_item_clicks} (or a lower min_session_length "
            f"than {rules.min_session_length}), which leaves no session of the {len(log.item):,} clicks in {log.source}"
        )
    # Days are whole numbers of seconds in every log, so that dates compare without rounding.
    cut = dates.max() - rules.test_days * DAY
    in_time = np.argsort(dates, kind="stable")
    train, test = in_time[dates[in_time] < cut], in_time[dates[in_time] > cut]
    for name, chosen in (("training", train), ("test", test)):
        if not len(chosen):
            raise UserError(
                f"test_days: {rules.test_days:g} leaves no {name} session of {len(dates):,}, which span "
                f"{(dates.max() - dates.min()) / DAY:.1f} days"
            )
    return Raw(clicks.take(train), clicks.take(test), log.items, log.source)


def _frequent(log: ClickLog, most: int | None) -> ClickLog:
    """The clicks of the `most` frequent items; of equally frequent ones those that come first."""
    if most is None or most >= len(log.items.names):
        return log
    counts = np.bincount(log.item, minlength=len(log.items.names))
    chosen = np.zeros(len(counts), bool)
    chosen[np.argsort(-counts, kind="stable")[:most]] = True
    kept = chosen[log.item]
    order = None if log.order is None else log.order[kept]
    return replace(log, session=log.session[kept], item=log.item[kept], time=log.time[kept], order=order)


def _sessions(log: ClickLog, gap: float | None) -> tuple[Part, Array]:
    """All sessions with their clicks in order, and when the last click of each was."""
    by = np.lexsort((log.time if log.order is None else log.order, log.session))
    session, time = log.session[by], log.time[by]
    starts = np.ones(len(by), bool)
    starts[1:] = session[1:] != session[:-1]
    if gap is not None:
        starts[1:] |= np.diff(time) > gap * 3600
    offsets = np.append(np.flatnonzero(starts), len(by)).astype(np.int64)
    dates = np.maximum.reduceat(time, offsets[:-1]) if len(by) else time
    return Part(log.item[by].astype(np.int64), offsets), dates


def _longer(clicks: Part, dates: Array, least: int) -> tuple[Part, Array]:
    chosen = np.flatnonzero(clicks.lengths >= least)
    return clicks.take(chosen), dates[chosen]


def _shorter(clicks: Part, dates: Array, rules: Thresholds) -> tuple[Part, Array]:
    """Sessions of at most ``max_session_length`` clicks: longer ones go, or are cut into pieces."""
    most = rules.max_session_length
    if most is None:
        return clicks, dates
    if rules.long_sessions == "drop":
        chosen = np.flatnonzero(clicks.lengths <= most)
        return clicks.take(chosen), dates[chosen]
    pieces = -(-clicks.lengths // most)
    first = np.repeat(clicks.offsets[:-1], pieces)
    number = spans(np.zeros_like(pieces), pieces)
    offsets = np.append(first + number * most, clicks.offsets[-1])
    return _longer(Part(clicks.items, offsets), np.repeat(dates, pieces), rules.min_session_length)
