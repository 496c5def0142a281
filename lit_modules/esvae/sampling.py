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

    The spikes are independent over time given the rate; their count is Binomial(time_steps, rate). The derivative
    dz[t]/drate is taken as ``1 / (2a)`` where ``|rate - u[t]| < a`` and 0 elsewhere.

    Args:
        rate: r, (N, d) in [0, 1].
        time_steps: T.
        half_width: a; None takes 1 for the derivative everywhere (straight-through).
        generator: of the draws; by default the global one.

    Returns:
        (T, N, d) of zeros and ones.
    """
    noise = torch.rand(time_steps, *rate.shape, dtype=rate.dtype, device=rate.device, generator=generator)
    return _PoissonSpikes.apply(rate, noise, half_width)


def sample_spikes(
    spikes: Tensor, sampler: Sampler, half_width: float = 0.5, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Turn the encoder's spikes (T, N, d) into the decoder's; return them with the firing rate (N, d).

    Args:
        spikes: of the encoder.
        sampler: ``poisson``, or ``straight_through``: fresh spikes; ``identity``: the encoder's, as in a plain SAE.
        half_width: a of the boxcar derivative of ``poisson``; that of ``straight_through`` is 1.
        generator: of the draws; by default the global one.
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
