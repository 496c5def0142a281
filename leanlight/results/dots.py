"""Dot plots of a table as SVG: a dot a seed, the mean, and its 95 % interval, on an axis that shows differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import LogLocator, MaxNLocator

from leanlight.results.claims import interval
from leanlight.results.format import columns, show_measured, show_metric, show_number
from leanlight.results.groups import best_row, group_rows

WIDTH = 460  # of a panel, in pixels
_LEFT, _RIGHT = 176, 398  # of the plot; labels and means stand beside it
_TOP, _LINE, _BOTTOM = 30, 19, 24
_LONGEST = 27  # of a label, in characters
_DECADES = 1.7  # from so many powers of ten on an axis is logarithmic


@dataclass(frozen=True)
class Line:
    """A row in a panel. Positions are in pixels; seeds, mean, low and high along x. heading: starts a group."""

    label: str
    y: float
    value: str = ""
    hover: str = ""
    seeds: Sequence[float] = ()
    mean: float | None = None
    low: float = 0.0
    high: float = 0.0
    best: bool = False
    heading: bool = False


@dataclass(frozen=True)
class Panel:
    """One metric over rows. ticks: position along x and text."""

    title: str
    height: int
    lines: Sequence[Line]
    ticks: Sequence[tuple[float, str]]
    width: int = WIDTH
    left: int = _LEFT
    right: int = _RIGHT
    top: int = _TOP


class _Axis:
    """From values to positions.

    The axis begins at zero only where zero is near: the differences between rows are what a reader looks for.
    """

    def __init__(self, seeds: Sequence[float], ends: Sequence[float]) -> None:
        low, high = min(seeds), max(seeds)
        self.log = low > 0 and math.log10(high / low) > _DECADES
        if self.log:
            self.low, self.high = low / 1.3, high * 1.3
        else:
            low, high = min(low, *ends), max(high, *ends)
            if 0 < low < high / 4:
                low = 0.0
            pad = 0.04 * (high - low) or abs(high) * 0.05 or 1.0
            self.low, self.high = low - pad, high + pad

    def at(self, value: float) -> float:
        """Position of a value; of one beyond the axis, its end."""
        value = min(max(value, self.low), self.high)
        low, high, x = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return round(_LEFT + (x - low) / (high - low) * (_RIGHT - _LEFT), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """A few round numbers."""
        locator = LogLocator(numticks=5) if self.log else MaxNLocator(5, steps=[1, 2, 5, 10])
        values = [float(value) for value in locator.tick_values(self.low, self.high)]
        return [(self.at(value), f"{value:,.6g}") for value in values if self.low <= value <= self.high]


def draw_dots(
    document: Mapping[str, Any], metric: str, rows: Sequence[Mapping[str, Any]] | None = None
) -> Panel | None:
    """The panel of a metric over all rows of a table, or over `rows`; None where no row has it."""
    groups = group_rows(document["rows"] if rows is None else rows)
    shown = document["metrics"][metric]
    values = {
        row["name"]: [value * shown["scale"] for value in row["metrics"][metric]["by_seed"].values()]
        for group in groups.values()
        for row in group
        if metric in row["metrics"]
    }
    if not values:
        return None
    ends = {name: interval(of_row) if len(of_row) > 1 else (of_row[0],) * 2 for name, of_row in values.items()}
    axis = _Axis([v for of_row in values.values() for v in of_row], [end for pair in ends.values() for end in pair])
    lines: list[Line] = []
    y = _TOP + _LINE / 2
    for name, group in groups.items():
        if name:
            lines.append(Line(name, y, heading=True))
            y += _LINE
        best = best_row(group, metric, shown["higher_is_better"])
        for row in group:
            lines.append(_line(row, y, metric, shown, values.get(row["name"]), axis, ends.get(row["name"]), best))
            y += _LINE
    return Panel(show_metric(shown), round(y - _LINE / 2 + _BOTTOM), lines, axis.ticks())


def _line(
    row: Mapping[str, Any],
    y: float,
    metric: str,
    shown: Mapping[str, Any],
    values: Sequence[float] | None,
    axis: _Axis,
    ends: Sequence[float] | None,
    best: str | None,
) -> Line:
    label = _short(row["label"])
    if values is None or ends is None:
        return Line(label, y, show_number(None, 0))
    measured = row["metrics"][metric]
    mean = measured["mean"] * shown["scale"]
    return Line(
        label,
        y,
        show_number(mean, shown["digits"]),
        f"{row['label']}: {show_measured(measured, shown)}",
        [axis.at(value) for value in values],
        axis.at(mean),
        axis.at(ends[0]),
        axis.at(ends[1]),
        row["name"] == best,
    )


def all_dots(document: Mapping[str, Any]) -> list[Panel]:
    """A panel for each metric with a column that some row has."""
    return [panel for name in columns(document) if (panel := draw_dots(document, name))]


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
