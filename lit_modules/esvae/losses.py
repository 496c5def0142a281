"""Distances between posterior and prior of the ESVAE family, as pure functions (`docs/methods/esvae.md`)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["rbf", "linear"]


def mmd2(x: Tensor, y: Tensor, kernel: Kernel = "rbf", kernels: int = 5) -> Tensor:
    """Squared maximum mean discrepancy between two sets of firing rates (ESVAE, arXiv:2310.14839).

    ``rbf`` sums Gaussian kernels ``exp(-|a - b|^2 / b_k)`` whose bandwidths ``b_k = b * 2^(k - kernels // 2)`` lie
    around the mean squared distance b of all pairs, through which no gradient flows; it is the biased estimate
    (diagonals included), so two samples of one distribution are a little above 0. ``linear`` is the squared distance of
    the means.

    Args:
        x: (N, d).
        y: (M, d).
        kernel: ``rbf`` or ``linear``.
        kernels: number of Gaussian kernels.

    Returns:
        A scalar.
    """
    if kernel == "linear":
        return (x.mean(0) - y.mean(0)).square().sum()
    both = torch.cat([x, y])
    both = both - both.detach().mean(0)  # distances stay the same; their rounding error shrinks
    distance = _squared_distances(both)
    bandwidth = distance.detach().sum() / (len(both) ** 2 - len(both))
    # Identical points have bandwidth 0 and distance 0: their kernel is 1.
    scaled = distance / bandwidth.clamp(min=torch.finfo(distance.dtype).tiny)
    similarity = torch.stack([torch.exp(-scaled * 2.0 ** (kernels // 2 - k)) for k in range(kernels)]).sum(0)
    n = len(x)
    return similarity[:n, :n].mean() + similarity[n:, n:].mean() - similarity[:n, n:].mean() - similarity[n:, :n].mean()


def _squared_distances(points: Tensor) -> Tensor:
    """(N, d) → (N, N), through inner products: the differences of all pairs would be N times larger than the points."""
    norms = points.square().sum(1)
    return (norms[:, None] + norms[None, :] - 2 * points @ points.T).clamp(min=0)


def psp(trace: Tensor, tau_s: float = 2.0) -> Tensor:
    """Postsynaptic potential of spike trains (T, N, ...), from rest: ``s[t] = s[t-1] + (v[t] - s[t-1]) / tau_s``."""
    steps = torch.arange(len(trace), device=trace.device)
    lag = steps[:, None] - steps[None, :]
    decay = torch.pow(1 - 1 / tau_s, lag.clamp(min=0)).to(trace.dtype)
    return torch.tensordot(torch.where(lag >= 0, decay / tau_s, 0.0), trace, dims=1)


def psp_mmd(q: Tensor, p: Tensor, tau_s: float = 2.0) -> Tensor:
    """Mean squared difference of postsynaptic potentials, the MMD of FSVAE (arXiv:2110.00375), a scalar.

    Args:
        q: (T, N, d) firing probabilities in [0, 1] of the posterior.
        p: those of the prior.
        tau_s: time constant of the potential in steps.
    """
    return psp(q - p, tau_s).square().mean()  # the potential is linear in the spikes


def bernoulli_kl(q: Tensor, p: Tensor, eps: float = 1e-2) -> Tensor:
    """KL divergence of Bernoulli spike trains as FSVAE computes it, summed over (T, d), mean over N: a scalar.

    Args:
        q: (T, N, d) firing probabilities in [0, 1] of the posterior.
        p: those of the prior.
        eps: added inside the logarithms.
    """
    fire = q * torch.log((q + eps) / (p + eps))
    rest = (1 - q) * torch.log((1 - q + eps) / (1 - p + eps))
    return (fire + rest).sum((0, 2)).mean()


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1), summed over d, mean over N. Both (N, d) → scalar."""
    return -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
