"""Hyperbolic space in two models, and Euclidean space beside it: points, distances, means and nearest points.

With curvature -c, distances grow as ``2/√c · arsinh √s``; s is 0 for equal points. This form keeps its digits where
points are near each other, which the usual one with arcosh does not. Everything is computed in float32 at least, also
under autocast.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveFloat

Kind = Literal["poincare", "lorentz", "euclidean"]

_RIM = 1e-3  # how far, relative to the radius of the ball, points stay from its rim
_FARTHEST = 15.0  # √c times the length of a tangent vector: beyond, tanh is 1 and cosh squared leaves float32
_F = TypeVar("_F", bound=Callable[..., Any])


def without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """No autocast inside the block. Where there is none anyway nothing is entered: exported programs would keep it.

    device: kind of the device.
    """
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _precisely(method: _F) -> _F:
    """Take tensors in float32 at least, and no autocast."""

    @functools.wraps(method)
    def precise(self: Geometry, *given: Tensor) -> Any:
        device = given[0].device.type
        lifted = (each.float() if each.dtype in (torch.float16, torch.bfloat16) else each for each in given)
        with without_autocast(device):
            return method(self, *lifted)

    return cast(_F, precise)


@dataclass(frozen=True)
class Geometry:
    """A space of points, made from vectors u at its origin.

    Args:
        kind: ``poincare`` ball, ``lorentz`` hyperboloid (points have one coordinate more, the first), or ``euclidean``.
            Each has the exponential map that is usual for it: a point lies 2‖u‖, ‖u‖ and ‖u‖ from the origin.
        curvature: c, positive; the space is curved by -c. Euclidean space ignores it.
        clip: r, positive, greatest ‖u‖; longer vectors are shortened to it, so that gradients do not vanish at the rim.
    """

    kind: Kind = "poincare"
    curvature: PositiveFloat = 1.0
    clip: PositiveFloat = 2.3

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"geometry.kind: expected one of {', '.join(get_args(Kind))}, got {self.kind!r}")
        for name, value in (("curvature", self.curvature), ("clip", self.clip)):
            if not 0 < value < float("inf"):
                raise UserError(f"geometry.{name}: expected a positive number, got {value}")

    def width(self, dim: int) -> int:
        """Coordinates of a point that is made from `dim` numbers."""
        return dim + 1 if self.kind == "lorentz" else dim

    @_precisely
    def points(self, u: Tensor) -> Tensor:
        """Exponential map at the origin, after clipping.

        Args:
            u: (..., d) tangent vectors.

        Returns:
            (..., d) points, or (..., d + 1).
        """
        root = self.curvature**0.5
        longest = self.clip if self.kind == "euclidean" else min(self.clip, _FARTHEST / root)
        length = _norm(u)
        u = u * (longest / length).clamp(max=1)
        if self.kind == "euclidean":
            return u
        length = root * length.clamp(max=longest)
        if self.kind == "poincare":
            return self._inside(u * (length.tanh() / length))
        return torch.cat([length.cosh() / root, u * (length.sinh() / length)], -1)

    @_precisely
    def log(self, x: Tensor) -> Tensor:
        """Tangent vectors (..., d) at the origin, whose points are `x`."""
        if self.kind == "euclidean":
            return x
        root = self.curvature**0.5
        space = x[..., 1:] if self.kind == "lorentz" else x
        length = root * _norm(space)
        if self.kind == "lorentz":
            return space * (length.asinh() / length)
        return space * (length.clamp(max=1 - torch.finfo(x.dtype).eps).atanh() / length)

    @_precisely
    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (...) of points (..., d), row by row; shapes are broadcast."""
        difference = x - y
        square = difference.square()
        if self.kind == "poincare":
            return self._length(self.curvature * square.sum(-1) * self._stretch(x) * self._stretch(y))
        if self.kind == "lorentz":
            return self._length(self.curvature / 4 * (square[..., 1:].sum(-1) - square[..., 0]))
        return self._length(square.sum(-1))

    @_precisely
    def pairwise(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances (A, B) of points x (A, d) and y (B, d) by a matrix product.

        Points nearer to each other than about the root of the number format's precision may come out as equal.
        """
        left, right = self._sides(x, y)
        product = left @ right.T
        if self.kind == "poincare":
            return self._length(self.curvature * product * self._stretch(x)[:, None])
        if self.kind == "lorentz":
            return self._length((self.curvature * product - 1) / 2)
        return self._length(product)

    @_precisely
    def nearest(self, query: Tensor, anchors: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest anchor of each point: searched by a matrix product, then measured alone.

        Args:
            query: (N, d) points.
            anchors: (Q, d) points.
            allowed: (N, Q) or (Q,) bool.

        Returns:
            distances (N,) and positions (N,) int64; infinite and -1 where no anchor is allowed.
        """
        left, right = self._sides(query, anchors)
        # Along a row, distances rise as the entries of this product do.
        least, position = (left @ right.T).masked_fill(~allowed, torch.inf).min(1)
        found = least < torch.inf
        distance = self.distance(query, anchors[position])
        return distance.masked_fill(~found, torch.inf), position.masked_fill(~found, -1)

    @_precisely
    def mean(self, points: Tensor, weights: Tensor) -> Tensor:
        """Weighted means: Einstein's midpoints in the ball, centroids on the hyperboloid (the same points).

        Args:
            points: (N, d).
            weights: (K, N) at least 0.

        Returns:
            (K, d); the origin where all weights are 0.
        """
        weights = weights.to(points.dtype)
        if self.kind == "euclidean":
            return (weights @ points) / _or_one(weights.sum(1, keepdim=True))
        if self.kind == "lorentz":
            time, space = (weights @ points).split([1, points.shape[1] - 1], 1)
            # What is left of a sum's time after its space is at least the sum of weights, so digits suffice.
            size = _or_one((time.square() - space.square().sum(1, keepdim=True)).clamp(min=0)).sqrt()
            space = space / (size * self.curvature**0.5)
            return torch.cat([(1 / self.curvature + space.square().sum(1, keepdim=True)).sqrt(), space], 1)
        stretch = self._stretch(points)[:, None]
        factor = (1 + self.curvature * points.square().sum(1, keepdim=True)) * stretch
        klein = (weights @ (2 * points * stretch)) / _or_one(weights @ factor)
        rest = (1 - self.curvature * klein.square().sum(1, keepdim=True)).clamp(min=torch.finfo(points.dtype).eps)
        return self._inside(klein / (1 + rest.sqrt()))

    @_precisely
    def radius(self, x: Tensor) -> Tensor:
        """How far out points lie (...): 0 at the origin, towards 1 at the rim; Euclidean ones as a share of `clip`."""
        if self.kind == "euclidean":
            return _norm(x)[..., 0] / self.clip
        if self.kind == "poincare":
            return self.curvature**0.5 * _norm(x)[..., 0]
        root = self.curvature**0.5
        return root * _norm(x[..., 1:])[..., 0] / (1 + root * x[..., 0])

    def _sides(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Two matrices; entry (i, j) of the one times the transpose of the other rises with the distance of (i, j).

        In the ball it is ``‖x - y‖² / (1 - c‖y‖²)``, on the hyperboloid minus Lorentz's product, else ``‖x - y‖²``.
        """
        if self.kind == "lorentz":
            return torch.cat([x[:, :1], -x[:, 1:]], 1), y
        xx, yy = x.square().sum(1, keepdim=True), y.square().sum(1, keepdim=True)
        left, right = torch.cat([-2 * x, xx, torch.ones_like(xx)], 1), torch.cat([y, torch.ones_like(yy), yy], 1)
        return left, right * self._stretch(y)[:, None] if self.kind == "poincare" else right

    def _stretch(self, x: Tensor) -> Tensor:
        """``1 / (1 - c‖x‖²)`` of points of the ball."""
        return 1 / (1 - self.curvature * x.square().sum(-1))

    def _length(self, s: Tensor) -> Tensor:
        """Distance that belongs to s; 0, with a gradient of 0, where rounding leaves nothing of it."""
        tiny = torch.finfo(s.dtype).tiny
        length = s.clamp(min=tiny).sqrt()
        if self.kind != "euclidean":
            length = 2 / self.curvature**0.5 * length.asinh()
        return torch.where(s > tiny, length, 0)

    def _inside(self, x: Tensor) -> Tensor:
        """Points of the ball, drawn back from its rim."""
        return x * ((1 - _RIM) / self.curvature**0.5 / _norm(x)).clamp(max=1)


def _norm(x: Tensor) -> Tensor:
    """Lengths (..., 1) of vectors, whose gradient at 0 is 0."""
    return x.square().sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny).sqrt()


def _or_one(x: Tensor) -> Tensor:
    """`x`, and 1 where it is 0, so that one can divide by it and take its root."""
    return torch.where(x > 0, x, 1)
