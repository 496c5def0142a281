"""A DSQN that is called once for every time step, for equality tests and the benchmark; nothing else uses it.

It is what a user of spikingjelly writes first: single-step neurons, the whole network for every step, states kept
between calls.
"""

from __future__ import annotations

import copy

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from lit_modules.dsqn.networks import DSQN


class StepByStep(nn.Module):
    """The network of a `DSQN` with its defaults (LIF with τ = 2, hard reset, rate read-out), one call a step.

    Args:
        network: whose layers are copied.
    """

    def __init__(self, network: DSQN) -> None:
        super().__init__()
        self.time_steps = network.time_steps
        self.convolutions = copy.deepcopy(network.convolutions)
        self.hidden, self.head = copy.deepcopy(network.hidden), copy.deepcopy(network.head)
        self.neurons = nn.ModuleList(
            neuron.LIFNode(tau=2.0, decay_input=True, surrogate_function=surrogate.ATan(), step_mode="s")
            for _ in network.neurons
        )

    def forward(self, state: Tensor) -> Tensor:
        functional.reset_net(self)
        rates = sum(self.step(state) for _ in range(self.time_steps)) / self.time_steps
        values = self.head(rates)
        functional.reset_net(self)
        return values

    def step(self, state: Tensor) -> Tensor:
        """One time step of all layers; spikes (N, hidden)."""
        x = state
        for layer, fire in zip(self.convolutions, self.neurons[:-1], strict=True):
            x = fire(layer(x))
        return self.neurons[-1](self.hidden(torch.flatten(x, 1)))
