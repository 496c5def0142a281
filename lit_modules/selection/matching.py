"""Rules that choose items of a class by what their loss gradients in the last layer add up to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveFloat
from lit_modules.selection.features import Features, class_picks
from lit_modules.selection.kernels import error_of, with_bias
from lit_modules.selection.rules import ClassRule
from lit_modules.selection.work import Advance


class Gradients:
    """Gradients ``delta [1, h]'`` of N items by their two factors, float64.

    Args:
        error: (N, K) delta.
        inputs: (N, 1 + D) ``[1, h]``.
    """

    def __init__(self, error: Tensor, inputs: Tensor) -> None:
        self.error, self.inputs = error, inputs

    @classmethod
    def of(cls, features: Features) -> Gradients:
        """Those of the cross-entropy."""
        error = error_of(features["logits"], features.label)
        return cls(error, with_bias(features["embedding"].double()))

    def total(self, weight: Tensor, items: Tensor | slice = slice(None)) -> Tensor:
        """(K, 1 + D) weighted sum over items."""
        return (self.error[items] * weight[:, None]).T @ self.inputs[items]

    def along(self, direction: Tensor) -> Tensor:
        """(N,) inner products with a direction, (K, 1 + D)."""
        return ((self.inputs @ direction.T) * self.error).sum(1)

    def products(self, item: Tensor, others: Tensor) -> Tensor:
        """(n,) inner products of an item's gradient with those of others."""
        return (self.error[others] @ self.error[item]) * (self.inputs[others] @ self.inputs[item])


@dataclass(frozen=True)
class GradMatch(ClassRule):
    """Items whose weighted gradients add up to the class's mean (Killamsetty et al. 2021), by matching pursuit.

    Weights are not negative, and items of weight 0 are left out: there may be fewer than the budget. Weights of a class
    are scaled by its number of items.

    Args:
        ridge: added to the squares of weights.
    """

    ridge: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ridge > 0:
            raise UserError(f"ridge: expected more than 0, got {self.ridge}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("embedding", "logits")

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        gradients = Gradients.of(features)
        mean = gradients.total(torch.full((len(features),), 1 / len(features), dtype=torch.float64))
        goal = gradients.along(mean)
        chosen, fit = torch.empty(0, dtype=torch.int64), goal
        score, factor = [], torch.zeros(count, count, dtype=torch.float64)
        for number in range(count):
            fit[chosen] = -torch.inf
            best = fit.argmax()
            score.append(fit[best])
            chosen = torch.cat([chosen, best[None]])
            _border(factor, number, gradients.products(best, chosen), self.ridge)
            weight = torch.cholesky_solve(goal[chosen, None], factor[: number + 1, : number + 1])[:, 0]
            fit = gradients.along(mean - gradients.total(weight, chosen))
            advance(1)
        lower = factor[:count, :count]
        weight = nonnegative(lower @ lower.T, goal[chosen])
        kept = weight > 0
        return class_picks(chosen[kept], torch.stack(score)[kept], weight[kept] * len(features))


def _border(factor: Tensor, size: int, products: Tensor, ridge: float) -> None:
    """Add a row to the Cholesky factor of ``G + ridge I``, in place.

    Args:
        factor: (M, M) whose first `size` rows and columns are the factor.
        size: rows that are there.
        products: (size + 1,) of the new row of G.
        ridge: above 0.
    """
    row = torch.linalg.solve_triangular(factor[:size, :size], products[:size, None], upper=False)[:, 0]
    factor[size, :size] = row
    factor[size, size] = (products[size] + ridge - row.square().sum()).clamp_min(1e-12 * ridge).sqrt()


def nonnegative(matrix: Tensor, target: Tensor) -> Tensor:
    """The x without negative numbers that minimises ``x' A x / 2 - b' x``, by block pivoting (Portugal et al. 1994).

    Args:
        matrix: (n, n) positive definite A.
        target: (n,) b.
    """
    free = torch.ones(len(target), dtype=torch.bool)
    best, patience = len(target) + 1, 3
    while True:
        x = torch.zeros_like(target)
        x[free] = torch.linalg.solve(matrix[free][:, free], target[free])
        slope = (matrix @ x - target).masked_fill(free, 0.0)
        wrong = (x < 0) | (slope < -1e-12 * target.abs().max())
        number = int(wrong.sum())
        if not number:
            return x
        if number < best:
            best, patience = number, 3
        elif patience:
            patience -= 1
        else:
            # One at a time ends for certain.
            wrong[: int(wrong.nonzero()[-1])] = False
        free ^= wrong


@dataclass(frozen=True)
class Glister(ClassRule):
    """Items whose gradient goes along that of the class after a step on those chosen before (Killamsetty et al. 2021).

    Args:
        step: learning rate of that step.
        deepcore_compat: never take the step, as DeepCore's code does by mistake.
    """

    step: PositiveFloat = 0.1
    deepcore_compat: bool = False

    @property
    def needs(self) -> tuple[str, ...]:
        return ("embedding", "logits")

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        gradients, logits = Gradients.of(features), features["logits"].double()
        equal = torch.full((len(features),), 1 / len(features), dtype=torch.float64)
        gain = gradients.along(gradients.total(equal))
        free = torch.ones(len(features), dtype=torch.bool)
        total = torch.zeros(gradients.error.shape[1], gradients.inputs.shape[1], dtype=torch.float64)
        index, score = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)
        for number in range(count):
            best = gain.masked_fill(~free, -torch.inf).argmax()
            index[number], score[number], free[best] = best, gain[best], False
            if not self.deepcore_compat:
                total += torch.outer(gradients.error[best], gradients.inputs[best])
                moved = logits - self.step * (gradients.inputs @ (total / (number + 1)).T)
                after = Gradients(error_of(moved, features.label), gradients.inputs)
                gain = gradients.along(after.total(equal))
            advance(1)
        return class_picks(index, score)
