"""Draw spike trains from firing rates so that gradients reach the rates (ESVAE, arXiv:2310.14839;
`docs/methods/esvae.md`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

Sampler = Literal["poisson", "identity", "straight_through"]
SAMPLERS: tuple[Sampler, ...] = ("poisson", "identity", "straight_through")


def poisson_spikes(
    rate: Tensor,
    time_steps: int,
    half_width: float | None = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw spikes of a Poisson process with at most one spike a bin: ``z[t] = 1 if rate > u[t] else 0``, u uniform on
    [0, 1).

    rate: (N, d) in [0, 1] → (time_steps, N, d) of zeros and ones, independent over time given the rate; their count
    is Binomial(time_steps, rate). half_width a: the derivative dz[t]/drate is taken as ``1 / (2a)`` where ``|rate -
    u[t]| < a`` and 0 elsewhere; None takes 1 everywhere (straight-through).
    """
    noise = torch.rand(time_steps, *rate.shape, dtype=rate.dtype, device=rate.device, generator=generator)
    return _PoissonSpikes.apply(rate, noise, half_width)


def sample_spikes(
    spikes: Tensor, sampler: Sampler, half_width: float = 0.5, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Turn the encoder's spikes (T, N, d) into the decoder's; return them with the firing rate (N, d).

    poisson: fresh spikes at the firing rate, with the boxcar derivative. straight_through: the same with derivative 1.
    identity: the encoder's own spikes, as in a plain spiking autoencoder.
    """
    rate = spikes.mean(0)
    if sampler == "identity":
        return spikes, rate
    width = half_width if sampler == "poisson" else None
    return poisson_spikes(rate, len(spikes), width, generator), rate


class _PoissonSpikes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rate: Tensor, noise: Tensor, half_width: float | None) -> Tensor:
        ctx.half_width = half_width
        if half_width is not None:
            ctx.save_for_backward((rate - noise).abs() < half_width)
        return (rate > noise).to(rate.dtype)

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor) -> tuple[Tensor, None, None]:
        if ctx.half_width is None:
            return grad_spikes.sum(0), None, None
        (open_window,) = ctx.saved_tensors
        return (grad_spikes * open_window).sum(0) / (2 * ctx.half_width), None, None
