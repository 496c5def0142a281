"""A trained DQN as a spiking network without further training (Tan et al. 2021, arXiv:2009.14456).

Spikingjelly's converter replaces each ReLU by an integrate-and-fire neuron; its scales, which would make spikes
real-valued, are then folded into the weights, which is the paper's data-based normalisation:
``W_l ← W_l λ_{l-1} / λ_l``, ``b_l ← b_l / λ_l``, with λ_l a percentile of what layer l gives for recorded states.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from spikingjelly.activation_based import ann2snn, neuron
from spikingjelly.activation_based.ann2snn.modules import VoltageHook, VoltageScaler
from torch import Tensor, nn

from leanlight.contracts import GameData, QFunction, UserError
from lit_modules.dsqn.networks import DQN, time_pieces
from lit_modules.nn.checks import require_positive
from lit_modules.nn.spiking import fold_time, repeat_time, reset, unfold_time

Decoding = Literal["robust", "spikes"]
Node = Literal["if", "lif"]

_CHUNK = 64  # time steps simulated together
_BATCH = 256  # recorded states in one pass
_TOGETHER = 10  # episodes recorded side by side


class ConvertedDQN(nn.Module):
    """A `DQN` converted: (N, K, H, W) in [0, 1] → Q̂ (N, A), up to the positive factor λ of the output layer.

    Every layer, the output too, ends in integrate-and-fire neurons with soft reset (V ← V + I, fire at 1, V ← V - 1)
    that start at 0. The image enters as a real-valued current at all T steps, so the first layer is computed once.

    Args:
        layers: convolutions and linear layers with normalised weights, in order.
        neurons: one multi-step integrate-and-fire neuron a layer.
        time_steps: T.
        decoding: ``robust``: spikes plus the potential left, in units of the threshold; ``spikes``: their number alone.
        layer_lag: a layer receives at step t what the layer before it, or the image, gave at t - 1 (published
            simulator): at the first step biases alone. Without, what it gives at t.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        neurons: Sequence[nn.Module],
        time_steps: int,
        decoding: Decoding,
        layer_lag: bool = True,
    ) -> None:
        super().__init__()
        require_positive(time_steps=time_steps)
        self.layers, self.neurons = nn.ModuleList(layers), nn.ModuleList(neurons)
        self.time_steps, self.decoding, self.layer_lag = time_steps, decoding, layer_lag

    def forward(self, state: Tensor) -> Tensor:
        return self.decode(*self.simulate(state))

    def decode(self, spikes: Tensor, potential: Tensor) -> Tensor:
        """What `simulate` gives, as values (N, A)."""
        return (spikes + potential if self.decoding == "robust" else spikes) / self.time_steps

    def simulate(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Output spikes counted over T steps and the output potential after the last, (N, A) each."""
        reset(self)
        current = self.layers[0](state)
        arrived = self.layers[0](torch.zeros_like(state)) if self.layer_lag else current
        before: list[Tensor | None] = [None] * len(self.layers)  # the last spikes of each layer
        counts = current.new_zeros(())
        for steps in time_pieces(self.time_steps, _CHUNK):
            spikes = self.neurons[0](torch.cat([arrived[None], repeat_time(current, steps - 1)]))
            for number, (layer, fire) in enumerate(zip(self.layers[1:], self.neurons[1:], strict=True)):
                if self.layer_lag:
                    spikes, before[number] = _delayed(spikes, before[number]), spikes[-1:]
                x = fold_time(spikes)
                spikes = fire(unfold_time(layer(x.flatten(1) if isinstance(layer, nn.Linear) else x), steps))
            arrived = current
            counts = counts + spikes.sum(0)
        potential = self.neurons[-1].v
        assert isinstance(potential, Tensor)
        reset(self)
        return counts, potential


def _delayed(spikes: Tensor, before: Tensor | None) -> Tensor:
    """Spikes (T, …) one step later; `before` (1, …) comes first, nothing at the beginning."""
    return torch.cat([torch.zeros_like(spikes[:1]) if before is None else before, spikes[:-1]])


class _Chain(nn.Module):
    """A DQN as one chain of modules that ends in a ReLU at the output, which the converter can see."""

    def __init__(self, network: DQN) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for layer in network.convolutions:
            steps += [layer, nn.ReLU()]
        steps += [nn.Flatten(), network.hidden, nn.ReLU(), network.head, nn.ReLU()]
        self.steps = nn.Sequential(*steps)

    def forward(self, state: Tensor) -> Tensor:
        return self.steps(state)


class _ExactPercentile(ann2snn.RateCodingRecipe):
    """Spikingjelly's recipe with percentiles over all recorded states instead of a moving average over batches.

    A percentile of the values before a ReLU equals that after it, where it is positive; where it is not (Q-values can
    all be negative), λ is the percentile of the magnitudes before it.
    """

    def __init__(self, states: Tensor, percentile: float, make_neuron: Any) -> None:
        super().__init__([states], neuron_factory=make_neuron)
        self.states, self.percentile = states, percentile

    def calibrate(self, converter: Any, fx_model: Any) -> Any:
        hooks = [hook for hook in fx_model.modules() if isinstance(hook, VoltageHook)]
        relus = [relu for relu in fx_model.modules() if isinstance(relu, nn.ReLU)]
        for hook in hooks:
            hook.eval()  # else it would overwrite the scale
        with torch.no_grad():
            for hook, relu in zip(hooks, relus, strict=True):  # one layer at a time: the first is large
                seen: list[Tensor] = []
                handle = relu.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0].flatten()))
                for batch in self.states.split(_BATCH):
                    fx_model(batch.to(converter.device))
                handle.remove()
                hook.scale = _scale(torch.cat(seen), self.percentile)
        return fx_model


def _scale(values: Tensor, percentile: float) -> Tensor:
    """λ of a layer's values before its ReLU."""
    rank = max(1, round(percentile / 100 * values.numel()))
    scale = values.kthvalue(rank).values
    if scale <= 0:
        scale = values.abs().kthvalue(rank).values
    return scale if scale > 0 else torch.ones_like(scale)


def convert(
    network: DQN,
    states: Tensor,
    time_steps: int = 500,
    percentile: float = 99.9,
    decoding: Decoding = "robust",
    node: Node = "if",
    tau: float = 100.0,
    layer_lag: bool = True,
) -> ConvertedDQN:
    """Convert a trained network, which stays as it is.

    Args:
        network: to be converted.
        states: (M, K, H, W) in [0, 1], recorded in play.
        time_steps: T.
        percentile: of a layer's outputs, its scale λ; in (0, 100].
        decoding: see `ConvertedDQN`.
        node: ``if``, or ``lif``, which leaks: a control that should fail.
        tau: time constant of ``lif`` in steps.
        layer_lag: see `ConvertedDQN`.

    Raises:
        UserError: `network` is no `DQN`, or `percentile` out of range.
    """
    if type(network) is not DQN:
        raise UserError(
            f"source_checkpoint: expected one of a trained lit_modules.dsqn.DQN, got a {type(network).__name__}"
        )
    if not 0 < percentile <= 100:
        raise UserError(f"percentile: expected a number in (0, 100], got {percentile}")

    def make_neuron(scale: float) -> nn.Module:
        if node == "lif":
            return neuron.LIFNode(tau=tau, decay_input=False, v_reset=None, step_mode="s")
        return neuron.IFNode(v_reset=None, step_mode="s")

    recipe = _ExactPercentile(states, percentile, make_neuron)
    logging.getLogger("spikingjelly").setLevel(logging.WARNING)
    graph = ann2snn.FXConverter(recipe).convert(_Chain(copy.deepcopy(network)).eval())
    layers, neurons = fold_scales(graph)
    for each in neurons:
        each.step_mode = "m"
    return ConvertedDQN(layers, neurons, time_steps, decoding, layer_lag)


@torch.no_grad()
def record(games: GameData, values: QFunction, count: int) -> Tensor:
    """States (count, K, H, W) uint8 that an agent meets in games outside of validation and test.

    Args:
        games: the DataModule, whose evaluation exploration applies.
        values: the agent.
        count: how many states.
    """
    seen: list[Tensor] = []

    def recorded(state: Tensor) -> Tensor:
        seen.append(state)
        return values(state)

    seed = 0
    while sum(map(len, seen)) < count:
        games.play(list(range(seed, seed + _TOGETHER)), recorded)
        seed += _TOGETHER
    return torch.cat(seen)[:count]


def fold_scales(graph: Any) -> tuple[list[Any], list[Any]]:
    """Of a converted chain: the layers with all scales in their weights, and the neurons, in order.

    A scale after a neuron belongs to the next layer's weights, one before a neuron to the layer before it (weights and
    bias). The scale after the last neuron is dropped.
    """
    layers: list[Any] = []
    neurons: list[Any] = []
    after = 1.0
    modules = dict(graph.named_modules())
    for step in graph.graph.nodes:
        module = modules.get(str(step.target)) if step.op == "call_module" else None
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layers.append(copy.deepcopy(module))
            layers[-1].weight.data.mul_(after)
        elif isinstance(module, neuron.BaseNode):
            neurons.append(copy.deepcopy(module))
        elif isinstance(module, VoltageScaler):
            scale = float(module.scale)
            if len(neurons) == len(layers):
                after = scale
            else:
                layers[-1].weight.data.mul_(scale)
                layers[-1].bias.data.mul_(scale)
    return layers, neurons
