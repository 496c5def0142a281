"""How many items each bin gives: shares of a budget, and whole numbers that sum to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

ALLOCATIONS = ("uniform", "paper_norm", "paper_literal", "repo")


def bin_shares(
    importance: Sequence[float], sizes: Sequence[int], allocation: str = "paper_norm", alpha: float = 0.6
) -> list[float]:
    """Shares of the budget for each bin, summing to 1; in proportion to the sizes where no bin has importance.

    With Î the importance, N the size of a bin and α the part of importance: ``uniform`` w ∝ N, which is DQ;
    ``paper_norm`` w = α Î / ΣÎ + (1 - α) N / ΣN; ``paper_literal`` w ∝ N (α Î + (1 - α) N / ΣN), the paper's formula
    brought to the budget; ``repo`` w ∝ N Î, the authors' code without its other deviations.

    Args:
        importance: Î of each bin, in [0, 2].
        sizes: items of each bin N.
        allocation: one of `ALLOCATIONS`.
        alpha: α in [0, 1]; ``uniform`` and ``repo`` have none.
    """
    by_size = [size / sum(sizes) for size in sizes]
    if allocation == "uniform" or sum(importance) == 0:
        return by_size
    if allocation == "paper_norm":
        total = sum(importance)
        return [alpha * own / total + (1 - alpha) * size for own, size in zip(importance, by_size, strict=True)]
    part = alpha if allocation == "paper_literal" else 1.0
    raw = [size * (part * own + (1 - part) * size) for own, size in zip(importance, by_size, strict=True)]
    return [each / sum(raw) for each in raw]


def quotas(shares: Sequence[float], sizes: Sequence[int], budget: int) -> list[float]:
    """Items to draw from each bin before rounding: shares of the budget, none above its bin's size.

    What a full bin cannot take goes to the others by their shares, and by their sizes once none of them has a share.

    Args:
        shares: of each bin, not negative.
        sizes: items of each bin.
        budget: items to draw, at most the sum of the sizes.
    """
    quota, free, rest = [float(size) for size in sizes], list(range(len(sizes))), float(budget)
    while free:
        weights = shares if any(shares[n] > 0 for n in free) else sizes
        per_weight = rest / sum(weights[n] for n in free)
        if not (full := [n for n in free if weights[n] * per_weight >= sizes[n]]):
            for n in free:
                # Sums of shares miss halves and whole numbers by rounding.
                quota[n] = round(weights[n] * per_weight, 9)
            break
        rest -= sum(sizes[n] for n in full)
        free = [n for n in free if n not in full]
    return quota


def apportion(quota: Sequence[float], owed: Sequence[float], generator: torch.Generator) -> list[int]:
    """Round each quota up or down so that the sum stays: the largest remainders go up.

    What earlier classes owe counts as part of the remainder. Without it, classes with few picks would all leave out the
    same bins.

    Args:
        quota: from `quotas`; they sum to a whole number.
        owed: how much more earlier classes should have drawn from each bin; zeros for a class by itself.
        generator: on the CPU; decides between equals.
    """
    drawn = [math.floor(each) for each in quota]
    rank = torch.randperm(len(quota), generator=generator).tolist()
    broken = (n for n in range(len(quota)) if quota[n] > drawn[n])
    order = sorted(broken, key=lambda n: (-round(quota[n] - drawn[n] + owed[n], 6), rank[n]))
    for n in order[: round(sum(quota)) - sum(drawn)]:
        drawn[n] += 1
    return drawn
