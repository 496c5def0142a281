"""DSQNs as others compute them, for equality tests and the benchmark; nothing else uses them.

Both are on spikingjelly's own neurons, keep images in PyTorch's usual memory format, and reset states around a call.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import Tensor, nn

from lit_modules.dsqn.networks import DSQN


class Published(nn.Module):
    """The network of a `DSQN` with its defaults (LIF with τ = 2, hard reset, rate read-out) in the published form.

    The authors' code (AptX395/Deep-Spiking-Q-Networks), too, computes the first convolution once and folds time into
    the batch for the others. Unlike `DSQN` it copies the first current T times, and its neurons are a loop that plain
    autograd records: several nodes and buffers a step. On a GPU it asks for spikingjelly's CuPy kernels instead, which
    a CPU does not have.

    Args:
        network: whose layers are copied.
        step_mode: of the neurons: ``m`` takes all time steps in a call, ``s`` one.
    """

    def __init__(self, network: DSQN, step_mode: Literal["m", "s"] = "m") -> None:
        super().__init__()
        self.time_steps = network.time_steps
        self.convolutions = copy.deepcopy(network.convolutions)
        self.hidden, self.head = copy.deepcopy(network.hidden), copy.deepcopy(network.head)
        self.neurons = nn.ModuleList(
            neuron.LIFNode(tau=2.0, decay_input=True, surrogate_function=surrogate.ATan(), step_mode=step_mode)
            for _ in network.neurons
        )

    def forward(self, state: Tensor) -> Tensor:
        functional.reset_net(self)
        values = self.head(self.rates(state))
        functional.reset_net(self)
        return values

    def rates(self, state: Tensor) -> Tensor:
        """Mean firing rates (N, hidden) of the last neurons."""
        x = self.convolutions[0](state).unsqueeze(0).repeat(self.time_steps, 1, 1, 1, 1)
        x = self.neurons[0](x)
        for layer, fire in zip(self.convolutions[1:], self.neurons[1:-1], strict=True):
            x = fire(functional.seq_to_ann_forward(x, layer))
        return self.neurons[-1](functional.seq_to_ann_forward(x.flatten(2), self.hidden)).mean(0)


class StepByStep(Published):
    """The same network, called once for every time step: what a user of spikingjelly writes first.

    Every layer, the first convolution too, computes one step a call; neurons keep their states between calls.

    Args:
        network: whose layers are copied.
    """

    def __init__(self, network: DSQN) -> None:
        super().__init__(network, step_mode="s")

    def rates(self, state: Tensor) -> Tensor:
        return torch.stack([self.step(state) for _ in range(self.time_steps)]).mean(0)

    def step(self, state: Tensor) -> Tensor:
        """One time step of all layers; spikes (N, hidden)."""
        x = state
        for layer, fire in zip(self.convolutions, self.neurons[:-1], strict=True):
            x = fire(layer(x))
        return self.neurons[-1](self.hidden(torch.flatten(x, 1)))
