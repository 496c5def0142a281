"""Greedy choices: item after item, each the best given those before; of equals the first is taken."""

from __future__ import annotations

import torch
from torch import Tensor

from leanlight.contracts import UserError
from lit_modules.selection.features import finite
from lit_modules.selection.kernels import Kernel
from lit_modules.selection.work import Advance

#: Items whose gain is looked at together in `facility_location`.
_LOOK = 16
#: Items of which `graph_cut` keeps exact gains, where it cannot of all: at first, and at most.
_POOL = 2048, 8192
#: With fewer picks than that from a pool after bounds were renewed, another pool is better.
_LEAST = 8


def _silent(done: int) -> None:
    """Tell nobody."""


def graph_cut(kernel: Kernel, count: int, trade_off: float = 1.0, advance: Advance = _silent) -> tuple[Tensor, Tensor]:
    """Choose items that are near all others and far from those chosen before.

    The gain of x is ``trade_off * sum_i s(i, x) - 2 sum_chosen s(j, x)``.

    Args:
        kernel: of N items.
        count: items to choose, 1 to N.
        trade_off: weight of the nearness to all.
        advance: told of picks.

    Returns:
        (count,) int64 items in the order in which they were chosen, and (count,) float64 their gains.

    Raises:
        UserError: more items than the kernel keeps in memory, of similarities that may be negative.
    """
    _check(count, len(kernel))
    gain = kernel.rounded(trade_off * kernel.column_sums())
    if kernel.in_memory:
        return _graph_cut_of_all(kernel, gain, count, advance)
    if kernel.lowest < 0:
        size = len(kernel) ** 2 * 4 / 2**30
        raise UserError(f"similarity: expected cosine for {len(kernel):,} items of a class; a kernel of {size:.1f} GiB")
    return _graph_cut_of_pools(kernel, gain, count, advance)


def _graph_cut_of_all(kernel: Kernel, gain: Tensor, count: int, advance: Advance) -> tuple[Tensor, Tensor]:
    """Keep the gains of all items exact."""
    index, value = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)
    for number in range(count):
        best = gain.argmax()
        index[number], value[number] = best, gain[best]
        gain.sub_(kernel.rows(best[None])[0], alpha=2)
        gain[best] = -torch.inf
        advance(1)
    return index, value


def _graph_cut_of_pools(kernel: Kernel, gain: Tensor, count: int, advance: Advance) -> tuple[Tensor, Tensor]:
    """Keep exact gains of the most promising items alone, a pool, and bounds of the others'.

    As long as the best of the pool is above all bounds, it is the best of all. Bounds come from sums in closed form, so
    few similarities are computed: those within a pool, and those of a new pool to the picks before.
    """
    cut = _Cut(kernel, gain)
    while len(cut.chosen) < count:
        before = len(cut.chosen)
        cut.pool(count)
        if len(cut.chosen) == before:
            # Gains so near that bounds do not part them.
            cut.catch_up()
            cut.pool(count)
        advance(len(cut.chosen) - before)
    return cut.chosen, torch.cat(cut.values)


class _Cut:
    """A graph cut under way.

    Args:
        kernel: of N items, whose similarities are not negative: gains only ever fall.
        gain: (N,) float64 before the first pick.
    """

    def __init__(self, kernel: Kernel, gain: Tensor) -> None:
        self.kernel = kernel
        self.chosen = torch.empty(0, dtype=torch.int64)
        self.values: list[Tensor] = []
        # Exact gains after the first `caught` picks, and what no gain is above after all picks.
        self.gain, self.caught, self.bound = gain, 0, gain.clone()
        self.size, self.largest = _POOL

    def catch_up(self) -> None:
        """Make all gains exact."""
        for items in self.chosen[self.caught :].split(256):
            self.gain.sub_(self.kernel.computed(items).sum(0, dtype=torch.float64), alpha=2)
        self.gain[self.chosen] = -torch.inf
        self.caught, self.bound = len(self.chosen), self.gain.clone()

    def pool(self, count: int) -> None:
        """Pick from one pool while that is certain to be right, up to `count` picks in all."""
        order = self.bound.sort(descending=True, stable=True).indices
        pool, others = order[: self.size].sort().values, order[self.size :]
        gain, before = self.gain[pool], len(self.chosen)
        for items in self.chosen[self.caught :].split(256):
            gain.sub_(self.kernel.computed(items, pool).sum(0, dtype=torch.float64), alpha=2)
        gain[self.bound[pool] == -torch.inf] = -torch.inf
        inner = self.kernel.take(pool).all_rows()
        while len(self.chosen) < count:
            picks, values = _within(inner, gain, pool, self._best_of(others), count - len(self.chosen))
            self._take(pool[picks], values)
            if len(picks) < _LEAST:
                break
        if len(self.chosen) - before < self.size // 8:
            self.size = min(2 * self.size, self.largest)

    def _take(self, picks: Tensor, values: Tensor) -> None:
        self.chosen = torch.cat([self.chosen, picks])
        self.values.append(values)
        # Rounding moves a similarity by half the grid at most, and counts twice; double that is safe.
        self.bound.sub_(self.kernel.sums(picks), alpha=2).add_(2 * len(picks) * self.kernel.grid)
        self.bound[picks] = -torch.inf

    def _best_of(self, others: Tensor) -> tuple[float, int]:
        """The largest bound among these items, with the first item that has it."""
        bound = self.bound[others]
        largest = float(bound.max()) if len(bound) else -torch.inf
        return largest, int(others[bound == largest].min()) if len(bound) else len(self.gain)


def _within(
    inner: Tensor, gain: Tensor, pool: Tensor, outside: tuple[float, int], most: int
) -> tuple[list[int], Tensor]:
    """Greedy picks in a pool, in place in `gain`, as long as no item outside can be better."""
    picks: list[int] = []
    values = []
    while len(picks) < most:
        best = int(gain.argmax())
        value = float(gain[best])
        if value == -torch.inf or (-value, int(pool[best])) > (-outside[0], outside[1]):
            break
        picks.append(best)
        values.append(value)
        gain.sub_(inner[best], alpha=2)
        gain[best] = -torch.inf
    return picks, torch.tensor(values, dtype=torch.float64)


def facility_location(kernel: Kernel, count: int, advance: Advance = _silent) -> tuple[Tensor, Tensor]:
    """Choose items so that every item has one of them near: maximise ``sum_i max_chosen s(i, j)``.

    The gain of x is ``sum_i max(0, s(i, x) - best_i)``. It only ever falls, so an item is looked at again only when its
    last gain is the largest (Minoux 1978).

    Args:
        kernel: of N items.
        count: items to choose, 1 to N.
        advance: told of picks.

    Returns:
        (count,) int64 items in the order in which they were chosen, and (count,) float64 their gains.
    """
    _check(count, len(kernel))
    gain = kernel.column_sums() - len(kernel) * kernel.lowest
    fresh = torch.zeros(len(kernel), dtype=torch.bool)
    covered = torch.full((len(kernel),), kernel.lowest)
    index, value = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)
    for number in range(count):
        while not fresh[best := gain.argmax()]:
            look = gain.topk(min(_LOOK, len(gain))).indices
            look = torch.cat([best[None], look[~fresh[look] & (look != best) & (gain[look] > -torch.inf)]])
            gain[look] = (kernel.rows(look) - covered).clamp_(min=0).sum(1, dtype=torch.float64)
            fresh[look] = True
        index[number], value[number] = best, gain[best]
        covered = torch.maximum(covered, kernel.rows(best[None])[0])
        gain[best] = -torch.inf
        fresh.zero_()
        advance(1)
    return index, value


def k_center(x: Tensor, count: int, first: int, advance: Advance = _silent) -> tuple[Tensor, Tensor]:
    """Choose the item farthest from those chosen before, again and again (Gonzalez 1985).

    Args:
        x: (N, D) float.
        count: items to choose, 1 to N.
        first: the item to begin with.
        advance: told of picks.

    Returns:
        (count,) int64 items in the order in which they were chosen, and (count,) float64 their distances from those
        before, infinite for the first.
    """
    _check(count, len(x))
    points = finite(x, "features").double()
    points = points - points.mean(0)
    norm = points.square().sum(1)
    nearest = torch.full((len(x),), torch.inf, dtype=torch.float64)
    index, value = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)
    best = first
    for number in range(count):
        if number:
            # What rounding alone parts counts as equal, so that the first is taken.
            best = int((nearest >= nearest.max() * (1 - 1e-12)).nonzero()[0])
        index[number], value[number] = best, nearest[best].sqrt()
        scale = norm + norm[best]
        distance = scale - 2 * (points @ points[best])
        nearest = torch.minimum(nearest, distance.masked_fill_(distance < 1e-12 * scale, 0.0))
        nearest[index[: number + 1]] = -1.0
        advance(1)
    return index, value


def herding(x: Tensor, count: int, advance: Advance = _silent, farthest: bool = False) -> tuple[Tensor, Tensor]:
    """Choose the item that brings the mean of the chosen ones nearest to that of all, again and again (Welling 2009).

    Args:
        x: (N, D) float, whatever distances shall be taken in.
        count: items to choose, 1 to N.
        advance: told of picks.
        farthest: take the mean farthest away instead, as a public code does by mistake.

    Returns:
        (count,) int64 items in the order in which they were chosen, and (count,) float64 the distances of the means.
    """
    _check(count, len(x))
    points = finite(x, "features").double()
    mean, total = points.mean(0), torch.zeros(points.shape[1], dtype=torch.float64)
    norm = points.square().sum(1)
    longest = norm.max().sqrt()
    free = torch.ones(len(points), dtype=torch.bool)
    index, value = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.float64)
    for number in range(1, count + 1):
        goal = number * mean - total
        # Up to a constant and a factor the squared distance; it leaves few items for the exact one.
        rough = norm - 2 * (points @ goal)
        rough = (rough.neg_() if farthest else rough).masked_fill_(~free, torch.inf)
        slack = 1e-9 * (goal.norm() + longest) ** 2
        near = (rough <= rough.min() + slack).nonzero()[:, 0]
        distance = (mean - (total + points[near]) / number).square().sum(1)
        at = distance.argmax() if farthest else distance.argmin()
        best = near[at]
        index[number - 1], value[number - 1] = best, distance[at].sqrt()
        free[best] = False
        total += points[best]
        advance(1)
    return index, value


def _check(count: int, items: int) -> None:
    if not 1 <= count <= items:
        raise UserError(f"count: expected 1 to {items}, the items of the class; got {count}")
