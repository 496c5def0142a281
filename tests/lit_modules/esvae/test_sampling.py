"""Spike sampling against Bernoulli and Binomial statistics and the boxcar derivative."""

import math

import pytest
import torch

from lit_modules.esvae.sampling import poisson_spikes, sample_spikes


def test_spikes_are_binary_and_their_count_is_binomial():
    rates, draws, steps = torch.tensor([0.0, 0.1, 0.5, 0.8, 1.0]), 20_000, 16
    generator = torch.Generator().manual_seed(0)
    z = poisson_spikes(rates.repeat(draws, 1), steps, generator=generator)
    assert z.shape == (steps, draws, 5)
    assert set(z.unique().tolist()) == {0.0, 1.0}
    count = z.sum(0).double()
    for i, r in enumerate(rates.double().tolist()):
        variance = steps * r * (1 - r)
        assert abs(count[:, i].mean() - steps * r) <= 4 * math.sqrt(variance / draws)
        fourth = variance * (1 + 3 * variance - 6 * r * (1 - r))  # central moment of the Binomial
        assert abs(count[:, i].var() - variance) <= 4 * math.sqrt(max(fourth - variance**2, 0) / draws) + 1e-12


def test_spikes_are_independent_between_steps():
    z = poisson_spikes(torch.full((50_000, 1), 0.3), 3, generator=torch.Generator().manual_seed(0)).squeeze(-1)
    correlation = torch.corrcoef(z)
    assert (correlation - torch.eye(3)).abs().max() < 4 / math.sqrt(50_000)


@pytest.mark.parametrize("half_width", [0.5, 0.2])
def test_gradient_is_the_boxcar_around_the_drawn_threshold(half_width):
    torch.manual_seed(1)
    rate = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(9, 6, 4, dtype=torch.float64)
    torch.manual_seed(2)
    z = poisson_spikes(rate, 9, half_width)
    (z * upstream).sum().backward()
    torch.manual_seed(2)
    u = torch.rand(9, 6, 4, dtype=torch.float64)
    assert torch.equal(z, (rate > u).double())
    open_window = ((rate.detach() - u).abs() < half_width).double()
    assert 0 < open_window.mean() < 1
    torch.testing.assert_close(rate.grad, (upstream * open_window).sum(0) / (2 * half_width))


def test_samplers_differ_only_in_draw_and_derivative():
    torch.manual_seed(0)
    e = (torch.rand(8, 5, 3) < 0.4).float().requires_grad_()
    upstream = torch.randn(8, 5, 3)
    same, rate = sample_spikes(e, "identity")
    assert same is e
    assert torch.equal(rate, e.mean(0))
    z, _ = sample_spikes(e, "straight_through")
    (z * upstream).sum().backward()
    torch.testing.assert_close(e.grad, (upstream.sum(0) / 8).expand(8, 5, 3))  # dL/de[t] = (1/T) sum of dL/dz
