"""Noise on images against the published definitions in numpy and scipy, its random numbers against plain integers."""

import numpy as np
import pytest
import torch
from scipy import stats

from leanlight.contracts import UserError
from leanlight.contracts.rng import derived_seed
from leanlight.ops.corruptions import LEVELS, NOISES, Corruption, shot
from leanlight.ops.counter import item_keys, normal, random_bits, uniform

ITEMS = torch.arange(64)
CASES = [(scale, name, severity) for scale in LEVELS for name in NOISES for severity in (1, 3, 5)]


def images(value: float, n: int = 64, side: int = 32) -> torch.Tensor:
    return torch.full((n, 3, side, side), value)


def hendrycks(name: str, x: np.ndarray, c: float, rng: np.random.Generator) -> np.ndarray:
    """The four noises as the makers of ImageNet-C define them, on an array in [0, 1]."""
    if name == "gaussian":
        return np.clip(x + rng.normal(size=x.shape, scale=c), 0, 1)
    if name == "shot":
        return np.clip(rng.poisson(x * c) / c, 0, 1)
    if name == "speckle":
        return np.clip(x + x * rng.normal(size=x.shape, scale=c), 0, 1)
    hit, salt = rng.random(x.shape) <= c, rng.random(x.shape) <= 0.5
    return np.where(hit, salt.astype(x.dtype), x)


def test_levels_are_the_published_ones():
    assert LEVELS["imagenet_c"] == {
        "gaussian": (0.08, 0.12, 0.18, 0.26, 0.38),
        "shot": (60, 25, 12, 5, 3),
        "impulse": (0.03, 0.06, 0.09, 0.17, 0.27),
        "speckle": (0.15, 0.2, 0.35, 0.45, 0.6),
    }
    assert LEVELS["cifar_c"] == {
        "gaussian": (0.04, 0.06, 0.08, 0.09, 0.1),
        "shot": (500, 250, 100, 75, 50),
        "impulse": (0.01, 0.02, 0.03, 0.05, 0.07),
        "speckle": (0.06, 0.1, 0.12, 0.16, 0.2),
    }


@pytest.mark.parametrize(("scale", "name", "severity"), CASES)
def test_noise_has_the_distribution_of_its_definition(scale, name, severity):
    """Mean, spread and share of clipped values at dark, middle and bright pixels, within five standard errors."""
    rng = np.random.default_rng(0)
    for value in (13 / 255, 128 / 255, 240 / 255):
        ours = Corruption(name, severity, scale=scale)(images(value), ITEMS).double().numpy().ravel()
        reference = hendrycks(name, np.full(ours.shape, value), LEVELS[scale][name][severity - 1], rng)
        for of in (lambda x: x, lambda x: (x - 0.5) ** 2, lambda x: (x >= 1.0) * 1.0, lambda x: (x <= 0.0) * 1.0):
            a, b = of(ours), of(reference)
            error = np.sqrt((a.var() + b.var()) / ours.size)
            assert abs(a.mean() - b.mean()) <= 5 * error + 1e-7


@pytest.mark.parametrize("photons", [3, 60, 500, 4000])
@pytest.mark.parametrize("value", [1 / 255, 100 / 255, 0.5, 0.12345])
def test_shot_noise_is_poisson_distributed_at_and_between_levels_of_8_bits(photons, value):
    """Chi-square against scipy's Poisson distribution; bins of at least 20 expected counts, all others in one."""
    stored = round(value * 65280) / 65280
    keys = item_keys(derived_seed("poisson", photons), ITEMS)
    dark = images(value).flatten(1)
    ours = shot(dark, random_bits(keys, 3072), photons, lambda: random_bits(keys, 3072, 3072))
    counts = (ours.double() * photons).round().long().numpy().ravel()
    expected = stats.poisson.pmf(np.arange(photons + 1), stored * photons) * counts.size
    expected[photons] = stats.poisson.sf(photons - 1, stored * photons) * counts.size  # these are clipped to white
    observed = np.bincount(counts, minlength=photons + 1)
    common = expected >= 20
    expected = np.append(expected[common], counts.size - expected[common].sum())
    observed = np.append(observed[common], counts.size - observed[common].sum())
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1)).sum()
    assert stats.chi2.sf(statistic, len(expected) - 1) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_black_stays_black_under_shot_noise_and_its_counts_are_whole(dtype):
    noisy = Corruption("shot", level=7)(torch.zeros(4, 1, 5, 5, dtype=dtype), ITEMS[:4])
    assert noisy.dtype == dtype
    assert not noisy.any()
    counts = Corruption("shot", level=8)(torch.rand(4, 1, 5, 5).to(dtype), ITEMS[:4]) * 8
    assert torch.equal(counts, counts.round())


def test_impulses_hit_single_values_and_leave_the_others():
    x = torch.rand(200, 3, 32, 32) * 0.8 + 0.1
    noisy = Corruption("impulse", level=0.2)(x, torch.arange(200))
    hit = noisy != x
    assert set(noisy[hit].tolist()) == {0.0, 1.0}
    n = x.numel()
    for share, p in ((hit, 0.2), (noisy == 0, 0.1), (noisy == 1, 0.1)):
        assert stats.binomtest(int(share.sum()), n, p).pvalue > 1e-4
    both = (hit[:, 0] & hit[:, 1]).sum()  # as often as for independent channels
    assert stats.binomtest(int(both), n // 3, 0.04).pvalue > 1e-4


def test_gaussian_numbers_are_normal():
    z = normal(item_keys(5, torch.arange(200)), 3073).double().numpy()
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-4
    first, second = z[:, :1536].ravel(), z[:, 1537:].ravel()  # the two that one pair of uniform numbers becomes
    for f, g in ((first, second), (abs(first), abs(second)), (first**2, second)):
        assert abs(np.corrcoef(f, g)[0, 1]) < 5 / np.sqrt(first.size)
    assert abs(z).max() > 4.3


def splitmix64(x: int) -> int:
    x %= 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def word(key: int, element: int) -> int:
    x = (element * 0x9E3779B1 + key % 2**32) % 2**32
    x = (x ^ (x >> 17)) * 0xED5AD4BB % 2**32
    x = ((x ^ (x >> 11)) + (key >> 32)) * 0xAC4C1B51 % 2**32
    x = (x ^ (x >> 15)) * 0x31848BAB % 2**32
    return x ^ (x >> 14)


def test_random_bits_are_those_of_python_integers():
    index = torch.tensor([0, 1, 12345, 2**40])
    keys = item_keys(987654321, index)
    bits = random_bits(keys, 20, 7).long() % 2**32
    for row, item in zip(bits.tolist(), index.tolist(), strict=True):
        key = splitmix64(987654321 + item * 0x9E3779B97F4A7C15)
        assert row == [word(key, 7 + element) for element in range(20)]


def test_every_part_of_the_bits_is_uniform():
    bits = random_bits(item_keys(1, torch.arange(256)), 3072)
    for shift in (0, 8, 16, 24):
        counts = np.bincount(((bits >> shift) & 255).numpy().ravel(), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
    for axis in (0, 1):  # of each item over its elements, of each element over items
        means = uniform(bits).double().mean(axis).numpy()
        z = (means - 0.5) * np.sqrt(12 * bits.shape[axis])
        assert stats.kstest(z, "norm").pvalue > 1e-4


def test_items_elements_and_streams_do_not_go_together():
    u = uniform(random_bits(item_keys(1, torch.arange(512)), 3072)).double() - 0.5
    other = uniform(random_bits(item_keys(2, torch.arange(512)), 3072)).double() - 0.5
    assert_uncorrelated(u, other)
    for lag in (1, 2, 3, 16, 32, 256, 1024):
        assert_uncorrelated(u[:, lag:], u[:, :-lag])
    for lag in (1, 2, 8, 256):
        assert_uncorrelated(u[lag:], u[:-lag])
    assert_uncorrelated(u[1:, 1:], u[:-1, :-1])


def assert_uncorrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    a, b = a.flatten().numpy(), b.flatten().numpy()
    for f in (lambda x: x, lambda x: x**2, np.sign):
        assert abs(np.corrcoef(f(a), f(b))[0, 1]) < 5 / np.sqrt(a.size)


def test_severities_kinds_and_seeds_draw_independently():
    x = images(0.5)
    noises = [
        Corruption(name, level=level, seed=seed)(x, ITEMS) - 0.5
        for name, level, seed in (
            ("gaussian", 0.05, 0),
            ("gaussian", 0.06, 0),
            ("gaussian", 0.05, 1),
            ("speckle", 0.1, 0),
        )
    ] + [Corruption("gaussian", severity)(x, ITEMS) - 0.5 for severity in (1, 2)]
    for i, a in enumerate(noises):
        for b in noises[:i]:
            assert_uncorrelated(a, b)


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("side", [7, 32])
def test_an_items_noise_does_not_depend_on_its_batch(name, side):
    x, index = torch.rand(90, 3, side, side), torch.randperm(1000)[:90]
    corrupt = Corruption(name, severity=4)
    whole = corrupt(x, index)
    assert 0 <= whole.min() <= whole.max() <= 1
    assert not torch.equal(whole, x)
    order = torch.randperm(90)
    assert torch.equal(corrupt(x[order], index[order]), whole[order])
    parts = [corrupt(x[i : i + 1], index[i : i + 1]) for i in range(90)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(corrupt(x.to(memory_format=torch.channels_last), index), whole)


@pytest.mark.parametrize("name", NOISES)
def test_noise_leaves_the_generators_and_its_input_alone(name):
    x = torch.rand(4, 3, 8, 8)
    before, state = x.clone(), torch.get_rng_state()
    Corruption(name, severity=2)(x, ITEMS[:4])
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_severities_follow_the_size_of_the_image_unless_a_scale_is_named():
    corrupt = Corruption("gaussian", 5)
    assert corrupt.strength(32, 64) == 0.10
    assert corrupt.strength(32, 65) == 0.38
    assert Corruption("gaussian", 5, scale="imagenet_c").strength(8, 8) == 0.38
    assert Corruption("gaussian", level=0.3).strength(224, 224) == 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gausian", "severity": 1}, "name: .*did you mean 'gaussian'"),
        ({"name": "shot", "severity": 6}, "severity: expected a whole number from 1 to 5, got 6"),
        ({"name": "shot"}, "severity: expected either severity or level for shot noise; got neither"),
        ({"name": "shot", "severity": 1, "level": 2}, "got both"),
        ({"name": "impulse", "level": 1.5}, "level: expected a positive number, at most 1 for impulse noise, got 1.5"),
        ({"name": "shot", "level": 1e6}, "level: expected a positive number, at most 100000"),
        ({"name": "gaussian", "level": 0}, "level: expected a positive number for gaussian noise, got 0"),
        ({"name": "gaussian", "severity": 1, "scale": "cifar"}, "scale: expected one of auto"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        Corruption(**arguments)
