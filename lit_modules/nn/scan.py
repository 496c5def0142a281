"""An integrate-and-fire neuron over a whole sequence as one differentiable operation.

    h[t] = keep * v[t-1] + current[t],   s[t] = 1 if h[t] >= v_threshold else 0,   v[t] = h[t] * (1 - s[t])

or, with a soft reset, ``v[t] = h[t] - v_threshold * s[t]``. Plain autograd makes about ten nodes a step, each with a
buffer of its own. The gradient through a sequence has a closed form, so the forward scan needs three element-wise
kernels a step and the backward scan four, in buffers that are allocated once; on a CUDA device each is one kernel for
the whole sequence (`lit_modules.nn.scan_kernels`).

Potentials are float32 for currents of half the width (float16, bfloat16), which mixed precision hands over: in
bfloat16 a potential near the threshold is off by 0.4 percent, and spikes differ. Spikes have the type of the currents.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_modules.nn.step_memory import dense, like_steps

HALF = (torch.float16, torch.bfloat16)
_LARGE_STEP = 2**17  # neurons; above, a step on a CPU is bound by memory, not by starting operations
_hardtanh_backward = torch.ops.aten.hardtanh_backward.grad_input


@dataclass(frozen=True)
class Window:
    """Derivative of a spike by the potential before reset: 1 where ``low < h < high`` and 0 elsewhere.

    Args:
        low: lower end of the open interval.
        high: upper end of the open interval.
    """

    low: float
    high: float

    def __call__(self, h: Tensor) -> Tensor:
        return ((h > self.low) & (h < self.high)).to(h.dtype)


@dataclass(frozen=True)
class Atan:
    """``(alpha / 2) / (1 + (pi * alpha * (h - v_threshold) / 2)**2)``.

    Args:
        v_threshold: firing threshold.
        alpha: steepness.
    """

    v_threshold: float
    alpha: float

    def __call__(self, h: Tensor) -> Tensor:
        over = (h - self.v_threshold).mul_(math.pi * self.alpha / 2)
        return over.square_().add_(1).reciprocal_().mul_(self.alpha / 2)


@dataclass(frozen=True)
class Sigmoid:
    """Derivative of ``sigmoid(alpha * (h - v_threshold))``.

    Args:
        v_threshold: firing threshold.
        alpha: steepness.
    """

    v_threshold: float
    alpha: float

    def __call__(self, h: Tensor) -> Tensor:
        s = (h - self.v_threshold).mul_(self.alpha).sigmoid_()
        return torch.addcmul(s, s, s, value=-1).mul_(self.alpha)


Slope = Window | Atan | Sigmoid
SLOPES = (Window, Atan, Sigmoid)  # by the number that stands for each in the operators


@dataclass(frozen=True)
class Cell:
    """Constants of a neuron.

    Args:
        keep: share of the potential kept from step to step.
        v_threshold: firing threshold.
        slope: derivative of s[t] by h[t] in the backward pass.
        detach_reset: no gradient through the reset.
        soft_reset: a spike takes the threshold off the potential, instead of setting it to 0.
    """

    keep: float
    v_threshold: float
    slope: Slope
    detach_reset: bool = False
    soft_reset: bool = False


def lif_scan(current: Tensor, potential: Tensor, cell: Cell) -> tuple[Tensor, Tensor]:
    """Integrate `current` (T, N, ...) from `potential` (N, ...); return spikes (T, N, ...) and the potential after
    the last reset.

    Args:
        current: input of each step.
        potential: before the first step; of the currents' type, float32 where that has half the width.
        cell: constants of the neuron.
    """
    if _plain:
        return _plain_scan(current, potential, cell)
    graph = torch.is_grad_enabled() and (current.requires_grad or potential.requires_grad)
    if _uses_kernel(current):
        if graph:
            return _KernelScan.apply(current, potential, cell)
        spikes, v, _ = torch.ops.leanlight.lif_scan(current, potential, *_forward_constants(cell), False)
        return spikes, v
    if graph:
        return _LoopScan.apply(current, potential, cell)
    spikes, h, v = like_steps(current), torch.empty_like(current[0], dtype=potential.dtype), potential.clone()
    for x, s in zip(current, spikes, strict=True):
        _step(x, v, h, s, cell)
    return spikes, v


# ---- by plain autograd ----

_plain = False


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Inside the block, scans are ordinary operations: slower, and what transforms of `torch.func` can see through."""
    global _plain
    before, _plain = _plain, True
    try:
        yield
    finally:
        _plain = before


def _plain_scan(current: Tensor, potential: Tensor, cell: Cell) -> tuple[Tensor, Tensor]:
    spikes, v = [], potential
    for x in current.unbind():
        h = x + cell.keep * v
        # The second term is 0, and its derivative the slope.
        s = (h >= cell.v_threshold).to(h.dtype) + cell.slope(h.detach()) * (h - h.detach())
        spikes.append(s)
        resetting = s.detach() if cell.detach_reset else s
        v = h - cell.v_threshold * resetting if cell.soft_reset else h * (1 - resetting)
    return torch.stack(spikes).to(current.dtype), v


# ---- step by step ----


def _step(x: Tensor, v: Tensor, h: Tensor, s: Tensor, cell: Cell) -> None:
    """One step in place: read current `x` and potential `v`; write potential before reset `h`, spikes `s`, and new
    `v`.
    """
    torch.add(x, v, alpha=cell.keep, out=h)
    torch.ge(h, cell.v_threshold, out=s)
    if cell.soft_reset:
        torch.add(h, s, alpha=-cell.v_threshold, out=v)
    else:
        torch.addcmul(h, h, s, value=-1, out=v)


def loop_forward(current: Tensor, potential: Tensor, cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes (T, N, ...), the last potential (N, ...), and potentials before reset (T, N, ...), step by step."""
    spikes, h, v = like_steps(current), like_steps(current, potential.dtype), potential.clone()
    for t in range(len(current)):
        _step(current[t], v, h[t], spikes[t], cell)
    return spikes, v, h


def loop_backward(
    grad_spikes: Tensor, grad_v: Tensor | None, h: Tensor, spikes: Tensor, cell: Cell
) -> tuple[Tensor, Tensor]:
    """Gradients by the currents (T, N, ...), of the spikes' type, and by the first potential (N, ...), step by step.

    With g[t] = dL/dh[t], w[t] the slope and r[t] = keep g[t+1]: g[t] = w[t] (dL/ds[t] - r[t] h[t]) + r[t] (1 - s[t]);
    soft reset: g[t] = w[t] (dL/ds[t] - r[t] v_threshold) + r[t].
    """
    grad, scratch = like_steps(h), torch.empty_like(h[0])
    # What flows back from the next step is `scale * later`; the scale saves a pass.
    later, scale = (grad_v, 1.0) if grad_v is not None else (None, 0.0)
    slopes = _slopes(cell.slope, h)
    for t in reversed(range(len(h))):
        if later is None:
            _through_slope(grad_spikes[t], t, h, slopes, cell.slope, grad[t])
        else:
            _backward_step(grad_spikes[t], later, scale, t, h, spikes, slopes, cell, scratch, grad[t])
        later, scale = grad[t], cell.keep
    return grad.to(spikes.dtype), cell.keep * grad[0]


class _LoopScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, current: Tensor, potential: Tensor, cell: Cell) -> tuple[Tensor, Tensor]:
        spikes, v, h = loop_forward(current, potential, cell)
        ctx.save_for_backward(h, spikes)
        ctx.cell = cell
        ctx.set_materialize_grads(False)
        return spikes, v

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None) -> tuple[Tensor | None, ...]:
        h, spikes = ctx.saved_tensors
        if grad_spikes is None:
            grad_spikes = torch.zeros_like(h[0]).expand_as(h)
        grad, grad_potential = loop_backward(grad_spikes, grad_v, h, spikes, ctx.cell)
        return grad, grad_potential if ctx.needs_input_grad[1] else None, None


def _backward_step(
    grad_spikes: Tensor,
    later: Tensor,
    scale: float,
    t: int,
    h: Tensor,
    spikes: Tensor,
    slopes: Tensor | None,
    cell: Cell,
    scratch: Tensor,
    out: Tensor,
) -> None:
    """Write g[t] into `out`, with r[t] = scale * later."""
    through_spike = grad_spikes
    if not cell.detach_reset and cell.soft_reset:
        through_spike = torch.add(through_spike, later, alpha=-scale * cell.v_threshold, out=scratch)
    elif not cell.detach_reset:
        through_spike = torch.addcmul(through_spike, later, h[t], value=-scale, out=scratch)
    _through_slope(through_spike, t, h, slopes, cell.slope, out)
    kept = later if cell.soft_reset else torch.addcmul(later, later, spikes[t], value=-1, out=scratch)
    out.add_(kept, alpha=scale)


def _slopes(slope: Slope, h: Tensor) -> Tensor | None:
    """Slopes of all steps at once where starting operations takes the time; None where memory does, or for a window."""
    together = not h.is_cpu or h[0].numel() < _LARGE_STEP
    return slope(h) if together and not isinstance(slope, Window) else None


def _through_slope(gradient: Tensor, t: int, h: Tensor, slopes: Tensor | None, slope: Slope, out: Tensor) -> None:
    """Write the gradient times the slope at h[t] into `out`."""
    if isinstance(slope, Window):
        _hardtanh_backward(gradient, h[t], slope.low, slope.high, grad_input=out)
    else:
        torch.mul(gradient, slope(h[t]) if slopes is None else slopes[t], out=out)


# ---- one kernel for all steps ----

_TRITON = importlib.util.find_spec("triton") is not None and torch.version.hip is None  # AMD devices: never tried
KERNEL_DEVICES = {"cuda"}  # device types that have the operators below
_use_kernel = True


@contextmanager
def use_kernel(use: bool) -> Iterator[None]:
    """Inside the block, let scans on a CUDA device use the fused kernel, or go step by step."""
    global _use_kernel
    before, _use_kernel = _use_kernel, use
    try:
        yield
    finally:
        _use_kernel = before


def _uses_kernel(current: Tensor) -> bool:
    return _use_kernel and _TRITON and current.device.type in KERNEL_DEVICES and current.dtype != torch.float64


def _forward_constants(cell: Cell) -> tuple[float, float, bool]:
    return cell.keep, cell.v_threshold, cell.soft_reset


def _slope_constants(slope: Slope) -> tuple[int, float, float]:
    """Position in `SLOPES` and the slope's two numbers."""
    numbers = (slope.low, slope.high) if isinstance(slope, Window) else (slope.v_threshold, slope.alpha)
    return SLOPES.index(type(slope)), *numbers


class _KernelScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, current: Tensor, potential: Tensor, cell: Cell) -> tuple[Tensor, Tensor]:
        spikes, v, h = torch.ops.leanlight.lif_scan(current, potential, *_forward_constants(cell), True)
        ctx.save_for_backward(h)
        ctx.cell, ctx.dtype = cell, current.dtype
        ctx.set_materialize_grads(False)
        return spikes, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None) -> tuple[Tensor | None, ...]:
        (h,), cell = ctx.saved_tensors, ctx.cell
        if grad_spikes is None:
            grad_spikes = torch.zeros((), dtype=ctx.dtype, device=h.device).expand_as(h)
        grad, grad_potential = torch.ops.leanlight.lif_scan_backward(
            grad_spikes, grad_v, h, *_forward_constants(cell), cell.detach_reset, *_slope_constants(cell.slope)
        )
        return grad, grad_potential if ctx.needs_input_grad[1] else None, None


# Operators, so that `torch.compile` takes each scan as one call.
_library = torch.library.Library("leanlight", "DEF")
_library.define(
    "lif_scan(Tensor current, Tensor potential, float keep, float v_threshold, bool soft_reset, bool store) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(
    "lif_scan_backward(Tensor grad_spikes, Tensor? grad_v, Tensor h, float keep, float v_threshold, bool soft_reset, "
    "bool detach_reset, int slope, float a, float b) -> (Tensor, Tensor)"
)


def _kernel_scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from lit_modules.nn import scan_kernels  # Triton takes a second to load

    return scan_kernels.scan(*arguments)


def _kernel_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from lit_modules.nn import scan_kernels

    return scan_kernels.scan_backward(*arguments)


_library.impl("lif_scan", _kernel_scan, "CUDA")
_library.impl("lif_scan_backward", _kernel_backward, "CUDA")


@torch.library.register_fake("leanlight::lif_scan", lib=_library)
def _scan_shapes(current: Tensor, potential: Tensor, *constants: Any) -> tuple[Tensor, Tensor, Tensor]:
    spikes, store = like_steps(dense(current)), constants[-1]
    h = like_steps(spikes, torch.float32) if store else potential.new_empty(0)
    return spikes, torch.empty_like(spikes[0], dtype=torch.float32), h


@torch.library.register_fake("leanlight::lif_scan_backward", lib=_library)
def _backward_shapes(grad_spikes: Tensor, grad_v: Tensor | None, h: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    return like_steps(h, grad_spikes.dtype), torch.empty_like(h[0])
