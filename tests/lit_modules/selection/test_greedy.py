"""Greedy choices against plain ones that try every item in every step."""

import itertools

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.selection import Cosine, NegSquaredDistance, facility_location, graph_cut, herding, k_center
from lit_modules.selection import greedy as greedy_module
from lit_modules.selection import kernels as kernels_module


def points(count, width=4, seed=0):
    return torch.rand(count, width, generator=torch.Generator().manual_seed(seed)).double()


def rows_of(kernel):
    return kernel.rows(torch.arange(len(kernel))).double()


def cut_gain(rows, chosen, item, trade_off=1.0):
    return trade_off * rows[:, item].sum() - 2 * sum(rows[other, item] for other in chosen)


def cover(rows, chosen, lowest=0.0):
    return sum(max([lowest, *(float(rows[item, other]) for other in chosen)]) for item in range(len(rows)))


def step_by_step(count, items, gain):
    """Take the first of the items with the largest ``gain(chosen, item)``, again and again."""
    chosen, values = [], []
    for _ in range(count):
        best, value = max(
            ((item, float(gain(chosen, item))) for item in range(items) if item not in chosen),
            key=lambda pair: (round(pair[1], 9), -pair[0]),
        )
        chosen.append(best)
        values.append(value)
    return chosen, torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("make", [Cosine, NegSquaredDistance])
@pytest.mark.parametrize("trade_off", [1.0, 0.3])
def test_graph_cut_takes_what_summing_anew_takes(make, trade_off):
    for seed in range(5):
        kernel = make(points(20, seed=seed))
        rows = rows_of(kernel)
        want, gains = step_by_step(20, 20, lambda c, i, r=rows: cut_gain(r, c, i, trade_off))
        index, value = graph_cut(kernel, 20, trade_off)
        assert index.tolist() == want
        assert torch.allclose(value, gains, atol=20 * kernel.grid)


@pytest.mark.parametrize("make", [Cosine, NegSquaredDistance])
def test_lazy_facility_location_takes_what_trying_every_item_takes(make):
    for seed in range(5):
        kernel = make(points(25, seed=seed))
        all_rows = rows_of(kernel)

        def gain(chosen, item, rows=all_rows, lowest=kernel.lowest):
            return cover(rows, [*chosen, item], lowest) - cover(rows, chosen, lowest)

        want, gains = step_by_step(12, 25, gain)
        index, value = facility_location(kernel, 12)
        assert index.tolist() == want
        assert torch.allclose(value, gains, atol=50 * kernel.grid)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_greedy_cover_is_near_the_best_of_all_subsets(count):
    for seed in range(10):
        kernel = Cosine(points(8, 3, seed) - 0.5)
        rows = rows_of(kernel)
        best = max(cover(rows, subset) for subset in itertools.combinations(range(8), count))
        got = cover(rows, facility_location(kernel, count)[0].tolist())
        assert best * (1 - 1 / 2.718281828) <= got <= best + 1e-9
        if count == 1:
            assert got == best


def test_one_item_of_graph_cut_is_the_best_of_all():
    for seed in range(10):
        rows = rows_of(kernel := Cosine(points(8, 3, seed)))
        assert int(graph_cut(kernel, 1)[0]) == max(range(8), key=lambda item: float(rows[item].sum()))


@pytest.mark.parametrize("pool", [(1, 1), (5, 20), (64, 64), (500, 500)])
@pytest.mark.parametrize("trade_off", [1.0, 0.3])
def test_graph_cut_beyond_memory_picks_the_same(pool, trade_off, monkeypatch):
    x = points(200, 6)
    x[50:60] = x[10]  # equals, whose order rounding must not decide
    index, value = graph_cut(Cosine(x), 150, trade_off)
    monkeypatch.setattr(kernels_module, "TABLE_ITEMS", 0)
    monkeypatch.setattr(greedy_module, "_POOL", pool)
    again, same = graph_cut(Cosine(x), 150, trade_off)
    assert torch.equal(index, again)
    assert torch.equal(value, same)


def test_facility_location_beyond_memory_picks_the_same(monkeypatch):
    x = points(100, 6)
    index, value = facility_location(Cosine(x), 40)
    monkeypatch.setattr(kernels_module, "TABLE_ITEMS", 0)
    again, same = facility_location(Cosine(x), 40)
    assert torch.equal(index, again)
    assert torch.equal(value, same)


def test_distances_beyond_memory_are_refused(monkeypatch):
    monkeypatch.setattr(kernels_module, "TABLE_ITEMS", 10)
    with pytest.raises(UserError, match="similarity: expected cosine for 20 items of a class; a kernel of"):
        graph_cut(NegSquaredDistance(points(20)), 3)


def test_farthest_first_takes_what_trying_every_item_takes():
    for seed in range(5):
        x = points(40, seed=seed)
        index, value = k_center(x, 15, 7)
        distance = torch.cdist(x, x)
        want, far = step_by_step(15, 40, lambda c, i, d=distance: d[i, c].min() if c else float(i == 7))
        assert index.tolist() == want
        assert torch.allclose(value[1:], far[1:])


@pytest.mark.parametrize("farthest", [False, True])
def test_herding_takes_what_trying_every_item_takes(farthest):
    for seed in range(5):
        x, sign = points(40, seed=seed), 1 if farthest else -1
        want, far = step_by_step(20, 40, lambda c, i, x=x, s=sign: s * (x.mean(0) - x[[*c, i]].mean(0)).norm())
        index, value = herding(x, 20, farthest=farthest)
        assert index.tolist() == want
        assert torch.allclose(value, far.abs())


RULES = [
    lambda x, n: graph_cut(Cosine(x), n),
    lambda x, n: facility_location(Cosine(x), n),
    lambda x, n: k_center(x, n, 0),
    herding,
]


@pytest.mark.parametrize("rule", RULES)
def test_of_equal_items_the_first_is_taken(rule):
    x = points(1, 300).expand(30, -1).contiguous()
    assert rule(x, 30)[0].tolist() == list(range(30))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [0, 6])
def test_more_items_than_there_are_are_refused(rule, count):
    with pytest.raises(UserError, match=f"count: expected 1 to 5, the items of the class; got {count}"):
        rule(points(5), count)


@pytest.mark.parametrize("table", [0, 1000])
def test_every_pick_is_told(table, monkeypatch):
    monkeypatch.setattr(kernels_module, "TABLE_ITEMS", table)
    told = []
    graph_cut(Cosine(points(30)), 20, advance=told.append)
    facility_location(Cosine(points(30)), 7, told.append)
    k_center(points(30), 5, 0, told.append)
    herding(points(30), 6, told.append)
    assert sum(told) == 38
