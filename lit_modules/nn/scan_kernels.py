"""The scan of `lit_modules.nn.scan` as one Triton kernel forward and one backward: a thread goes through all steps.

Spikingjelly's own Triton neurons are not used: they know neither of the rectangular surrogates, and compute the leak
as a division, so that potentials differ from those of the loop in the last bit, and spikes with them. Here the
forward pass is bit for bit the loop's on a CPU with fused multiply-add. Spikingjelly's are an oracle of the GPU checks.

`lit_modules.nn.scan` imports this module when the first scan on a CUDA device runs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lit_modules.nn.step_memory import dense, like_steps


@triton.jit
def _forward(
    x_ptr, v_ptr, s_ptr, h_ptr, end_ptr, x_step, size, keep, threshold,
    STEPS: tl.constexpr, SOFT: tl.constexpr, STORE_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x_step: distance of two steps of x in memory, 0 for one view of all steps; the others follow one another."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    for _ in range(STEPS):
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h = tl.fma(v, keep, x)
        s = (h >= threshold).to(tl.float32)
        v = h - (threshold * s if SOFT else h * s)
        tl.store(s_ptr + at, s.to(s_ptr.dtype.element_ty), mask=inside)
        if STORE_H:
            tl.store(h_ptr + at, h, mask=inside)
            h_ptr += size
        x_ptr += x_step
        s_ptr += size
    tl.store(end_ptr + at, v, mask=inside)


@triton.jit
def _backward(
    gs_ptr, gv_ptr, h_ptr, gx_ptr, start_ptr, gs_step, size, keep, threshold, a, b,
    STEPS: tl.constexpr, SOFT: tl.constexpr, DETACH: tl.constexpr, SLOPE: tl.constexpr, HAS_GV: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Pointers by step are at the last one. gs_step: as x_step. a, b: window, or threshold and steepness."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    r = tl.full((BLOCK,), 0.0, tl.float32)
    if HAS_GV:
        r = tl.load(gv_ptr + at, mask=inside, other=0.0)
    for _ in range(STEPS):
        gs = tl.load(gs_ptr + at, mask=inside, other=0.0).to(tl.float32)
        h = tl.load(h_ptr + at, mask=inside, other=0.0)
        s = (h >= threshold).to(tl.float32)
        if SLOPE == 0:
            w = ((h > a) & (h < b)).to(tl.float32)
        elif SLOPE == 1:
            z = (h - a) * (1.5707963267948966 * b)
            w = (0.5 * b) / (1.0 + z * z)
        else:
            y = 1.0 / (1.0 + tl.exp(-b * (h - a)))
            w = (1.0 - y) * y * b
        if not DETACH:
            gs -= r * (threshold if SOFT else h)
        g = w * gs + (r if SOFT else r * (1.0 - s))
        tl.store(gx_ptr + at, g.to(gx_ptr.dtype.element_ty), mask=inside)
        r = g * keep
        gs_ptr -= gs_step
        h_ptr -= size
        gx_ptr -= size
    tl.store(start_ptr + at, r, mask=inside)


def scan(
    current: Tensor, potential: Tensor, keep: float, v_threshold: float, soft_reset: bool, store: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Spikes (T, N, ...), potential after the last step (N, ...), and with `store` potentials before reset (T, N, ...).

    Args:
        current: (T, N, ...) float32, float16 or bfloat16.
        potential: (N, ...) float32.
        keep: share of the potential kept from step to step.
        v_threshold: firing threshold.
        soft_reset: as in `Cell`.
        store: whether potentials are wanted, for a backward pass; else that tensor is empty.
    """
    current = dense(current)
    spikes = like_steps(current)
    h = like_steps(current, torch.float32) if store else potential.new_empty(0)
    start, end = _like_step(potential, spikes[0]), torch.empty_like(spikes[0], dtype=torch.float32)
    if size := end.numel():
        grid, block = _grid(size)
        with torch.cuda.device_of(current):
            _forward[grid](
                current, start, spikes, h, end, current.stride(0), size, keep, v_threshold,
                STEPS=len(current), SOFT=soft_reset, STORE_H=store, BLOCK=block,
            )  # fmt: skip
    return spikes, end, h


def scan_backward(
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
    """Gradients by the currents (T, N, ...) and by the first potential (N, ...).

    Args:
        grad_spikes: (T, N, ...), of the currents' type, in any layout.
        grad_v: by the last potential (N, ...), or None.
        h: potentials before reset, (T, N, ...) float32.
        keep: as in `scan`.
        v_threshold: as in `scan`.
        soft_reset: as in `Cell`.
        detach_reset: as in `Cell`.
        slope: kind of the surrogate's derivative, its position in `SLOPES`.
        a: its first number.
        b: its second number.
    """
    if grad_spikes[0].stride() != h[0].stride():
        grad_spikes = like_steps(h, grad_spikes.dtype).copy_(grad_spikes)
    grad, start = like_steps(h, grad_spikes.dtype), torch.empty_like(h[0])
    if size := start.numel():
        end = start if grad_v is None else _like_step(grad_v, h[0])
        grid, block = _grid(size)
        with torch.cuda.device_of(h):
            _backward[grid](
                grad_spikes[-1], end, h[-1], grad[-1], start, grad_spikes.stride(0), size, keep, v_threshold, a, b,
                STEPS=len(h), SOFT=soft_reset, DETACH=detach_reset, SLOPE=slope, HAS_GV=grad_v is not None,
                BLOCK=block,
            )  # fmt: skip
    return grad, start


def _like_step(potential: Tensor, step: Tensor) -> Tensor:
    """`potential` in float32 and in the memory layout of `step`."""
    if potential.stride() == step.stride() and potential.dtype == torch.float32:
        return potential
    return torch.empty_like(step, dtype=torch.float32).copy_(potential)


def _grid(size: int) -> tuple[tuple[int], int]:
    """Programs and neurons a program: small blocks until every multiprocessor has several."""
    block = 128 if size < 2**17 else 512
    return (math.ceil(size / block),), block
