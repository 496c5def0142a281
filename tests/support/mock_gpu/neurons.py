"""The scan of spiking neurons on the device: one kernel forward and one backward, computed step by step on the CPU."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from lit_modules.nn import scan
from mock_gpu.tensors import NAME


@functools.cache
def register() -> torch.library.Library:
    """Let scans on the device call the operators that CUDA has kernels for."""
    library = torch.library.Library("leanlight", "IMPL")
    library.impl("lif_scan", _forward, "CPU")
    library.impl("lif_scan_backward", _backward, "CPU")
    scan.KERNEL_DEVICES.add(NAME)
    return library


def _forward(
    current: Tensor, potential: Tensor, keep: float, v_threshold: float, soft_reset: bool, store: bool
) -> tuple[Tensor, Tensor, Tensor]:
    spikes, before = [], []
    for x in current:
        h = x + keep * potential
        spike = (h >= v_threshold).to(h.dtype)
        potential = h - v_threshold * spike if soft_reset else h * (1 - spike)
        spikes.append(spike)
        before.append(h)
    return torch.stack(spikes).to(current.dtype), potential, torch.stack(before) if store else torch.empty(0)


def _backward(
    grad_spikes: Tensor,
    grad_v: Tensor | None,
    h: Tensor,
    keep: float,
    v_threshold: float,
    soft_reset: bool,
    detach_reset: bool,
    slope: int,
    a: float,
    b: float,
) -> tuple[Tensor, Tensor]:
    spikes = (h >= v_threshold).to(h.dtype)
    slopes = (
        ((h > a) & (h < b)).to(h.dtype)
        if slope == 0
        else (b / 2) / (1 + (math.pi / 2 * b * (h - a)).square())
        if slope == 1
        else b * torch.sigmoid(b * (h - a)) * torch.sigmoid(b * (a - h))
    )
    later = torch.zeros_like(h[0]) if grad_v is None else grad_v
    gradients = []
    for t in reversed(range(len(h))):
        reset = 0.0 if detach_reset else v_threshold if soft_reset else h[t]
        kept = later if soft_reset else later * (1 - spikes[t])
        gradients.append(slopes[t] * (grad_spikes[t] - later * reset) + kept)
        later = keep * gradients[-1]
    return torch.stack(gradients[::-1]).to(grad_spikes.dtype), later
