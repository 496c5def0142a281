"""Spiking layers that several methods share, on spikingjelly's neurons.

Signals are time-first, (T, N, ...). Stateless layers (convolution, norm, pooling, linear) work on time folded into
the batch, (T·N, ...); only neurons and readouts see the time axis.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from spikingjelly.activation_based import base, functional
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.ranges import OpenUnitInterval, PositiveFloat, PositiveInt, TimeSteps, UnitInterval
from lit_modules.nn.checks import pooled_size, require_positive
from lit_modules.nn.features import FeatureClassifier
from lit_modules.nn.neurons import SurrogateName, lif
from lit_modules.nn.normalize import Normalize, PixelStatistic


def repeat_time(x: Tensor, time_steps: int) -> Tensor:
    """Show the same input at every step (direct encoding): (N, ...) → (T, N, ...), a view without copies.

    Apply it as late as possible: what precedes the first neuron is the same at every step and needs computing once.
    """
    return x.unsqueeze(0).expand(time_steps, *x.shape)


def fold_time(x: Tensor) -> Tensor:
    """(T, N, ...) → (T·N, ...), for layers without state."""
    return x.flatten(0, 1)


def unfold_time(x: Tensor, time_steps: int) -> Tensor:
    """(T·N, ...) → (T, N, ...)."""
    return x.unflatten(0, (time_steps, -1))


def reset(network: nn.Module) -> None:
    """Set every neuron of `network` to rest and drop the graph its potential holds."""
    if not torch.compiler.is_compiling():
        functional.reset_net(network)
        return
    # Spikingjelly keeps a table of the networks it has seen, and compiled code would be compiled anew at each entry.
    for module in network.modules():
        if isinstance(module, base.MemoryModule):
            module.reset()


class ThresholdBatchNorm(nn.Module):
    """Threshold-dependent batch norm, tdBN (Zheng et al. 2021, arXiv:2011.05280), on time folded into the batch.

    ``y = weight * alpha * v_threshold * (x - mean) / sqrt(var + eps) + bias`` per channel with statistics over batch,
    time and space. x: (T·N, C) or (T·N, C, H, W). weight starts at 1; the factor stays outside of it, as in the
    paper's formula, so that a step of an adaptive optimiser has the same relative size for any threshold.

    Args:
        channels: C.
        v_threshold: firing threshold of the neurons that follow.
        alpha: further factor; 1 where a neuron has one input path.
        dims: number of space dimensions of the input, 0 or 2.
        options: ``eps`` and ``momentum`` of torch's batch norm.
    """

    def __init__(
        self,
        channels: int,
        v_threshold: PositiveFloat = 0.2,
        alpha: PositiveFloat = 1.0,
        dims: Literal[0, 2] = 2,
        **options: Any,
    ) -> None:
        super().__init__()
        self.scale = alpha * v_threshold
        # The norm is a child, not a base class, so that SyncBatchNorm.convert_sync_batchnorm keeps the factor.
        self.norm = (nn.BatchNorm2d if dims == 2 else nn.BatchNorm1d)(channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.norm, {"weight": self.norm.weight * self.scale}, (x,))

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


class LeakyReadout(nn.Module):
    """Potential of a leaky integrator without threshold after the last step: ``sum_t decay**(T-1-t) * y[t]``.

    (T, N, ...) → (N, ...).

    Args:
        decay: share of the potential kept from step to step, in [0, 1]; 1 is the plain sum.
    """

    def __init__(self, decay: UnitInterval = 0.8) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise UserError(f"decay: expected a number in [0, 1], got {decay}")
        self.decay = decay

    def forward(self, y: Tensor) -> Tensor:
        steps = torch.arange(len(y) - 1, -1, -1, device=y.device)
        return torch.tensordot(torch.pow(self.decay, steps).to(y.dtype), y, dims=1)

    def extra_repr(self) -> str:
        return f"decay={self.decay}"


class SpikingConvNet(FeatureClassifier):
    """Spiking ConvNet: `depth` blocks of [conv 3x3 → average pooling by 2 → tdBN → LIF], then one linear layer.

    (N, in_channels, image_size, image_size) in [0, 1] → (N, num_classes). The image is shown at each of `time_steps`
    steps; its convolution and norm are computed once. Pooling comes before the neuron, so every layer but the first
    receives binary spikes. Neurons start at rest in each forward and hold nothing afterwards.

    Args:
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output.
        width: channels of every convolution.
        depth: number of blocks.
        time_steps: T, how often the image is shown.
        tau: share of the potential kept from step to step, in (0, 1).
        v_threshold: firing threshold, positive.
        surrogate_gradient: derivative of a spike in the backward pass: ``rect``, ``rect_zero``, ``atan``, ``sigmoid``.
        image_size: side of the images, pixels.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 1,
        num_classes: PositiveInt = 10,
        width: PositiveInt = 32,
        depth: PositiveInt = 3,
        time_steps: TimeSteps = 4,
        tau: OpenUnitInterval = 0.5,
        v_threshold: PositiveFloat = 1.0,
        surrogate_gradient: SurrogateName = "rect",
        image_size: PositiveInt = 28,
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
    ) -> None:
        super().__init__()
        require_positive(
            in_channels=in_channels, num_classes=num_classes, width=width, depth=depth, time_steps=time_steps
        )
        side = pooled_size(image_size, depth)
        self.time_steps = time_steps
        self.normalize = Normalize(in_channels, mean, std)
        self.currents = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(in_channels if i == 0 else width, width, 3, padding=1),
                nn.AvgPool2d(2),
                ThresholdBatchNorm(width, v_threshold),
            )
            for i in range(depth)
        )
        self.neurons = nn.ModuleList(lif(tau, v_threshold, surrogate_gradient) for _ in range(depth))
        self.pool = nn.Flatten()
        self.head = nn.Linear(width * side**2, num_classes)

    def forward_features(self, image: Tensor) -> Tensor:
        """Images → mean firing rates (N, width, H', W') over the time steps.

        The head is linear: its output at the mean rate is the mean over time of its outputs.
        """
        reset(self)
        current = repeat_time(self.currents[0](self.normalize(image)), self.time_steps)
        spikes = self.neurons[0](current)
        for layer, fire in zip(self.currents[1:], self.neurons[1:], strict=True):
            spikes = fire(unfold_time(layer(fold_time(spikes)), self.time_steps))
        rates = spikes.mean(0)
        reset(self)
        return rates
