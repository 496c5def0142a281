"""Networks from the last frames to one value an action: the Nature DQN and its spiking counterparts.

All have the same layers under the same names, so their parameter counts are equal (1,686,180 at 4 actions) and weights
can be copied between them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveFloat, PositiveInt, TimeSteps
from lit_modules.nn.checks import require_positive
from lit_modules.nn.neurons import FusedIFNode, FusedLIFNode
from lit_modules.nn.spiking import fold_time, repeat_time, reset, unfold_time

Neuron = Literal["lif", "if"]
Reset = Literal["hard", "soft"]
Readout = Literal["rate", "spike_rate", "max_mem", "last_mem", "mean_mem"]
Surrogate = Literal["atan", "sigmoid"]

_TOGETHER = 2**22  # numbers in the first layer's currents of the time steps that are computed at once: 16 MB

# On a GPU launches are what a step costs, so all steps are computed at once that fit: as many as make up this share of
# its memory, since currents, potentials and spikes of all layers and their gradients come to about ten times as much.
# Derived, not measured.
_SHARE_OF_GPU = 1 / 32


class DQN(nn.Module):
    """Convolutions, one hidden layer, one value an action (Mnih et al. 2015).

    (N, history, frame_size, frame_size) in [0, 1] → (N, num_actions). No padding, no norms, PyTorch's initialisation.

    Args:
        num_actions: A, values to give.
        history: K, frames of a state; 4 in the paper.
        frame_size: side of a frame in pixels; 84 in the paper.
        convolutions: [channels, kernel, stride] of each; three in the paper.
        hidden: units of the hidden layer; 512 in the paper.
    """

    def __init__(
        self,
        num_actions: int,
        history: PositiveInt = 4,
        frame_size: PositiveInt = 84,
        convolutions: Sequence[Sequence[PositiveInt]] = ((32, 8, 4), (64, 4, 2), (64, 3, 1)),
        hidden: PositiveInt = 512,
    ) -> None:
        super().__init__()
        require_positive(num_actions=num_actions, history=history, hidden=hidden)
        self.convolutions = nn.ModuleList()
        channels, size = history, frame_size
        for number, layer in enumerate(convolutions):
            if len(layer) != 3 or min(layer) < 1 or size < layer[1]:
                raise UserError(
                    f"convolutions[{number}]: expected [channels, kernel, stride] with a kernel of at most {size}, the "
                    f"size of its input; got {list(layer)}"
                )
            self.convolutions.append(nn.Conv2d(channels, layer[0], layer[1], layer[2]))
            channels, size = layer[0], (size - layer[1]) // layer[2] + 1
        if not self.convolutions:
            raise UserError("convolutions: expected at least one [channels, kernel, stride], got none")
        self.hidden = nn.Linear(channels * size**2, hidden)
        self.head = nn.Linear(hidden, num_actions)

    def forward(self, state: Tensor) -> Tensor:
        for layer in self.convolutions:
            state = layer(state).relu()
        return self.head(self.hidden(state.flatten(1)).relu())


class DSQN(DQN):
    """The directly trained deep spiking Q-network: every hidden unit is a spiking neuron (Liu et al. 2022).

    The first convolution is the same at all T steps and is computed once; its output is the input current of the first
    neurons. States of neurons start at rest in each forward and are dropped after it: the network remembers nothing.

        u[t] = v[t-1] + (I[t] - v[t-1]) / tau,   s[t] = 1 if u[t] >= v_threshold,   v[t] = u[t] (1 - s[t])

    Read-outs other than ``rate`` are ablations. ``spike_rate``: the head spikes, too, and values are its rates in
    [0, 1], which cannot express others. ``max_mem``, ``last_mem``, ``mean_mem``: the head's currents enter a leaky
    integrator with time constant 2, of whose potential the largest, last or mean value counts (Chen et al. 2022).

    Args:
        num_actions: A, values to give.
        history: K, frames of a state; 4 in the paper.
        frame_size: side of a frame in pixels; 84 in the paper.
        convolutions: [channels, kernel, stride] of each; three in the paper.
        hidden: units of the hidden layer; 512 in the paper.
        time_steps: T, steps of a decision; 64 in the paper.
        tau: τ_m, time constant of the membrane in steps, above 1; 2 in the paper.
        v_threshold: V_th, potential that fires; 1 in the paper.
        neuron: ``lif`` (paper), or ``if``, which does not leak: u = v + I.
        reset: ``hard`` sets a fired neuron to 0 (published code), ``soft`` subtracts V_th.
        surrogate_gradient: a spike's derivative, of ``atan`` (paper): (α/2) / (1 + (π/2 α x)²), or ``sigmoid``.
        alpha: α, steepness of the surrogate; 2 in the paper.
        detach_reset: whether to let no gradient through the reset.
        readout: values from the last spikes: ``rate``: the head of their mean (paper); the others see above.
        init_gain: factor on the hidden layers' initial weights; with 1, the paper, the network starts silent.
    """

    def __init__(
        self,
        num_actions: int,
        history: PositiveInt = 4,
        frame_size: PositiveInt = 84,
        convolutions: Sequence[Sequence[PositiveInt]] = ((32, 8, 4), (64, 4, 2), (64, 3, 1)),
        hidden: PositiveInt = 512,
        time_steps: TimeSteps = 64,
        tau: PositiveFloat = 2.0,
        v_threshold: PositiveFloat = 1.0,
        neuron: Neuron = "lif",
        reset: Reset = "hard",
        surrogate_gradient: Surrogate = "atan",
        alpha: PositiveFloat = 2.0,
        detach_reset: bool = False,
        readout: Readout = "rate",
        init_gain: PositiveFloat = 1.0,
    ) -> None:
        super().__init__(num_actions, history, frame_size, convolutions, hidden)
        require_positive(time_steps=time_steps)
        for name, value in (("v_threshold", v_threshold), ("alpha", alpha), ("init_gain", init_gain)):
            if value <= 0:
                raise UserError(f"{name}: expected a positive number, got {value}")
        if tau <= 1:
            raise UserError(f"tau: expected a time constant above 1 step, got {tau}")
        self.time_steps, self.readout = time_steps, readout
        leak = float(tau) if neuron == "lif" else None
        options = {"v_reset": 0.0 if reset == "hard" else None, "detach_reset": detach_reset}
        make = functools.partial(_neuron, leak, float(v_threshold), surrogate_gradient, float(alpha), options)
        self.neurons = nn.ModuleList(make() for _ in range(len(self.convolutions) + 1))
        if readout == "spike_rate":
            self.output: nn.Module = make()
        elif readout != "rate":
            self.output = _Integrator()
        with torch.no_grad():
            for layer in (*self.convolutions, self.hidden):
                layer.weight.mul_(init_gain)

    def forward(self, state: Tensor) -> Tensor:
        reset(self)
        # This memory format spares the convolutions copies.
        current = self.convolutions[0](state.contiguous(memory_format=torch.channels_last))
        together = max(1, _numbers_together(state.device) // current.numel())
        spikes = torch.cat([self._hidden(repeat_time(current, n)) for n in time_pieces(self.time_steps, together)])
        values = self._read(spikes)
        reset(self)
        return values

    def _hidden(self, current: Tensor) -> Tensor:
        """Spikes (n, N, hidden) of the next n time steps from the first layer's current (n, N, C, H, W)."""
        steps = len(current)
        spikes = self.neurons[0](current)
        for layer, fire in zip(self.convolutions[1:], self.neurons[1:-1], strict=True):
            spikes = fire(unfold_time(layer(fold_time(spikes)), steps))
        current = self.hidden(fold_time(spikes).flatten(1))
        return self.neurons[-1](unfold_time(current, steps))

    def _read(self, spikes: Tensor) -> Tensor:
        """(T, N, hidden) → (N, num_actions)."""
        if self.readout == "rate":
            # The head is linear: the mean over time of its outputs is its output at the mean firing rate.
            return self.head(spikes.mean(0))
        sequence = self.output(unfold_time(self.head(fold_time(spikes)), self.time_steps))
        if self.readout == "max_mem":
            return sequence.amax(0)
        return sequence[-1] if self.readout == "last_mem" else sequence.mean(0)


def _numbers_together(device: torch.device) -> int:
    """How many numbers the first layer's currents of the time steps that are computed at once may have."""
    if device.type != "cuda":
        return _TOGETHER
    memory = torch.cuda.get_device_properties(device).total_memory
    return int(memory * _SHARE_OF_GPU) // torch.float32.itemsize


def time_pieces(time_steps: int, most: int) -> list[int]:
    """Numbers of time steps that are computed together: parts of `most`, the last one maybe smaller."""
    return [min(most, time_steps - start) for start in range(0, time_steps, most)]


def _neuron(tau: float | None, v_threshold: float, name: Surrogate, alpha: float, options: dict[str, Any]) -> nn.Module:
    """A leaky neuron, or without `tau` one that does not leak.

    All potentials of a leaky one are τ times the paper's, so is the threshold, and the surrogate is α / τ steep. Spikes
    and gradients are the same, and neither currents nor weights need the factor 1/τ: that would be a pass over them.
    """
    scale = 1.0 if tau is None else tau
    alpha = alpha / scale
    function = surrogate.ATan(alpha=alpha) if name == "atan" else surrogate.Sigmoid(alpha=alpha)
    given: dict[str, Any] = {"v_threshold": v_threshold * scale, "surrogate_function": function, "step_mode": "m"}
    if tau is None:
        return FusedIFNode(**given, **options)
    return FusedLIFNode(tau=tau, decay_input=False, **given, **options)


class _Integrator(nn.Module):
    """Potential of a leaky integrator without threshold at every step: v[t] = (v[t-1] + x[t]) / 2. (T, …) → (T, …)."""

    def forward(self, x: Tensor) -> Tensor:
        potentials = [x[0] / 2]
        for current in x[1:]:
            potentials.append((potentials[-1] + current) / 2)
        return torch.stack(potentials)
