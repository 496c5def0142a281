"""The scan of spiking neurons on the device: one kernel forward and one backward, computed step by step on the CPU."""

from __future__ import annotations

import functools

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
    cell = scan.Cell(keep, v_threshold, scan.Window(0.0, 0.0), soft_reset=soft_reset)
    spikes, v, h = scan.loop_forward(current, potential, cell)
    return spikes, v, h if store else torch.empty(0)


def _backward(
    grad_spikes: Tensor, grad_v: Tensor | None, h: Tensor, keep: float, v_threshold: float, *rest: float
) -> tuple[Tensor, Tensor]:
    soft_reset, detach_reset, kind, a, b = rest
    cell = scan.Cell(keep, v_threshold, scan.SLOPES[int(kind)](a, b), bool(detach_reset), bool(soft_reset))
    return scan.loop_backward(grad_spikes, grad_v, h, (h >= v_threshold).to(grad_spikes.dtype), cell)
