"""Similarities between the items of one class, never as more numbers than are asked for."""

from __future__ import annotations

import copy
import math
from typing import Literal

import torch
from torch import Tensor

from leanlight.contracts import UserError
from lit_modules.selection.features import Features, finite

#: Up to so many items the whole kernel is kept, 0.6 GB at most; above, rows are computed where they are needed.
TABLE_ITEMS = 12_000
#: Similarities computed at once in float64.
_BLOCK = 2**22


class Kernel:
    """Similarities of N items to one another.

    They are computed in float64 and rounded to multiples of `grid`, at most 2**24 of them. So float32 holds them, sums
    of them in float64 are exact in whatever order, and a greedy rule picks the same items whether it takes rows one by
    one, in blocks, or from a table.

    Args:
        factors: tensors with N rows that the similarities are computed from.
        lowest: no similarity is below it.
        highest: no similarity is above it.

    Raises:
        UserError: a factor is not finite.
    """

    def __init__(self, *factors: Tensor, lowest: float, highest: float) -> None:
        self.factors = tuple(finite(factor, "features").double().contiguous() for factor in factors)
        largest = max(abs(lowest), abs(highest), highest - lowest)
        self.grid = 2.0 ** (math.ceil(math.log2(largest)) - 24) if largest > 0 else 2.0**-24
        self.lowest = math.floor(lowest / self.grid) * self.grid
        self._table: Tensor | None = None
        # The kernel that this one is a part of, and where in it.
        self._whole: tuple[Kernel, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.factors[0])

    @property
    def in_memory(self) -> bool:
        """Whether the similarities are kept, so that rows cost next to nothing once they are there."""
        return self._whole is not None or len(self) <= TABLE_ITEMS

    def rows(self, items: Tensor) -> Tensor:
        """(n, N) float32 similarities of these items, (n,) int64, to all."""
        if self._whole is not None:
            whole, place = self._whole
            return whole.rows(place[items])[:, place]
        if not self.in_memory:
            return self.computed(items)
        if self._table is None:
            self._table = self.all_rows()
        return self._table[items]

    def take(self, items: Tensor) -> Kernel:
        """The kernel of these items alone, (n,) int64; what is kept of this one serves it, too."""
        own = copy.copy(self)
        own.factors = tuple(factor[items] for factor in self.factors)
        own._table = None
        if self._whole is not None:
            own._whole = self._whole[0], self._whole[1][items]
        elif self.in_memory:
            own._whole = self, items
        return own

    def column_sums(self) -> Tensor:
        """(N,) float64 sums over all items, each item's similarity to itself included; multiples of the grid."""
        return self.rounded(self.sums(torch.arange(len(self))))

    def sums(self, items: Tensor) -> Tensor:
        """(N,) float64 sums of `rows`; heirs that know them in closed form give sums of what is not rounded."""
        total = torch.zeros(len(self), dtype=torch.float64)
        for some in items.split(256):
            total += self.rows(some).sum(0, dtype=torch.float64)
        return total

    def computed(self, items: Tensor, others: Tensor | slice = slice(None)) -> Tensor:
        """(n, m) float32 similarities of items to others, to all by default, computed anew."""
        width = len(others) if isinstance(others, Tensor) else len(self)
        found = torch.empty(len(items), width)
        size = min(max(_BLOCK // width, 1), 256)
        for begin in range(0, len(items), size):
            steps = self._steps(items[begin : begin + size], others)
            torch.mul(steps.round_(), self.grid, out=found[begin : begin + size])
        return found

    def rounded(self, value: Tensor) -> Tensor:
        """The nearest multiples of the grid, float64."""
        return (value / self.grid).round() * self.grid

    def all_rows(self) -> Tensor:
        """(N, N) float32, computed anew, each pair once."""
        found = torch.empty(len(self), len(self))
        for items in torch.arange(len(self)).split(256):
            begin, end = int(items[0]), int(items[-1]) + 1
            torch.mul(self._steps(items, slice(begin, None)).round_(), self.grid, out=found[begin:end, begin:])
            found[end:, begin:end] = found[begin:end, end:].T
        return found

    def _steps(self, items: Tensor, others: Tensor | slice) -> Tensor:
        """(n, m) float64 similarities of items to others, as multiples of the grid, before they are rounded."""
        raise NotImplementedError


class Cosine(Kernel):
    """``1/2 + 1/2 cos(x_i, x_j)``; a vector of length 0 has cosine 0 with every other.

    Args:
        x: (N, D) float.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__(unit(x), lowest=0.0, highest=1.0)

    def _steps(self, items: Tensor, others: Tensor | slice) -> Tensor:
        (x,) = self.factors
        half = 0.5 / self.grid
        return ((half * x[items]) @ x[others].T).add_(half)

    def sums(self, items: Tensor) -> Tensor:
        (x,) = self.factors
        return 0.5 * len(items) + 0.5 * (x @ x[items].sum(0))


class GradientCosine(Kernel):
    """`Cosine` of the loss gradients in a last layer, ``[delta; delta h']``, without these K (1 + D) numbers an item.

    The cosine of two products is the product of the cosines: ``cos(delta_i, delta_j) cos([1, h_i], [1, h_j])``.

    Args:
        error: (N, K) gradients delta in the logits, see `error_of`.
        embedding: (N, D) what the last layer reads, h.
    """

    def __init__(self, error: Tensor, embedding: Tensor) -> None:
        super().__init__(unit(error), unit(with_bias(embedding)), lowest=0.0, highest=1.0)

    def _steps(self, items: Tensor, others: Tensor | slice) -> Tensor:
        error, inputs = self.factors
        half = 0.5 / self.grid
        return ((half * error[items]) @ error[others].T).mul_(inputs[items] @ inputs[others].T).add_(half)

    def sums(self, items: Tensor) -> Tensor:
        error, inputs = self.factors
        return 0.5 * len(items) + 0.5 * ((inputs @ (inputs[items].T @ error[items])) * error).sum(1)


class NegSquaredDistance(Kernel):
    """``-|x_i - x_j|^2``.

    Args:
        x: (N, D) float.
    """

    def __init__(self, x: Tensor) -> None:
        centred = finite(x, "features").double()
        centred = centred - centred.mean(0)
        norm = centred.square().sum(1)
        super().__init__(centred, norm, lowest=-4 * float(norm.max()), highest=0.0)

    def _steps(self, items: Tensor, others: Tensor | slice) -> Tensor:
        x, norm = self.factors
        found = ((2 * x[items]) @ x[others].T).sub_(norm[others]).sub_(norm[items, None])
        return found.clamp_(max=0).mul_(1 / self.grid)

    def sums(self, items: Tensor) -> Tensor:
        x, norm = self.factors
        return 2 * (x @ x[items].sum(0)) - norm[items].sum() - len(items) * norm


class GradientCloseness(Kernel):
    """How much nearer than the farthest two gradients are, ``2 max|g| - |g_i - g_j|``, with g as in `GradientCosine`.

    Args:
        error: (N, K) gradients delta in the logits, see `error_of`.
        embedding: (N, D) what the last layer reads, h.
    """

    def __init__(self, error: Tensor, embedding: Tensor) -> None:
        error, inputs = finite(error, "features").double(), with_bias(finite(embedding, "features").double())
        norm = error.square().sum(1) * inputs.square().sum(1)
        self.highest = 2 * float(norm.max().sqrt())
        super().__init__(error, inputs, norm, lowest=0.0, highest=self.highest)

    def _steps(self, items: Tensor, others: Tensor | slice) -> Tensor:
        error, inputs, norm = self.factors
        scale = norm[items, None] + norm[others]
        square = ((-2 * error[items]) @ error[others].T).mul_(inputs[items] @ inputs[others].T).add_(scale)
        # Equal gradients differ by rounding; the root would make 1e-8 of 1e-16.
        square.masked_fill_(square < scale.mul_(1e-12), 0.0)
        return square.sqrt_().neg_().add_(self.highest).mul_(1 / self.grid)


def kernel_of(
    features: Features,
    feature: Literal["gradient", "embedding"] = "gradient",
    double_softmax: bool = False,
    similarity: Literal["cosine", "neg_sqeuclid"] = "cosine",
) -> Kernel:
    """The kernel of the items of one class.

    Args:
        features: of the class.
        feature: what similarities are taken between: the loss ``gradient`` in the last layer, or the ``embedding``.
        double_softmax: of the gradient, see `error_of`.
        similarity: ``cosine`` (0 to 1), or ``neg_sqeuclid`` of embeddings.

    Raises:
        UserError: distances of gradients.
    """
    if feature == "gradient":
        if similarity != "cosine":
            raise UserError(f"similarity: expected cosine with feature: gradient, got {similarity}")
        return GradientCosine(error_of(features["logits"], features.label, double_softmax), features["embedding"])
    return Cosine(features["embedding"]) if similarity == "cosine" else NegSquaredDistance(features["embedding"])


def error_of(logits: Tensor, label: Tensor, double_softmax: bool = False) -> Tensor:
    """Gradients of the cross-entropy in the logits: (N, K) float64, ``softmax(z) - onehot(y)``.

    Args:
        logits: (N, K) float.
        label: (N,) int64.
        double_softmax: of the cross-entropy of ``softmax(z)``, as the code of DQ takes it.
    """
    probability = finite(logits, "features: logits").double().softmax(1)
    own = label[:, None]
    error = probability
    if double_softmax:
        outer = probability.softmax(1)
        outer.scatter_add_(1, own, -torch.ones_like(own, dtype=outer.dtype))
        error = probability * (outer - (probability * outer).sum(1, keepdim=True))
    # They sum to 0, which keeps the digits that 1 - softmax loses for items fitted almost perfectly.
    error = error.scatter(1, own, 0.0)
    return error.scatter(1, own, -error.sum(1, keepdim=True))


def with_bias(embedding: Tensor) -> Tensor:
    """(N, 1 + D): what a layer's weights and bias are multiplied by."""
    return torch.cat([torch.ones_like(embedding[:, :1]), embedding], 1)


def unit(x: Tensor) -> Tensor:
    """Vectors of length 1 in float64; zeros stay."""
    x = finite(x, "features").double()
    # By the largest number first, so that squares neither overflow nor vanish.
    x = x / x.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return x / x.norm(dim=1, keepdim=True).clamp_min(0.5)
