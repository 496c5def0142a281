"""Integrate-and-fire neurons on spikingjelly, with a whole sequence as one differentiable operation.

Spikingjelly's plain neuron builds about ten autograd nodes a step, each with a buffer of its own. The gradient through
a sequence has a closed form, so the forward scan needs three element-wise kernels a step and the backward scan four,
in buffers that are allocated once. Values and gradients are those of the plain neuron up to rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor

from leanlight.contracts import UserError

SurrogateName = Literal["rect", "rect_zero", "atan", "sigmoid"]
# Derivative of a spike by the potential before reset: 1 in an open interval and 0 elsewhere, or a function.
Slope = tuple[float, float] | Callable[[Tensor], Tensor]

_LARGE_STEP = 2**17  # neurons
_hardtanh_backward = torch.ops.aten.hardtanh_backward.grad_input


class _RectAroundZeroPotential(torch.autograd.Function):
    """Step at 0 whose gradient is 1 where the potential itself, x + v_threshold, is within 0.5 of zero."""

    @staticmethod
    def forward(x: Tensor, v_threshold: float) -> Tensor:
        return surrogate.heaviside(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.v_threshold = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad_output * ((x + ctx.v_threshold).abs() < 0.5), None


class RectAroundZeroPotential(surrogate.SurrogateFunctionBase):
    """Rectangular surrogate centred on potential 0 instead of on the threshold.

    It is what the published code of FSVAE and ESVAE computes; the textbook form (STBP, Wu et al. 2018) centres on the
    threshold and is spikingjelly's `Rect`.

    Args:
        v_threshold: of the neuron, since spikingjelly hands a surrogate the potential minus the threshold.
        spiking: whether the forward pass gives spikes; without, its primitive function.
    """

    def __init__(self, v_threshold: float, spiking: bool = True) -> None:
        super().__init__(spiking=spiking, v_threshold=v_threshold)

    @staticmethod
    def spiking_function(x: Tensor, v_threshold: float) -> Tensor:
        return _RectAroundZeroPotential.apply(x, v_threshold)

    @staticmethod
    def primitive_function(x: Tensor, v_threshold: float) -> Tensor:
        return (x + v_threshold + 0.5).clamp(0.0, 1.0)


def lif(
    tau: float = 0.25,
    v_threshold: float = 0.2,
    surrogate_gradient: SurrogateName = "rect",
    detach_reset: bool = False,
    decay_input: bool = False,
) -> FusedLIFNode:
    """Make a leaky integrate-and-fire neuron with hard reset, over (T, N, ...) inputs I.

    ``u[t] = tau * u[t-1] * (1 - o[t-1]) + I[t]``, ``o[t] = 1 if u[t] >= v_threshold else 0``. Firing is at ``>=``
    (spikingjelly); papers that write ``>`` differ only where the potential meets the threshold exactly.

    Args:
        tau: share of the potential kept from step to step, in (0, 1); spikingjelly's time constant is 1 / (1 - tau).
        v_threshold: firing threshold, positive.
        surrogate_gradient: ``rect``: 1 within 0.5 of the threshold; ``rect_zero``: of 0; ``atan``, ``sigmoid``: smooth.
        detach_reset: cut the gradient through the reset.
        decay_input: let only the share 1 - tau of the input enter, spikingjelly's default; else it enters in full.
    """
    if not 0.0 < tau < 1.0:
        raise UserError(f"tau: expected a number between 0 and 1 (share of the potential kept a step), got {tau}")
    return FusedLIFNode(
        tau=1.0 / (1.0 - tau), decay_input=decay_input, **_constants(v_threshold, surrogate_gradient, detach_reset)
    )


def integrate_and_fire(
    v_threshold: float = 1.0, surrogate_gradient: SurrogateName = "atan", detach_reset: bool = False
) -> FusedIFNode:
    """Make an integrate-and-fire neuron with hard reset: `lif` whose potential does not leak.

    Args:
        v_threshold: firing threshold, positive.
        surrogate_gradient: as in `lif`.
        detach_reset: cut the gradient through the reset.
    """
    return FusedIFNode(**_constants(v_threshold, surrogate_gradient, detach_reset))


def _constants(v_threshold: float, surrogate_gradient: SurrogateName, detach_reset: bool) -> dict[str, Any]:
    if v_threshold <= 0.0:
        raise UserError(f"v_threshold: expected a positive number, got {v_threshold}")
    surrogates = {
        "rect": surrogate.Rect,
        "rect_zero": lambda: RectAroundZeroPotential(float(v_threshold)),
        "atan": surrogate.ATan,
        "sigmoid": surrogate.Sigmoid,
    }
    if surrogate_gradient not in surrogates:
        raise UserError(f"surrogate_gradient: expected one of {sorted(surrogates)}, got {surrogate_gradient!r}")
    return {
        "v_threshold": float(v_threshold),
        "v_reset": 0.0,
        "surrogate_function": surrogates[surrogate_gradient](),
        "detach_reset": detach_reset,
        "step_mode": "m",
    }


class _FusedScan(neuron.BaseNode):
    """A faster multi-step path for a spikingjelly neuron; what the path does not cover runs in spikingjelly as before.

    It covers float32 and float64 currents (T, N, ...), hard reset to 0, and the surrogates that `lif` offers. Whatever
    the memory layout of one step, spikes have it too.
    """

    v: Any  # potential: a number at rest, a tensor after a step

    def _leak(self) -> tuple[float, float]:
        """Shares of the old potential and of the input that make the new potential."""
        raise NotImplementedError

    def multi_step_forward(self, x_seq: Tensor, *args: Tensor, **kwargs: object) -> Any:
        slope = self._slope()
        if slope is None or args or x_seq.dtype not in (torch.float32, torch.float64) or torch.compiler.is_exporting():
            return super().multi_step_forward(x_seq, *args, **kwargs)
        keep, enter = self._leak()
        current = x_seq if enter == 1.0 else x_seq * enter
        v = self.v if isinstance(self.v, Tensor) else torch.full_like(current[0], self.v)
        spikes, self.v = lif_scan(current, v, keep, self.v_threshold, slope, detach_reset=self.detach_reset)
        return spikes

    def _slope(self) -> Slope | None:
        function = self.surrogate_function
        if self.v_reset != 0.0 or self.store_v_seq or not getattr(function, "spiking", False):
            return None
        if type(function) is surrogate.Rect and function.alpha == 1.0:
            return self.v_threshold - 0.5, self.v_threshold + 0.5
        if type(function) is RectAroundZeroPotential:
            return -0.5, 0.5
        if type(function) is surrogate.ATan:
            return functools.partial(_atan_slope, v_threshold=self.v_threshold, alpha=function.alpha)
        if type(function) is surrogate.Sigmoid:
            return functools.partial(_sigmoid_slope, v_threshold=self.v_threshold, alpha=function.alpha)
        return None


class FusedLIFNode(_FusedScan, neuron.LIFNode):
    """`LIFNode` with the path of `_FusedScan`."""

    def _leak(self) -> tuple[float, float]:
        return 1.0 - 1.0 / self.tau, 1.0 / self.tau if self.decay_input else 1.0


class FusedIFNode(_FusedScan, neuron.IFNode):
    """`IFNode` with the path of `_FusedScan`."""

    def _leak(self) -> tuple[float, float]:
        return 1.0, 1.0


def _atan_slope(potential: Tensor, v_threshold: float, alpha: float) -> Tensor:
    """``(alpha / 2) / (1 + (pi * alpha * (u - v_threshold) / 2)**2)``."""
    over = (potential - v_threshold).mul_(math.pi * alpha / 2)
    return over.square_().add_(1).reciprocal_().mul_(alpha / 2)


def _sigmoid_slope(potential: Tensor, v_threshold: float, alpha: float) -> Tensor:
    """Derivative of ``sigmoid(alpha * (u - v_threshold))``."""
    s = (potential - v_threshold).mul_(alpha).sigmoid_()
    return torch.addcmul(s, s, s, value=-1).mul_(alpha)


def lif_scan(
    current: Tensor,
    potential: Tensor,
    keep: float,
    v_threshold: float,
    slope: Slope,
    detach_reset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Integrate `current` (T, N, ...) from `potential` (N, ...); return spikes (T, N, ...) and the potential after
    the last reset.

    ``h[t] = keep * v[t-1] + current[t]``, ``s[t] = h[t] >= v_threshold``, ``v[t] = h[t] * (1 - s[t])``.

    Args:
        current: input of each step.
        potential: before the first step.
        keep: share of the potential kept from step to step.
        v_threshold: firing threshold.
        slope: derivative of s[t] by h[t]: 1 in an open interval and 0 elsewhere, or a function of h[t].
        detach_reset: no gradient through the factor ``1 - s[t]``.
    """
    if torch.is_grad_enabled() and (current.requires_grad or potential.requires_grad):
        return _LIFScan.apply(current, potential, keep, v_threshold, slope, detach_reset)
    spikes, h, v = _like_steps(current), torch.empty_like(current[0]), potential.clone()
    for x, s in zip(current, spikes, strict=True):
        _step(x, v, h, s, keep, v_threshold)
    return spikes, v


def _like_steps(current: Tensor) -> Tensor:
    """Memory for as many steps as `current` has, each laid out like its first (which may be one view for all steps)."""
    step = torch.empty_like(current[0])
    return torch.empty_strided(
        current.shape, (step.numel(), *step.stride()), dtype=current.dtype, device=current.device
    )


def _step(x: Tensor, v: Tensor, h: Tensor, s: Tensor, keep: float, v_threshold: float) -> None:
    """One step in place: read current `x` and potential `v`; write potential before reset `h`, spikes `s`, and new
    `v`.
    """
    torch.add(x, v, alpha=keep, out=h)
    torch.ge(h, v_threshold, out=s)
    torch.addcmul(h, h, s, value=-1, out=v)


class _LIFScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        potential: Tensor,
        keep: float,
        v_threshold: float,
        slope: Slope,
        detach_reset: bool,
    ) -> tuple[Tensor, Tensor]:
        spikes, h, v = _like_steps(current), _like_steps(current), potential.clone()
        for t in range(len(current)):
            _step(current[t], v, h[t], spikes[t], keep, v_threshold)
        ctx.save_for_backward(h, spikes)
        ctx.keep, ctx.slope, ctx.detach_reset = keep, slope, detach_reset
        ctx.set_materialize_grads(False)
        return spikes, v

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None) -> tuple[Tensor | None, ...]:
        """With g[t] = dL/dh[t] and w[t] the slope: g[t] = w[t] (dL/ds[t] - r[t] h[t]) + r[t] (1 - s[t]), r[t] = keep
        g[t+1].
        """
        h, spikes = ctx.saved_tensors
        if grad_spikes is None:
            grad_spikes = torch.zeros_like(h[0]).expand_as(h)
        grad, scratch = _like_steps(h), torch.empty_like(h[0])
        through_gate = _gate(ctx.slope, h)
        # What flows back from the next step is `scale * later`; the scale saves a pass.
        later, scale = (grad_v, 1.0) if grad_v is not None else (None, 0.0)
        for t in reversed(range(len(h))):
            if later is None:
                through_gate(grad_spikes[t], t, grad[t])
            else:
                through_spike = grad_spikes[t]
                if not ctx.detach_reset:
                    through_spike = torch.addcmul(through_spike, later, h[t], value=-scale, out=scratch)
                through_gate(through_spike, t, grad[t])
                grad[t].add_(torch.addcmul(later, later, spikes[t], value=-1, out=scratch), alpha=scale)
            later, scale = grad[t], ctx.keep
        grad_potential = ctx.keep * grad[0] if ctx.needs_input_grad[1] else None
        return grad, grad_potential, None, None, None, None


def _gate(slope: Slope, h: Tensor) -> Callable[[Tensor, int, Tensor], None]:
    """Return (gradient by s[t], t, out): writes the gradient times the slope at h[t] into `out`."""
    if isinstance(slope, tuple):

        def window(gradient: Tensor, t: int, out: Tensor) -> None:
            _hardtanh_backward(gradient, h[t], *slope, grad_input=out)

        return window
    # All steps at once where kernel launches dominate; one by one where memory does.
    slopes = slope(h) if h[0].numel() < _LARGE_STEP else None

    def product(gradient: Tensor, t: int, out: Tensor) -> None:
        torch.mul(gradient, slope(h[t]) if slopes is None else slopes[t], out=out)

    return product
