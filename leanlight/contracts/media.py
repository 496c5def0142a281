"""Pictures a method offers, as data. Callbacks and reports decide how to draw and where to send them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class ImageGrid:
    """images: (N, C, H, W) float in [0, 1], C 1 or 3. columns: images a row. captions: N strings or none."""

    images: Tensor
    columns: int = 10
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class Curve:
    """Lines over a shared axis: x has L values, every series has L values.

    bands: for some of the series, by name, the lower and upper ends of a band around it, L values each.
    """

    x: Sequence[float]
    series: Mapping[str, Sequence[float]]
    xlabel: str
    ylabel: str
    log_y: bool = False
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Histogram:
    """Distributions drawn over one another: each series is a 1-D tensor of values. bins: how many, or their edges."""

    series: Mapping[str, Tensor]
    xlabel: str
    bins: int | Sequence[float] = 40


@dataclass(frozen=True)
class Heatmap:
    """matrix: (R, C). rows, columns: labels of the two axes' ticks, or none."""

    matrix: Tensor
    xlabel: str
    ylabel: str
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()


@dataclass(frozen=True)
class Scatter:
    """Points of a plane: each series is (P, 2), columns x and y. equal: whether both axes have one scale."""

    series: Mapping[str, Tensor]
    xlabel: str
    ylabel: str
    equal: bool = False


@dataclass(frozen=True)
class Bars:
    """One bar a name."""

    values: Mapping[str, float]
    ylabel: str


@dataclass(frozen=True)
class Table:
    """rows: one sequence of cells a row, as long as columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int]]


@dataclass(frozen=True)
class Animation:
    """frames: (T, C, H, W) float in [0, 1]. fps: frames a second."""

    frames: Tensor
    fps: float = 10.0


MediaItem = ImageGrid | Curve | Histogram | Heatmap | Scatter | Bars | Table | Animation
