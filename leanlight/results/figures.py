"""Figures of a table that need axes of their own: learning curves, means over a setting, performance profiles."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from leanlight.results.claims import interval
from leanlight.results.profile import confidence_band, shares_above

# Distinguishable with the common colour deficiencies, readable on light and dark ground.
PALETTE = ("#4c7fc0", "#d98032", "#479c72", "#b9609a", "#8a7fce", "#9a8a45", "#4fa8ba", "#b95d5d")
_MAX_POINTS = 400  # of one curve; more cannot be seen


@dataclass(frozen=True)
class Theme:
    """Colours of a figure's ground and text."""

    ground: str
    text: str
    faint: str


LIGHT = Theme("#ffffff", "#2a2f36", "#dfe3e8")
DARK = Theme("#1b1f24", "#d5dae0", "#363c44")


@dataclass(frozen=True)
class Curve:
    """Learning curve of one row: a line for each seed."""

    label: str
    lines: Sequence[tuple[Sequence[float], Sequence[float]]]
    position: int


def draw_curves(curves: Sequence[Curve], xlabel: str, ylabel: str, theme: Theme = LIGHT) -> bytes:
    """PNG of learning curves: a row's mean over seeds, or its lines where they differ in length.

    With few rows also the range of the seeds.
    """
    figure = Figure(figsize=(7.0, max(2.9, 0.19 * len(curves) + 0.6)), facecolor=theme.ground, dpi=144)
    axes = figure.add_subplot()
    for curve in curves:
        color = PALETTE[curve.position % len(PALETTE)]
        style = ("-", "--", ":")[curve.position // len(PALETTE) % 3]
        lines = curve.lines
        if all(list(x) == list(lines[0][0]) for x, _ in lines):
            values = np.array([y for _, y in lines])
            if len(curves) <= len(PALETTE):
                axes.fill_between(lines[0][0], values.min(0), values.max(0), color=color, alpha=0.12, linewidth=0)
            lines = [(lines[0][0], list(values.mean(0)))]
        for order, (x, y) in enumerate(lines):
            label = plain(curve.label, 40) if order == 0 else None
            marker = "." if len(x) < 15 else None
            axes.plot(x, y, color=color, linestyle=style, linewidth=1.3, alpha=0.9, label=label, marker=marker)
    axes.set_xlabel(plain(xlabel), color=theme.text, fontsize=8.5)
    axes.set_title(plain(ylabel), loc="left", color=theme.text, fontsize=9.5)
    calm(axes, theme)
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=7.5, labelcolor=theme.text)
    legend.set_frame_on(False)
    return png(figure)


def draw_profile(groups: Mapping[str, Sequence[Sequence[float]]], xlabel: str, theme: Theme = LIGHT) -> bytes:
    """PNG of performance profiles with bands. groups: label → of each task, the values of its seeds."""
    figure = Figure(figsize=(4.4, 2.9), facecolor=theme.ground, dpi=144)
    axes = figure.add_subplot()
    values = np.concatenate([task for tasks in groups.values() for task in tasks])
    low, high = min(0.0, float(values.min())), float(values.max())
    thresholds = np.linspace(low, high + 0.05 * ((high - low) or 1.0), 300)
    for position, (label, tasks) in enumerate(groups.items()):
        color = PALETTE[position % len(PALETTE)]
        axes.plot(thresholds, shares_above(tasks, thresholds), color=color, linewidth=1.5, label=plain(label, 28))
        axes.fill_between(thresholds, *confidence_band(tasks, thresholds), color=color, alpha=0.18, linewidth=0)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(plain(f"{xlabel} τ"), color=theme.text, fontsize=8.5)
    axes.set_title("Share of runs above τ, with 95 % band", loc="left", color=theme.text, fontsize=9.5)
    calm(axes, theme)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=theme.text)
    return png(figure)


def draw_means(
    lines: Mapping[str, Sequence[tuple[float, Sequence[float]]]],
    title: str,
    xlabel: str,
    ylabel: str,
    theme: Theme = LIGHT,
) -> bytes:
    """PNG of means over x with 95 % intervals: bands, or bars at a line's only point and where bands would be too many.

    lines: label → (x, the values of its seeds), ascending in x.
    """
    figure = Figure(figsize=(7.0, max(3.4, 0.19 * len(lines) + 0.6)), facecolor=theme.ground, dpi=144)
    axes = figure.add_subplot()
    for position, (label, points) in enumerate(lines.items()):
        x, means = [x for x, _ in points], np.array([np.mean(values) for _, values in points])
        ends = np.array([interval(values) if len(values) > 1 else (values[0], values[0]) for _, values in points])
        color = PALETTE[position % len(PALETTE)]
        band = len(points) > 1 and len(lines) <= len(PALETTE)
        if band:
            axes.fill_between(x, ends[:, 0], ends[:, 1], color=color, alpha=0.15, linewidth=0)
        axes.errorbar(
            x,
            means,
            yerr=None if band else np.abs(ends.T - means),
            color=color,
            linestyle=("-", "--", ":")[position // len(PALETTE) % 3],
            marker="osD^v"[position % 5],
            markersize=3.5,
            linewidth=1.3,
            capsize=2,
            alpha=0.9,
            label=plain(label, 40),
        )
    _mark_settings(axes, sorted({x for points in lines.values() for x, _ in points}))
    axes.set_xlabel(plain(xlabel.replace("_", " ")), color=theme.text, fontsize=8.5)
    axes.set_ylabel(plain(ylabel), color=theme.text, fontsize=8.5)
    axes.set_title(plain(f"{title}, mean and 95 % interval"), loc="left", color=theme.text, fontsize=9.5)
    calm(axes, theme)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=7.5, frameon=False, labelcolor=theme.text)
    return png(figure)


def _mark_settings(axes: Axes, x: Sequence[float]) -> None:
    """Ticks at the few settings measured, on a logarithmic axis where they lie far apart."""
    if x[0] > 0 and x[-1] >= 8 * x[0]:
        axes.set_xscale("log")
    if len(x) <= 8:
        axes.set_xticks(x, [f"{value:g}" for value in x])
        axes.set_xticks([], minor=True)


def calm(axes: Axes, theme: Theme) -> None:
    """Give axes the suite's look: a faint grid, no frame."""
    axes.set_facecolor(theme.ground)
    axes.grid(color=theme.faint, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=theme.text, labelsize=8.5, length=0)


def plain(text: str, longest: int = 60) -> str:
    """Text that fits and that matplotlib takes literally: a dollar would start a formula."""
    short = text if len(text) <= longest else text[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return short.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """A figure as PNG."""
    figure.tight_layout(pad=0.6)
    buffer = io.BytesIO()
    # No metadata: the same results give the same bytes.
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def read_curve(run_dir: Path, metric: str) -> tuple[str, list[float], list[float]] | None:
    """Values of `metric` in a run's metrics.csv over its unit of progress: (unit, x, y), or None for fewer than 2."""
    path = run_dir / "metrics.csv"
    if not path.is_file():
        return None
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        unit = next((name for name in columns if name.startswith("progress/")), "step")
        points = [
            (float(row[unit]), float(row[metric])) for row in reader if metric in columns and row[metric] and row[unit]
        ]
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2:
        return None
    points = points[:: max(1, len(points) // _MAX_POINTS)]
    return unit.removeprefix("progress/"), [x for x, _ in points], [y for _, y in points]
