"""Shares and whole numbers against published values and enumeration."""

import itertools

import pytest
import torch

from lit_modules.adq.allocation import ALLOCATIONS, apportion, bin_shares, quotas

#: Importance of the authors' ten bins of CIFAR-10.
PUBLISHED = [1, 0.985, 1.031, 1.182, 1.094, 1.176, 1.083, 1.089, 1.011, 1]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(shares, sizes, budget, seed=0):
    """Whole numbers for one class by itself."""
    return apportion(quotas(shares, sizes, budget), [0.0] * len(sizes), generator(seed))


def test_the_published_importances_give_the_published_shares():
    expected = [0.963, 0.955, 0.981, 1.066, 1.016, 1.062, 1.010, 1.013, 0.970, 0.963]
    shares = bin_shares(PUBLISHED, [500] * 10, alpha=0.6)
    assert [share * 10 for share in shares] == pytest.approx(expected, abs=1e-3)
    drawn = draw(shares, [500] * 10, 625)
    assert (min(drawn), max(drawn), sum(drawn)) == (60, 67, 625)
    pure = bin_shares(PUBLISHED, [500] * 10, alpha=1.0)
    assert max(pure) * 10 == pytest.approx(1.110, abs=1e-3)


def test_each_formula_by_hand():
    importance, sizes = [0.5, 1.5], [30, 10]
    assert bin_shares(importance, sizes, "uniform", 0.6) == [0.75, 0.25]
    assert bin_shares(importance, sizes, "paper_norm", 0.6) == pytest.approx([0.6 * 0.25 + 0.4 * 0.75, 0.55])
    literal = [30 * (0.6 * 0.5 + 0.4 * 0.75), 10 * (0.6 * 1.5 + 0.4 * 0.25)]
    assert bin_shares(importance, sizes, "paper_literal", 0.6) == pytest.approx([w / sum(literal) for w in literal])
    assert bin_shares(importance, sizes, "repo", 0.6) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_every_allocation_sums_to_1_and_without_importance_is_uniform(allocation):
    assert sum(bin_shares(PUBLISHED, range(1, 11), allocation)) == pytest.approx(1)
    assert bin_shares([0.0, 0.0], [3, 9], allocation) == [0.25, 0.75]


@pytest.mark.parametrize("allocation", ["paper_norm", "paper_literal"])
def test_without_the_part_of_importance_equal_bins_share_alike(allocation):
    assert bin_shares(PUBLISHED, [50] * 10, allocation, alpha=0.0) == pytest.approx([0.1] * 10)


@pytest.mark.parametrize("allocation", ["paper_norm", "paper_literal", "repo"])
def test_a_more_important_bin_of_the_same_size_gives_no_less(allocation):
    drawn = draw(bin_shares(PUBLISHED, [50] * 10, allocation), [50] * 10, 123)
    pairs = sorted(zip(PUBLISHED, drawn, strict=True))
    assert all(low <= high for (a, low), (b, high) in itertools.pairwise(pairs) if a < b)


def water_level_quota(shares, sizes, budget):
    """Shares of the budget with a lid on every bin, by bisection of the common level."""
    low, high = 0.0, 1e6
    for _ in range(200):
        level = (low + high) / 2
        full = sum(min(size, level * share) for share, size in zip(shares, sizes, strict=True))
        low, high = (level, high) if full < budget else (low, level)
    return [min(size, low * share) for share, size in zip(shares, sizes, strict=True)]


@pytest.mark.parametrize("seed", range(40))
def test_of_all_whole_numbers_the_nearest_to_the_quotas_are_drawn(seed):
    torch.manual_seed(seed)
    sizes = torch.randint(1, 7, (4,)).tolist()
    shares = torch.rand(4).double().add(0.01).tolist()
    for budget in range(1, sum(sizes) + 1):
        quota = water_level_quota(shares, sizes, budget)
        assert quotas(shares, sizes, budget) == pytest.approx(quota, abs=1e-6)
        options = itertools.product(*(range(size + 1) for size in sizes))
        distance = {
            option: sum((a - b) ** 2 for a, b in zip(option, quota, strict=True))
            for option in options
            if sum(option) == budget
        }
        drawn = tuple(draw(shares, sizes, budget, seed))
        assert distance[drawn] == pytest.approx(min(distance.values()), abs=1e-6)


def test_bins_without_a_share_give_only_what_full_ones_cannot():
    assert draw([0.0, 1.0, 0.0], [10, 10, 30], 10) == [0, 10, 0]
    assert draw([0.0, 1.0, 0.0], [10, 10, 30], 18) == [2, 10, 6]
    assert draw([0.0, 1.0, 0.0], [10, 10, 30], 50) == [10, 10, 30]


def test_between_equal_remainders_no_bin_is_always_left_out():
    drawn = torch.tensor([draw([0.1] * 10, [14] * 10, 7, seed) for seed in range(300)])
    assert drawn.sum(1).unique().tolist() == [7]
    assert drawn.float().mean(0).sub(0.7).abs().max() < 0.1


def test_what_rounding_takes_from_a_bin_the_next_classes_make_up_for():
    shares = [0.1233, 0.1214, 0.1227, 0.1251, 0.0811, 0.0881, 0.0971, 0.0918, 0.0831, 0.0663]
    owed, total = [0.0] * 10, [0] * 10
    for label in range(100):
        quota = quotas(shares, [13] * 10, 6)
        drawn = apportion(quota, owed, generator(label))
        assert sum(drawn) == 6
        assert all(abs(whole - exact) < 1 for whole, exact in zip(drawn, quota, strict=True))
        owed = [rest + due - got for rest, due, got in zip(owed, quota, drawn, strict=True)]
        total = [sum(pair) for pair in zip(total, drawn, strict=True)]
        # No bin is ever further behind or ahead than about one item, however many classes there were.
        assert max(map(abs, owed)) < 1.5
    assert total == pytest.approx([share / sum(shares) * 600 for share in shares], abs=1.5)
    assert draw(shares, [13] * 10, 6).count(0) == 4
