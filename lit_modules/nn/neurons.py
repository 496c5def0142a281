"""Integrate-and-fire neurons on spikingjelly, with a whole sequence as one operation (`lit_modules.nn.scan`).

Values and gradients are those of spikingjelly's plain neuron up to rounding.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor

from leanlight.contracts import UserError
from lit_modules.nn.scan import HALF, Atan, Cell, Sigmoid, Slope, Window, lif_scan

SurrogateName = Literal["rect", "rect_zero", "atan", "sigmoid"]


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
    soft_reset: bool = False,
    alpha: float | None = None,
) -> FusedLIFNode:
    """Make a leaky integrate-and-fire neuron, over (T, N, ...) inputs I; spikes o, potential u, threshold v.

    ``u[t] = tau * u[t-1] * (1 - o[t-1]) + I[t]``, ``o[t] = 1 if u[t] >= v else 0``; with a soft reset
    ``u[t] = tau * (u[t-1] - v * o[t-1]) + I[t]``. Firing is at ``>=`` (spikingjelly); papers that write ``>`` differ
    only where the potential meets the threshold exactly.

    Args:
        tau: share of the potential kept from step to step, in (0, 1); spikingjelly's time constant is 1 / (1 - tau).
        v_threshold: firing threshold, positive.
        surrogate_gradient: ``rect``: 1 within 0.5 of the threshold; ``rect_zero``: of 0; ``atan``, ``sigmoid``: smooth.
        detach_reset: cut the gradient through the reset.
        decay_input: let only the share 1 - tau of the input enter, spikingjelly's default; else it enters in full.
        soft_reset: a spike takes the threshold off the potential, instead of setting it to 0.
        alpha: steepness of ``atan`` and ``sigmoid``, positive; spikingjelly's by default, 2 and 4.
    """
    if not 0.0 < tau < 1.0:
        raise UserError(f"tau: expected a number between 0 and 1 (share of the potential kept a step), got {tau}")
    constants = _constants(v_threshold, surrogate_gradient, detach_reset, soft_reset, alpha)
    return FusedLIFNode(tau=1.0 / (1.0 - tau), decay_input=decay_input, **constants)


def integrate_and_fire(
    v_threshold: float = 1.0,
    surrogate_gradient: SurrogateName = "atan",
    detach_reset: bool = False,
    soft_reset: bool = False,
    alpha: float | None = None,
) -> FusedIFNode:
    """Make an integrate-and-fire neuron: `lif` whose potential does not leak.

    Args:
        v_threshold: firing threshold, positive.
        surrogate_gradient: as in `lif`.
        detach_reset: cut the gradient through the reset.
        soft_reset: as in `lif`.
        alpha: as in `lif`.
    """
    return FusedIFNode(**_constants(v_threshold, surrogate_gradient, detach_reset, soft_reset, alpha))


def _constants(
    v_threshold: float,
    surrogate_gradient: SurrogateName,
    detach_reset: bool,
    soft_reset: bool,
    alpha: float | None,
) -> dict[str, Any]:
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
    if alpha is not None and (alpha <= 0.0 or surrogate_gradient not in ("atan", "sigmoid")):
        raise UserError(f"alpha: expected a positive number, with atan or sigmoid; got {alpha}, {surrogate_gradient}")
    steepness = {} if alpha is None else {"alpha": float(alpha)}
    return {
        "v_threshold": float(v_threshold),
        "v_reset": None if soft_reset else 0.0,
        "surrogate_function": surrogates[surrogate_gradient](**steepness),
        "detach_reset": detach_reset,
        "step_mode": "m",
    }


class _FusedScan(neuron.BaseNode):
    """A faster multi-step path for a spikingjelly neuron; what the path does not cover runs in spikingjelly as before.

    It covers currents (T, N, ...) of any floating type, reset to 0 or by the threshold, and the surrogates that `lif`
    offers. Whatever the memory layout of one step, spikes have it too. On either path potentials are float32 where
    currents have half that width, and spikes have the type of the currents.
    """

    v: Any  # potential: a number at rest, a tensor after a step

    def _leak(self) -> tuple[float, float]:
        """Shares of the old potential and of the input that make the new potential."""
        raise NotImplementedError

    def reset(self) -> None:
        """Set the potential to rest. Spikingjelly's makes a deep copy, which `torch.compile` cannot trace."""
        if isinstance(self._memories_rv["v"], Tensor):
            super().reset()
        else:
            self._memories["v"], self.v_seq = self._memories_rv["v"], None

    def multi_step_forward(self, x_seq: Tensor, *args: Tensor, **kwargs: object) -> Any:
        cell, half = self._cell(), x_seq.dtype in HALF
        if cell is None or args or torch.compiler.is_exporting():
            spikes = super().multi_step_forward(x_seq.float() if half else x_seq, *args, **kwargs)
            return spikes.to(x_seq.dtype) if half else spikes
        enter = self._leak()[1]
        # The product is a current of its own: in half precision it would be rounded a second time.
        current = x_seq if enter == 1.0 else (x_seq.float() if half else x_seq) * enter
        v = self.v
        if not isinstance(v, Tensor):
            v = torch.full_like(current[0], v, dtype=torch.float32 if half else None)
        spikes, self.v = lif_scan(current, v, cell)
        return spikes.to(x_seq.dtype)

    def _cell(self) -> Cell | None:
        """Constants for the scan; None for what it does not cover."""
        if self.v_reset not in (0.0, None) or self.store_v_seq or (slope := self._slope()) is None:
            return None
        return Cell(self._leak()[0], self.v_threshold, slope, self.detach_reset, soft_reset=self.v_reset is None)

    def _slope(self) -> Slope | None:
        function = self.surrogate_function
        if not getattr(function, "spiking", False):
            return None
        if type(function) is surrogate.Rect and function.alpha == 1.0:
            return Window(self.v_threshold - 0.5, self.v_threshold + 0.5)
        if type(function) is RectAroundZeroPotential:
            return Window(-0.5, 0.5)
        if type(function) is surrogate.ATan:
            return Atan(self.v_threshold, function.alpha)
        if type(function) is surrogate.Sigmoid:
            return Sigmoid(self.v_threshold, function.alpha)
        return None


class FusedLIFNode(_FusedScan, neuron.LIFNode):
    """`LIFNode` with the path of `_FusedScan`."""

    def _leak(self) -> tuple[float, float]:
        return 1.0 - 1.0 / self.tau, 1.0 / self.tau if self.decay_input else 1.0


class FusedIFNode(_FusedScan, neuron.IFNode):
    """`IFNode` with the path of `_FusedScan`."""

    def _leak(self) -> tuple[float, float]:
        return 1.0, 1.0
