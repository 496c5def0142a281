"""Prompts: tokens that are learned while the transformer around them is not; dense, rates, or bits of spiking neurons.

A module of prompts has no input. It gives K sets of L tokens of width D, one set for each block they are given to.
Equations: docs/methods/spike_nvpt.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from leanlight.contracts import UserError, derived_seed, run_seed
from leanlight.contracts.ranges import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Share,
    TimeSteps,
    UnitInterval,
)
from leanlight.ops.corruptions import item_keys, normal
from lit_modules.nn import integrate_and_fire, lif
from lit_modules.nn.checks import require_positive

Reset = Literal["soft", "hard"]
Surrogate = Literal["sigmoid", "atan"]
ScaleMode = Literal["fixed", "learned", "learned_by_layer"]
TimeMode = Literal["unrolled", "across_iterations"]
Readout = Literal["rate", "last_spike"]


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
        self,
        layers: int,
        width: int,
        patch_values: int,
        length: PositiveInt = 10,
        init_range: PositiveFloat | None = None,
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

    Under a constant current SFL and SDU together are one threshold on P, of which only the gradient is another. What
    changes that: `sigma`, `time_mode`.

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
        leak: share of the potential lost from step to step, in [0, 1).
        time_mode: ``unrolled``: potentials are 0 before every pass; ``across_iterations``: they begin where the last
            pass in training has left them, so that with T = 1 a step of training is one of the neurons. Other passes
            take the step that would come next and leave potentials as they are.
        sigma: standard deviation of Gaussian noise on the current of every time step in training, at least 0. A
            function of the run's seed and the number of the pass, so equal on all processes and after a resume.
        sfl_readout: ``rate``, or ``last_spike``, which makes r the last step's spike.
        theta: threshold θ of the discretisation, in (0, 1]; None: that of one spike, 1/T, and 0 without SFL.
        levels: 2 for B in {0, 1}; 3, with SDU, for {-1, 0, 1}: B of the current minus B of the opposite current.
        surrogate: of the derivative of both thresholds, ``sigmoid`` or ``atan``.
        alpha: steepness of the surrogate, positive.
        scale: s, the value of a bit, positive.
        scale_mode: whether s is ``fixed``, ``learned``, or ``learned_by_layer``.
        init_range: latents are drawn from U(-init_range, init_range); VPT's range would never fire.
    """

    potential: Tensor | None
    passes: Tensor | None

    def __init__(
        self,
        layers: int,
        width: int,
        patch_values: int,
        length: PositiveInt = 10,
        use_sfl: bool = True,
        use_sdu: bool = True,
        time_steps: TimeSteps = 4,
        v_threshold: PositiveFloat = 1.0,
        reset: Reset = "soft",
        leak: Share = 0.0,
        time_mode: TimeMode = "unrolled",
        sigma: NonNegativeFloat = 0.0,
        sfl_readout: Readout = "rate",
        theta: PositiveShare | None = None,
        levels: Literal[2, 3] = 2,
        surrogate: Surrogate = "sigmoid",
        alpha: PositiveFloat = 2.0,
        scale: PositiveFloat = 1.0,
        scale_mode: ScaleMode = "fixed",
        init_range: PositiveFloat = 1.0,
    ) -> None:
        super().__init__(layers, width, length)
        require_positive(time_steps=time_steps)
        for name, given, known in (
            ("reset", reset, Reset),
            ("surrogate", surrogate, Surrogate),
            ("scale_mode", scale_mode, ScaleMode),
            ("time_mode", time_mode, TimeMode),
            ("sfl_readout", sfl_readout, Readout),
        ):
            if given not in get_args(known):
                raise UserError(f"{name}: expected one of {', '.join(get_args(known))}, got {given!r}")
        for name, value in (("scale", scale), ("init_range", init_range)):
            if value <= 0:
                raise UserError(f"{name}: expected a positive number, got {value}")
        if theta is not None and not 0 < theta <= 1:
            raise UserError(f"theta: expected a number in (0, 1], got {theta}")
        if not 0 <= leak < 1:
            raise UserError(f"leak: expected a number in [0, 1), got {leak}")
        if not 0 <= sigma < math.inf:
            raise UserError(f"sigma: expected a number of at least 0, got {sigma}")
        if levels not in (2, 3) or (levels == 3 and not use_sdu):
            raise UserError(f"levels: expected 2, or 3 with use_sdu, got {levels}")
        self.use_sfl, self.use_sdu, self.time_steps = use_sfl, use_sdu, time_steps
        self.sigma, self.last_spike, self.levels = sigma, sfl_readout == "last_spike", levels
        self.theta = theta if theta is not None else 1 / self._most if use_sfl else 0.0
        neuron: Callable[..., nn.Module] = integrate_and_fire if leak == 0 else partial(lif, 1 - leak)
        self.neuron: Any = neuron(
            v_threshold=v_threshold,
            surrogate_gradient=surrogate,
            detach_reset=True,
            soft_reset=reset == "soft",
            alpha=alpha,
        )
        self.latents = nn.Parameter(torch.empty(self.shape).uniform_(-init_range, init_range))
        scales = torch.full((layers if scale_mode == "learned_by_layer" else 1, 1, 1), float(scale))
        self.scale = nn.Parameter(scales, requires_grad=scale_mode != "fixed")
        carried = time_mode == "across_iterations"
        signs = (2,) if levels == 3 else ()
        self.register_buffer("potential", torch.zeros(*signs, *self.shape) if carried else None)
        self.register_buffer("passes", torch.zeros(1, dtype=torch.int64) if sigma > 0 else None)
        self._stream = derived_seed(run_seed(), "current noise")

    def forward(self) -> Tensor:
        return self.scale * self._values(self.training)

    def _values(self, learning: bool) -> Tensor:
        """Tokens (K, L, D) before their scale; `learning`: currents are noisy and potentials move on."""
        steps = self.time_steps if self.use_sfl else 1
        current = self.latents.float().expand(steps, *self.shape)
        if learning and self.passes is not None:
            current = current + self.sigma * self._noise(self.passes, steps)
        if self.levels == 3:
            current = torch.stack([current, -current], 1)
        filtered = self._filtered(current, learning) if self.use_sfl else current[0]
        values = self._discretised(filtered) if self.use_sdu else filtered / self._most
        return values[0] - values[1] if self.levels == 3 else values

    def _noise(self, passes: Tensor, steps: int) -> Tensor:
        """Standard normal numbers (T, K, L, D) of this pass; counts it."""
        noise = normal(item_keys(self._stream, passes), steps * math.prod(self.shape))
        passes.add_(1)
        return noise.view(steps, *self.shape)

    def _filtered(self, current: Tensor, learning: bool) -> Tensor:
        """SFL: currents (T, ..., K, L, D) → number of spikes (..., K, L, D), which is T r."""
        self.neuron.reset()  # a potential left over would count as input of the next step
        if self.potential is not None:
            self.neuron.v = self.potential
        spikes = self.neuron(current)
        if self.potential is not None and learning:
            self.potential.copy_(self.neuron.v.detach())
        self.neuron.reset()
        return spikes[-1] if self.last_spike else spikes.sum(0)

    @property
    def _most(self) -> int:
        """The largest number of spikes, for a rate of 1."""
        return self.time_steps if self.use_sfl and not self.last_spike else 1

    def _discretised(self, filtered: Tensor) -> Tensor:
        """SDU: B in {0, 1}, shaped like what it is given."""
        # Numbers of spikes are exact; rates and a θ that no float32 holds would decide ties by rounding.
        needed, whole = self._most * self.theta, round(self._most * self.theta)
        if self.use_sfl and math.isclose(needed, whole):
            needed = whole
        return self.neuron.surrogate_function((filtered - needed) / self._most)

    def bits(self) -> Tensor | None:
        if not self.use_sdu or self.levels == 3:
            return None
        with torch.no_grad():
            return self._values(learning=False).bool()

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
        self,
        layers: int,
        width: int,
        patch_values: int,
        length: PositiveInt = 10,
        density: UnitInterval = 0.375,
        scale: PositiveFloat = 1.0,
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
