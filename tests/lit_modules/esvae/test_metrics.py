"""Fréchet distance against scipy, noise against its statistics, the probe on data with a known answer."""

from collections import Counter

import numpy as np
import pytest
import scipy.linalg
import torch

from lit_modules.esvae.metrics import FeatureMoments, disturb, frechet_distance, linear_probe, slope, time_orders


def samples(seed, n=500, d=6):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


def with_sqrtm(a, b):
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(ca @ cb).real
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root)


def gaussian(*parts):
    moments = FeatureMoments(parts[0].shape[1])
    for part in parts:
        moments.update(torch.as_tensor(part))
    return moments.gaussian()


def test_frechet_distance_equals_the_matrix_square_root_on_well_conditioned_covariances():
    a, b = samples(0), samples(1)
    assert float(frechet_distance(*gaussian(a), *gaussian(b))) == pytest.approx(with_sqrtm(a, b), rel=1e-9)


def test_frechet_distance_of_commuting_covariances_has_a_closed_form():
    mean, one, two = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 9.0]), torch.tensor([1.0, 0.0])
    got = frechet_distance(mean, one.diag(), torch.zeros(2), two.diag())
    assert float(got) == pytest.approx(5 + ((one.sqrt() - two.sqrt()) ** 2).sum().item())


def test_frechet_distance_is_zero_for_one_gaussian_even_when_singular():
    flat = torch.tensor(samples(0))
    flat[:, 3:] = flat[:, :3]  # covariance of rank 3
    assert abs(float(frechet_distance(*gaussian(flat), *gaussian(flat)))) < 1e-6


def test_mean_and_covariance_do_not_depend_on_how_the_data_is_cut():
    a = samples(0)
    mean, covariance = gaussian(a[:123], a[123:130], a[130:])
    assert mean.numpy() == pytest.approx(a.mean(0))
    assert covariance.numpy() == pytest.approx(np.cov(a, rowvar=False))


def test_flip_noise_inverts_the_given_share_and_replace_half_of_it():
    z = (torch.rand(8, 500, 20, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(disturb(z, 0.0, "flip"), z)
    assert torch.equal(disturb(z, 1.0, "flip"), 1 - z)
    for noise, share in (("flip", 0.2), ("replace", 0.1)):
        noisy = disturb(z, 0.2, noise, generator)
        assert set(noisy.unique().tolist()) == {0.0, 1.0}
        assert (noisy != z).float().mean() == pytest.approx(share, abs=4 * (share / z.numel()) ** 0.5)


def test_time_orders_hold_every_step_once_and_come_in_all_arrangements():
    orders = time_orders(3, 600, torch.Generator().manual_seed(0))
    assert orders.sort(1).values.tolist() == [[0, 1, 2]] * 600
    counts = Counter(map(tuple, orders.tolist()))
    assert len(counts) == 6
    assert min(counts.values()) > 60  # of 100 expected: 4 standard deviations


def test_slope_is_that_of_the_line_through_the_points():
    assert slope([0.0, 1.0, 2.0], [1.0, 3.0, 5.0]) == pytest.approx(2.0)
    x, y = [0.0, 0.1, 0.3, 0.4], [0.1, 0.4, 0.2, 0.9]
    assert slope(x, y) == pytest.approx(np.polyfit(x, y, 1)[0])


def test_linear_probe_finds_separable_classes_and_only_chance_in_noise():
    torch.manual_seed(0)
    y = torch.randint(0, 4, (600,))
    x = torch.nn.functional.one_hot(y, 4) + 0.1 * torch.randn(600, 4)
    assert linear_probe(x[:400], y[:400], x[400:], y[400:]) > 0.98
    noise = torch.randn(600, 4)
    assert linear_probe(noise[:400], y[:400], noise[400:], y[400:]) < 0.45
