"""Leaky integrate-and-fire neurons on spikingjelly, with a whole sequence as one differentiable operation.

Spikingjelly's plain neuron builds about ten autograd nodes a step, each with a buffer of its own. For the rectangular
surrogates the gradient has a closed form, so the forward scan needs three element-wise kernels a step and the
backward scan four, in buffers that are allocated once. Values and gradients are those of the plain neuron up to
rounding.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor

from leanlight.contracts import UserError

SurrogateName = Literal["rect", "rect_zero", "atan"]

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
) -> FusedLIFNode:
    """Make a leaky integrate-and-fire neuron with hard reset, over (T, N, ...) inputs I.

    ``u[t] = tau * u[t-1] * (1 - o[t-1]) + I[t]``, ``o[t] = 1 if u[t] >= v_threshold else 0``. The input enters in
    full. Firing is at ``>=`` (spikingjelly); papers that write ``>`` differ only where the potential meets the
    threshold exactly.

    tau: share of the potential kept from step to step, in (0, 1); spikingjelly's time constant is 1 / (1 - tau).
    surrogate_gradient: ``rect`` is 1 within 0.5 of the threshold; ``rect_zero`` is 1 within 0.5 of potential 0;
    ``atan`` is smooth. detach_reset: cut the gradient through the reset.
    """
    if not 0.0 < tau < 1.0:
        raise UserError(f"tau: expected a number between 0 and 1 (share of the potential kept a step), got {tau}")
    if v_threshold <= 0.0:
        raise UserError(f"v_threshold: expected a positive number, got {v_threshold}")
    surrogates = {
        "rect": surrogate.Rect,
        "rect_zero": lambda: RectAroundZeroPotential(float(v_threshold)),
        "atan": surrogate.ATan,
    }
    return FusedLIFNode(
        tau=1.0 / (1.0 - tau),
        decay_input=False,
        v_threshold=float(v_threshold),
        v_reset=0.0,
        surrogate_function=surrogates[surrogate_gradient](),
        detach_reset=detach_reset,
        step_mode="m",
    )


class FusedLIFNode(neuron.LIFNode):
    """`LIFNode` with a faster multi-step path; everything the path does not cover runs in spikingjelly as before.

    It covers float32 and float64 currents (T, N, ...), hard reset to 0, currents that enter in full, and the
    surrogates `Rect` and `RectAroundZeroPotential`. Whatever the memory layout of one step, spikes have it too.
    """

    v: Any  # potential: a number at rest, a tensor after a step

    def multi_step_forward(self, x_seq: Tensor, *args: Tensor, **kwargs: object) -> Any:
        window = self._window()
        if window is None or args or x_seq.dtype not in (torch.float32, torch.float64) or torch.compiler.is_exporting():
            return super().multi_step_forward(x_seq, *args, **kwargs)
        v = self.v if isinstance(self.v, Tensor) else torch.full_like(x_seq[0], self.v)
        spikes, self.v = lif_scan(
            x_seq, v, 1.0 - 1.0 / self.tau, self.v_threshold, window, detach_reset=self.detach_reset
        )
        return spikes

    def _window(self) -> tuple[float, float] | None:
        """Open interval of potentials where the surrogate passes the gradient with factor 1; none if it is not of
        that kind.
        """
        if self.decay_input or self.v_reset != 0.0 or self.store_v_seq:
            return None
        function = self.surrogate_function
        if type(function) is surrogate.Rect and function.spiking and function.alpha == 1.0:
            return self.v_threshold - 0.5, self.v_threshold + 0.5
        if type(function) is RectAroundZeroPotential and function.spiking:
            return -0.5, 0.5
        return None


def lif_scan(
    current: Tensor,
    potential: Tensor,
    keep: float,
    v_threshold: float,
    window: tuple[float, float],
    detach_reset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Integrate `current` (T, N, ...) from `potential` (N, ...); return spikes (T, N, ...) and the potential after
    the last reset.

    ``h[t] = keep * v[t-1] + current[t]``, ``s[t] = h[t] >= v_threshold``, ``v[t] = h[t] * (1 - s[t])``. The spike's
    derivative is 1 where ``window[0] < h[t] < window[1]`` and 0 elsewhere. detach_reset: no gradient through the
    factor ``1 - s[t]``.
    """
    if torch.is_grad_enabled() and (current.requires_grad or potential.requires_grad):
        return _LIFScan.apply(current, potential, keep, v_threshold, window, detach_reset)
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
        window: tuple[float, float],
        detach_reset: bool,
    ) -> tuple[Tensor, Tensor]:
        spikes, h, v = _like_steps(current), _like_steps(current), potential.clone()
        for t in range(len(current)):
            _step(current[t], v, h[t], spikes[t], keep, v_threshold)
        ctx.save_for_backward(h, spikes)
        ctx.keep, ctx.window, ctx.detach_reset = keep, window, detach_reset
        ctx.set_materialize_grads(False)
        return spikes, v

    @staticmethod
    def backward(ctx: Any, grad_spikes: Tensor | None, grad_v: Tensor | None) -> tuple[Tensor | None, ...]:
        """With g[t] = dL/dh[t] and w[t] the window: g[t] = w[t] (dL/ds[t] - r[t] h[t]) + r[t] (1 - s[t]), r[t] = keep
        g[t+1].
        """
        h, spikes = ctx.saved_tensors
        if grad_spikes is None:
            grad_spikes = torch.zeros_like(h[0]).expand_as(h)
        grad, scratch = _like_steps(h), torch.empty_like(h[0])
        # What flows back from the next step is `scale * later`; the scale saves a pass.
        later, scale = (grad_v, 1.0) if grad_v is not None else (None, 0.0)
        for t in reversed(range(len(h))):
            if later is None:
                _hardtanh_backward(grad_spikes[t], h[t], *ctx.window, grad_input=grad[t])
            else:
                through_spike = grad_spikes[t]
                if not ctx.detach_reset:
                    through_spike = torch.addcmul(through_spike, later, h[t], value=-scale, out=scratch)
                _hardtanh_backward(through_spike, h[t], *ctx.window, grad_input=grad[t])
                grad[t].add_(torch.addcmul(later, later, spikes[t], value=-1, out=scratch), alpha=scale)
            later, scale = grad[t], ctx.keep
        grad_potential = ctx.keep * grad[0] if ctx.needs_input_grad[1] else None
        return grad, grad_potential, None, None, None, None
