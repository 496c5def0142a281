"""Draw media items as files. Imports no lightning, so that programs without a Trainer draw as quickly."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from leanlight.contracts import (
    Animation,
    Bars,
    Curve,
    Heatmap,
    Histogram,
    ImageGrid,
    MediaItem,
    Scatter,
    Table,
    atomic_path,
    atomic_write,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008): eight colours that stay apart for colour-blind readers; yellow is left out on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D")
_SMALLEST_TILE = 64  # pixels; smaller images are enlarged by whole factors, so that each pixel stays a square
_LARGEST_LABELLED = 12  # rows of a heat map whose values can still be read
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
}


def render(item: MediaItem, path: Path, title: str) -> Path:
    """Draw a picture and return its file.

    Args:
        item: what to draw.
        path: of the file without its ending: ``.png``, ``.gif`` or ``.csv`` is added.
        title: stands above it; animations and tables have none.
    """
    if isinstance(item, Table):
        return _write_table(item, _ending(path, ".csv"))
    if isinstance(item, Animation):
        return _write_animation(item, _ending(path, ".gif"))
    target = _ending(path, ".png")
    if isinstance(item, ImageGrid):
        with atomic_path(target) as part:
            _draw_grid(item, title).save(part, format="PNG")
        return target
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure = _draw_figure(item, title)
        with atomic_path(target) as part:
            figure.savefig(part, format="png", dpi=120)
    return target


def size_of(file: Path) -> tuple[int, int]:
    """Width and height of a drawn picture in pixels."""
    with Image.open(file) as image:
        return image.size


def _ending(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)  # not with_suffix: a name may hold a dot


def _write_table(item: Table, target: Path) -> Path:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([item.columns, *item.rows])
    atomic_write(target, text.getvalue())
    return target


# -- pixels


def _pixels(images: Tensor) -> np.ndarray:
    """(N, C, H, W) in [0, 1] → (N, H', W', 3) uint8, enlarged by a whole factor where small."""
    images = images.detach().float().cpu().nan_to_num(0.0).clamp(0, 1)
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    factor = max(1, math.ceil(_SMALLEST_TILE / max(images.shape[2:])))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _write_animation(item: Animation, target: Path) -> Path:
    frames = [Image.fromarray(frame) for frame in _pixels(item.frames)]
    with atomic_path(target) as part:
        frames[0].save(
            part, format="GIF", save_all=True, append_images=frames[1:], duration=round(1000 / item.fps), loop=0
        )
    return target


def _draw_grid(item: ImageGrid, title: str) -> Image.Image:
    tiles = _pixels(item.images)
    count, height, width, _ = tiles.shape
    columns = max(1, min(item.columns, count))
    font, heading, gap, margin = _font(12), _font(15), 6, 12
    texts = [_wrapped(text, font, width) for text in item.captions]
    line = 15
    caption = line * max((len(lines) for lines in texts), default=0)
    cell = (width + gap, height + caption + gap)
    size = (
        max(columns * cell[0] - gap, int(heading.getlength(title))) + 2 * margin,
        math.ceil(count / columns) * cell[1] - gap + 2 * margin + 24,
    )
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, margin - 2), title, fill="black", font=heading)
    for number, tile in enumerate(tiles):
        left, top = margin + number % columns * cell[0], margin + 24 + number // columns * cell[1]
        sheet.paste(Image.fromarray(tile), (left, top))
        for row, text in enumerate(texts[number] if number < len(texts) else []):
            pen.text((left, top + height + row * line), text, fill="#333333", font=font)
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font of the figures; Pillow's own lacks arrows and Greek."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Break `text` at spaces into lines of at most `width` pixels; a longer word is cut."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width and len(word) > 1:
            word = word.removesuffix("…")[:-1] + "…"
        lines.append(word)
    return lines


# -- figures


def _draw_figure(item: Curve | Histogram | Heatmap | Scatter | Bars, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_size(item), layout="constrained")
    axes = figure.add_subplot()
    if isinstance(item, Curve):
        _draw_curve(axes, item)
    elif isinstance(item, Histogram):
        _draw_histogram(axes, item)
    elif isinstance(item, Heatmap):
        _draw_heatmap(figure, axes, item)
    elif isinstance(item, Scatter):
        _draw_scatter(axes, item)
    else:
        _draw_bars(axes, item)
    axes.set_title(title)
    return figure


def _size(item: MediaItem) -> tuple[float, float]:
    """Inches."""
    if isinstance(item, Bars):
        return 6.4, 1.3 + 0.3 * max(2, len(item.values))
    if isinstance(item, Heatmap):
        rows, columns = item.matrix.shape
        return min(12.0, 3.2 + 0.42 * min(columns, 20)), min(11.0, 2.2 + 0.36 * min(rows, 20))
    return 6.4, 4.0


def _styled(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Each name with a colour and a line style; styles change too, so that print and many series stay readable."""
    return [
        (name, COLOURS[i % len(COLOURS)], _LINES[(i + i // len(COLOURS)) % len(_LINES)]) for i, name in enumerate(names)
    ]


def _draw_curve(axes: Axes, item: Curve) -> None:
    marker = "o" if len(item.x) <= 12 else ""
    for name, colour, style in _styled(list(item.series)):
        axes.plot(item.x, item.series[name], style, color=colour, label=name, marker=marker, markersize=4)
        if name in item.bands:
            axes.fill_between(item.x, *item.bands[name], color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel=item.xlabel, ylabel=item.ylabel)
    if item.log_y:
        axes.set_yscale("log")
    if len(item.series) > 1:
        axes.legend()


def _draw_histogram(axes: Axes, item: Histogram) -> None:
    series = {name: values.detach().float().cpu().flatten() for name, values in item.series.items()}
    series = {name: values[values.isfinite()] for name, values in series.items()}
    filled = [values for values in series.values() if len(values)]
    low, high = (min(float(v.min()) for v in filled), max(float(v.max()) for v in filled)) if filled else (0.0, 1.0)
    edges = np.asarray(item.bins, dtype=float)
    if not edges.ndim:
        edges = np.linspace(low, high if high > low else low + 1.0, int(edges) + 1)
    for name, colour, style in _styled(list(series)):
        shares = np.histogram(series[name].numpy(), edges)[0] / max(1, len(series[name]))
        axes.stairs(shares, edges, color=colour, linestyle=style, linewidth=1.6, label=name)
        axes.stairs(shares, edges, color=colour, alpha=0.15, fill=True)
    axes.set(xlabel=item.xlabel, ylabel="share")
    if len(series) > 1:
        axes.legend()


def _draw_heatmap(figure: Figure, axes: Axes, item: Heatmap) -> None:
    matrix = item.matrix.detach().float().cpu().numpy()
    axes.grid(False)
    shown = axes.imshow(matrix, cmap="cividis", aspect="auto", interpolation="nearest")
    figure.colorbar(shown, ax=axes)
    axes.set(xlabel=item.xlabel, ylabel=item.ylabel)
    axes.locator_params(integer=True)
    if item.columns:
        slant = max(map(len, item.columns)) > 3
        axes.set_xticks(
            range(len(item.columns)), item.columns, rotation=45 if slant else 0, ha="right" if slant else "center"
        )
    if item.rows:
        axes.set_yticks(range(len(item.rows)), item.rows)
    if max(matrix.shape) <= _LARGEST_LABELLED and np.isfinite(matrix).all():
        middle = (matrix.max() + matrix.min()) / 2
        whole = bool((matrix == matrix.round()).all())
        for (row, column), value in np.ndenumerate(matrix):
            if whole and value == 0:  # in a table of counts the rest is easier to see without noughts
                continue
            text = f"{value:.0f}" if whole else f"{value:.2g}"
            axes.text(
                column, row, text, ha="center", va="center", fontsize=8, color="black" if value > middle else "white"
            )


def _draw_scatter(axes: Axes, item: Scatter) -> None:
    for number, (name, points) in enumerate(item.series.items()):
        x, y = points.detach().float().cpu().T.numpy()
        colour, marker = COLOURS[number % len(COLOURS)], _MARKERS[number // len(COLOURS) % len(_MARKERS)]
        axes.scatter(x, y, s=10, c=colour, marker=marker, alpha=0.7, linewidths=0, label=name)
    axes.set(xlabel=item.xlabel, ylabel=item.ylabel)
    if item.equal:
        axes.set_aspect("equal")
    if len(item.series) > 1:
        axes.legend(fontsize=8, markerscale=2, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_bars(axes: Axes, item: Bars) -> None:
    names, values = list(item.values), [float(value) for value in item.values.values()]
    bars = axes.barh(names, values, color=COLOURS[0], height=0.65)
    axes.bar_label(bars, labels=[f"{value:.3g}" for value in values], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlabel(item.ylabel)
