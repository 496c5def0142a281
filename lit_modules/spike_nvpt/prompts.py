"""Prompts: tokens that are learned while the transformer around them is not; dense, rates, or bits of spiking neurons.

A module of prompts has no input. It gives K sets of L tokens of width D, one set for each block they are given to.
Equations: docs/methods/spike_nvpt.md.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from leanlight.contracts import UserError
from lit_modules.nn import integrate_and_fire
from lit_modules.nn.checks import require_positive

Reset = Literal["soft", "hard"]
Surrogate = Literal["sigmoid", "atan"]
ScaleMode = Literal["fixed", "learned", "learned_by_layer"]


class Prompts(nn.Module):
    """K sets of L tokens of width D: calling it gives (K, L, D) float32.

    Args:
        layers: number of sets (K), at least 1.
        width: of a token (D), that of the transformer.
        length: tokens in a set (L), at least 1.
    """

    def __init__(self, layers: int, width: int, length: int) -> None:
        super().__init__()
        require_positive(length=length)
        self.shape = (layers, length, width)

    def forward(self) -> Tensor:
        raise NotImplementedError

    def bits(self) -> Tensor | None:
        """(K, L, D) bool: which values are not zero, where tokens are a scale times bits; else None."""
        return None

    def scales(self) -> Tensor:
        """(K,) float32: the value of a bit that is set, by layer."""
        return torch.ones(self.shape[0])


class DensePrompts(Prompts):
    """Real-valued tokens, the prompts of VPT.

    Drawn from U(-v, v) with v = sqrt(6 / (patch values + D)), as VPT draws them.

    Args:
        layers: number of sets (K).
        width: of a token (D).
        patch_values: of one patch of the image, channels times height times width.
        length: tokens in a set (L), at least 1.
        init_range: v, positive; None for VPT's.
    """

    def __init__(
        self, layers: int, width: int, patch_values: int, length: int = 10, init_range: float | None = None
    ) -> None:
        super().__init__(layers, width, length)
        if init_range is not None and init_range <= 0:
            raise UserError(f"init_range: expected a positive number, got {init_range}")
        v = init_range or math.sqrt(6 / (patch_values + width))
        self.latents = nn.Parameter(torch.empty(self.shape).uniform_(-v, v))

    def forward(self) -> Tensor:
        return self.latents.float()


class SpikingPrompts(Prompts):
    """Latent currents through spiking neurons: signal filtering (SFL), then discretisation to 0 and 1 (SDU).

    SFL: an integrate-and-fire neuron takes the latent current P for T steps; r, its rate of spikes, is in {0, 1/T, …,
    1}. SDU: B = 1 where r >= θ. Tokens are s B. The gradient through both thresholds is a surrogate's. Without SFL, B =
    1 where P >= θ; without SDU, tokens are s r; without both, s P. Nothing has a batch dimension.

    Args:
        layers: number of sets (K).
        width: of a token (D).
        patch_values: of one patch of the image; not used, other prompts need it.
        length: tokens in a set (L), at least 1.
        use_sfl: whether the neurons filter.
        use_sdu: whether what comes is made 0 or 1.
        time_steps: T, at least 1.
        v_threshold: firing threshold of the neurons, positive.
        reset: ``soft`` takes the threshold off the potential after a spike, ``hard`` sets it to 0.
        theta: threshold θ of the discretisation, in (0, 1]; None: 1/T, that is one spike, and 0 without SFL.
        surrogate: of the derivative of both thresholds, ``sigmoid`` or ``atan``.
        alpha: steepness of the surrogate, positive.
        scale: s, the value of a bit, positive.
        scale_mode: whether s is ``fixed``, ``learned``, or ``learned_by_layer``.
        init_range: latents are drawn from U(-init_range, init_range); VPT's range would never fire.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        patch_values: int,
        length: int = 10,
        use_sfl: bool = True,
        use_sdu: bool = True,
        time_steps: int = 4,
        v_threshold: float = 1.0,
        reset: Reset = "soft",
        theta: float | None = None,
        surrogate: Surrogate = "sigmoid",
        alpha: float = 2.0,
        scale: float = 1.0,
        scale_mode: ScaleMode = "fixed",
        init_range: float = 1.0,
    ) -> None:
        super().__init__(layers, width, length)
        require_positive(time_steps=time_steps)
        for name, given, known in (
            ("reset", reset, Reset),
            ("surrogate", surrogate, Surrogate),
            ("scale_mode", scale_mode, ScaleMode),
        ):
            if given not in get_args(known):
                raise UserError(f"{name}: expected one of {', '.join(get_args(known))}, got {given!r}")
        for name, value in (("scale", scale), ("init_range", init_range)):
            if value <= 0:
                raise UserError(f"{name}: expected a positive number, got {value}")
        if theta is not None and not 0 < theta <= 1:
            raise UserError(f"theta: expected a number in (0, 1], got {theta}")
        self.use_sfl, self.use_sdu, self.time_steps = use_sfl, use_sdu, time_steps
        self.theta = theta if theta is not None else 1 / time_steps if use_sfl else 0.0
        self.neuron = integrate_and_fire(
            v_threshold, surrogate, detach_reset=True, soft_reset=reset == "soft", alpha=alpha
        )
        self.latents = nn.Parameter(torch.empty(self.shape).uniform_(-init_range, init_range))
        scales = torch.full((layers if scale_mode == "learned_by_layer" else 1, 1, 1), float(scale))
        self.scale = nn.Parameter(scales, requires_grad=scale_mode != "fixed")

    def forward(self) -> Tensor:
        filtered = self._filtered(self.latents.float())
        return self.scale * (self._discretised(filtered) if self.use_sdu else filtered / self._steps)

    @property
    def _steps(self) -> int:
        """What a filtered value is divided by for a rate."""
        return self.time_steps if self.use_sfl else 1

    def _filtered(self, current: Tensor) -> Tensor:
        """SFL: T r, the number of spikes (K, L, D) of neurons under a constant current."""
        if not self.use_sfl:
            return current
        self.neuron.reset()  # a potential left over would count as input of the next step
        spikes = self.neuron(current.expand(self.time_steps, *current.shape))
        self.neuron.reset()
        return spikes.sum(0)

    def _discretised(self, filtered: Tensor) -> Tensor:
        """SDU: B (K, L, D) in {0, 1}."""
        # Numbers of spikes are exact; rates and a θ that no float32 holds would decide ties by rounding.
        needed, whole = self._steps * self.theta, round(self._steps * self.theta)
        if self.use_sfl and math.isclose(needed, whole):
            needed = whole
        return self.neuron.surrogate_function((filtered - needed) / self._steps)

    def bits(self) -> Tensor | None:
        if not self.use_sdu:
            return None
        with torch.no_grad():
            return self._discretised(self._filtered(self.latents.float())).bool()

    def scales(self) -> Tensor:
        return self.scale.detach().float().flatten().expand(self.shape[0]).clone()


class RandomBits(Prompts):
    """Bits drawn once and never trained: what bits give that nobody chose.

    Args:
        layers: number of sets (K).
        width: of a token (D).
        patch_values: of one patch of the image; not used, other prompts need it.
        length: tokens in a set (L), at least 1.
        density: chance of a 1, in [0, 1]; by default the share of ones that spiking prompts begin with at T = 4.
        scale: value of a 1, positive.
    """

    drawn: Tensor

    def __init__(
        self, layers: int, width: int, patch_values: int, length: int = 10, density: float = 0.375, scale: float = 1.0
    ) -> None:
        super().__init__(layers, width, length)
        if not 0 <= density <= 1:
            raise UserError(f"density: expected a number in [0, 1], got {density}")
        if scale <= 0:
            raise UserError(f"scale: expected a positive number, got {scale}")
        self.value = scale
        self.register_buffer("drawn", torch.rand(self.shape) < density)

    def forward(self) -> Tensor:
        return self.value * self.drawn.float()

    def bits(self) -> Tensor:
        return self.drawn

    def scales(self) -> Tensor:
        return torch.full((self.shape[0],), float(self.value))
