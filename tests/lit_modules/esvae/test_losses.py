"""Distances against loops in numpy, closed forms and numerical integration."""

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from lit_modules.esvae.losses import bernoulli_kl, gaussian_kl, mmd2, psp, psp_mmd


def mmd2_by_hand(x, y):
    points = np.concatenate([x, y])
    total = len(points)
    distance = np.array([[((a - b) ** 2).sum() for b in points] for a in points])
    mean = distance.sum() / (total**2 - total)
    kernel = sum(np.exp(-distance / (mean * factor)) for factor in (0.25, 0.5, 1, 2, 4))
    n = len(x)
    return kernel[:n, :n].mean() + kernel[n:, n:].mean() - kernel[:n, n:].mean() - kernel[n:, :n].mean()


@pytest.mark.parametrize("sizes", [(6, 6), (4, 9)])
def test_mmd_equals_the_double_loop(sizes):
    rng = np.random.default_rng(0)
    x, y = (rng.random((n, 3)) for n in sizes)
    assert float(mmd2(torch.tensor(x), torch.tensor(y))) == pytest.approx(mmd2_by_hand(x, y), rel=1e-10)


def test_mmd_is_zero_for_one_set_and_grows_with_the_shift():
    torch.manual_seed(0)
    x, y = torch.rand(64, 32), torch.rand(64, 32)
    assert abs(mmd2(x, x)) < 1e-6
    shifted = [float(mmd2(x, y + shift)) for shift in (0.0, 0.1, 0.3, 1.0, 10.0)]
    assert shifted == sorted(shifted)
    # The biased estimate of two samples of one distribution is small but not 0: a floor to compare with.
    assert 0.05 < shifted[0] < 0.15
    assert shifted[-1] > 50 * shifted[0]


def test_mmd_of_points_that_coincide_is_finite_with_finite_gradient():
    x = torch.full((4, 3), 0.5, requires_grad=True)
    mmd2(x, x.detach().clone()).backward()
    assert torch.isfinite(x.grad).all()


def test_mmd_sends_gradient_to_both_sides_but_none_through_the_bandwidth():
    rng = np.random.default_rng(0)
    x, y = (torch.tensor(rng.random((5, 2)), requires_grad=True) for _ in range(2))
    mmd2(x, y).backward()
    assert x.grad.abs().max() > 0
    assert y.grad.abs().max() > 0

    # With the bandwidth frozen at its value here, a difference quotient gives the same gradient.
    points = torch.cat([x, y]).detach()
    mean = torch.cdist(points, points).square().sum() / (10**2 - 10)

    def frozen(a, b):
        both = torch.cat([a, b])
        kernel = sum((-torch.cdist(both, both).square() / (mean * f)).exp() for f in (0.25, 0.5, 1, 2, 4))
        return kernel[:5, :5].mean() + kernel[5:, 5:].mean() - 2 * kernel[:5, 5:].mean()

    step = torch.zeros(5, 2, dtype=torch.float64)
    step[2, 1] = 1e-6
    with torch.no_grad():
        quotient = (frozen(x + step, y) - frozen(x - step, y)) / 2e-6
    assert float(x.grad[2, 1]) == pytest.approx(float(quotient), rel=1e-5)


def test_linear_mmd_is_the_distance_of_means():
    x, y = torch.tensor([[0.0, 1.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    assert float(mmd2(x, y, "linear")) == pytest.approx(0.5**2 + 1.0**2)


def test_postsynaptic_potential_follows_its_recursion():
    torch.manual_seed(0)
    spikes, s = torch.rand(7, 2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    got = psp(spikes, tau_s=2.0)
    for t in range(7):
        s = s + (spikes[t] - s) / 2.0
        torch.testing.assert_close(got[t], s)


def test_psp_mmd_is_the_mean_squared_difference_of_potentials():
    torch.manual_seed(0)
    q, p = torch.rand(2, 5, 4, 3, dtype=torch.float64)
    assert float(psp_mmd(q, p)) == pytest.approx(float((psp(q) - psp(p)).square().mean()))
    assert float(psp_mmd(q, q)) == 0


def test_bernoulli_kl_tends_to_the_divergence_of_independent_bernoullis():
    torch.manual_seed(0)
    q, p = 0.1 + 0.8 * torch.rand(2, 5, 4, 3, dtype=torch.float64)
    exact = kl_divergence(Bernoulli(q), Bernoulli(p)).sum((0, 2)).mean()
    assert float(bernoulli_kl(q, p, eps=1e-12)) == pytest.approx(float(exact), rel=1e-6)
    assert float(bernoulli_kl(torch.ones(2, 1, 1), torch.zeros(2, 1, 1))) == pytest.approx(
        2 * (np.log(1.01 / 0.01)), rel=1e-5
    )


def test_gaussian_kl_is_the_divergence_from_the_standard_normal():
    torch.manual_seed(0)
    mean, log_variance = torch.randn(2, 6, 4, dtype=torch.float64)
    exact = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(torch.zeros(()), torch.ones(())))
    assert float(gaussian_kl(mean, log_variance)) == pytest.approx(float(exact.sum(1).mean()))
