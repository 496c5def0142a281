"""The convolutional spiking networks of SFedCA, and the same with ReLUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.ranges import NonNegativeInt, PositiveFloat, PositiveInt, TimeSteps
from lit_modules.nn.checks import require_positive
from lit_modules.nn.neurons import SurrogateName, integrate_and_fire
from lit_modules.nn.normalize import Normalize, PixelStatistic
from lit_modules.nn.spiking import fold_time, repeat_time, reset, unfold_time


class SpikingCNN(nn.Module):
    """Convolutions 3x3 and fully connected layers, an integrate-and-fire neuron after each.

    (N, in_channels, image_size, image_size) in [0, 1] → (N, num_classes): the mean over time of the output neuron's
    spikes, or with spiking_output false of the last layer's current. Direct coding shows the image at each of
    `time_steps` steps, so what precedes the first neuron is computed once; ``poisson`` draws binary spikes with the
    pixels as probabilities. Neurons start at rest in each forward and hold nothing afterwards.

    Args:
        in_channels: C of the image.
        num_classes: K.
        channels: outputs of each convolution; 32 and 64 in the paper's network for MNIST.
        strides: of each convolution; 1 by default.
        pools: of each convolution, whether its output is max-pooled by 2; yes by default.
        padding: of all convolutions.
        hidden: sizes of the fully connected layers before the output; 128 in the paper's network for MNIST.
        batch_norm: after each convolution.
        bias: of convolutions and fully connected layers.
        spiking_output: whether the output layer ends in neurons.
        time_steps: T; 12 in the paper.
        coding: of the image: ``direct`` (the paper) or ``poisson``.
        v_threshold: of all neurons, hard reset to 0; 1 in the paper.
        surrogate_gradient: derivative of a spike; arcus tangent in the published code.
        image_size: H = W.
        mean: of a pixel, one number or one a channel.
        std: of a pixel, one number or one a channel.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 1,
        num_classes: PositiveInt = 10,
        channels: Sequence[PositiveInt] = (32, 64),
        strides: Sequence[PositiveInt] | None = None,
        pools: Sequence[bool] | None = None,
        padding: NonNegativeInt = 1,
        hidden: Sequence[PositiveInt] = (128,),
        batch_norm: bool = False,
        bias: bool = True,
        spiking_output: bool = True,
        time_steps: TimeSteps = 12,
        coding: Literal["direct", "poisson"] = "direct",
        v_threshold: PositiveFloat = 1.0,
        surrogate_gradient: SurrogateName = "atan",
        image_size: PositiveInt = 28,
        mean: PixelStatistic = 0.0,
        std: PixelStatistic = 1.0,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, num_classes=num_classes, time_steps=time_steps)
        self.time_steps, self.coding, self.spiking_output = time_steps, coding, spiking_output
        self.normalize = Normalize(in_channels, mean, std)
        self.currents = _currents(
            in_channels, num_classes, channels, strides, pools, padding, hidden, batch_norm, bias, image_size
        )
        neurons = len(self.currents) if spiking_output else len(self.currents) - 1
        self.neurons = nn.ModuleList(integrate_and_fire(v_threshold, surrogate_gradient) for _ in range(neurons))

    def forward(self, image: Tensor) -> Tensor:
        reset(self)
        steps = self.time_steps
        if self.coding == "poisson":
            shown = (torch.rand(steps, *image.shape, device=image.device) < image).to(image.dtype)
            current = unfold_time(self.currents[0](self.normalize(fold_time(shown))), steps)
        else:
            current = repeat_time(self.currents[0](self.normalize(image)), steps)
        for neuron, layer in zip(self.neurons, self.currents[1:], strict=False):
            current = unfold_time(layer(fold_time(neuron(current))), steps)
        output = self.neurons[-1](current) if self.spiking_output else current
        reset(self)
        return output.mean(0)


class ReLUCNN(nn.Module):
    """`SpikingCNN` with a ReLU for each neuron but the output's, and without time: its ordinary twin.

    (N, in_channels, image_size, image_size) in [0, 1] → (N, num_classes) logits.

    Args:
        in_channels: C of the image.
        num_classes: K.
        channels: outputs of each convolution; 32 and 64 in the paper's network for MNIST.
        strides: of each convolution; 1 by default.
        pools: of each convolution, whether its output is max-pooled by 2; yes by default.
        padding: of all convolutions.
        hidden: sizes of the fully connected layers before the output; 128 in the paper's network for MNIST.
        batch_norm: after each convolution.
        bias: of convolutions and fully connected layers.
        image_size: H = W.
        mean: of a pixel, one number or one a channel.
        std: of a pixel, one number or one a channel.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 1,
        num_classes: PositiveInt = 10,
        channels: Sequence[PositiveInt] = (32, 64),
        strides: Sequence[PositiveInt] | None = None,
        pools: Sequence[bool] | None = None,
        padding: NonNegativeInt = 1,
        hidden: Sequence[PositiveInt] = (128,),
        batch_norm: bool = False,
        bias: bool = True,
        image_size: PositiveInt = 28,
        mean: PixelStatistic = 0.0,
        std: PixelStatistic = 1.0,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, num_classes=num_classes)
        self.normalize = Normalize(in_channels, mean, std)
        self.currents = _currents(
            in_channels, num_classes, channels, strides, pools, padding, hidden, batch_norm, bias, image_size
        )
        self.activations = nn.ModuleList(nn.ReLU() for _ in self.currents[1:])

    def forward(self, image: Tensor) -> Tensor:
        x = self.currents[0](self.normalize(image))
        for activation, layer in zip(self.activations, self.currents[1:], strict=True):
            x = layer(activation(x))
        return x


def _currents(
    in_channels: int,
    num_classes: int,
    channels: Sequence[int],
    strides: Sequence[int] | None,
    pools: Sequence[bool] | None,
    padding: int,
    hidden: Sequence[int],
    batch_norm: bool,
    bias: bool,
    image_size: int,
) -> nn.ModuleList:
    """What makes the input current of each neuron from the spikes of the one before, pooling of these included."""
    strides, pools = list(strides or [1] * len(channels)), list(pools or [True] * len(channels))
    for name, values in (("strides", strides), ("pools", pools)):
        if len(values) != len(channels):
            raise UserError(f"{name}: expected one for each of the {len(channels)} channels, got {len(values)}")
    layers: list[nn.Module] = []
    size, width, pooled = image_size, in_channels, False
    for out, stride, pool in zip(channels, strides, pools, strict=True):
        parts: list[nn.Module] = [nn.MaxPool2d(2)] if pooled else []
        parts.append(nn.Conv2d(width, out, 3, stride, padding, bias=bias))
        parts += [nn.BatchNorm2d(out)] if batch_norm else []
        layers.append(nn.Sequential(*parts))
        size = ((size + 2 * padding - 3) // stride + 1) // (2 if pool else 1)
        width, pooled = out, pool
    if size < 1:
        raise UserError(f"image_size: {image_size} is too small for {len(channels)} convolutions with these pools")
    features = width * size**2
    for number, out in enumerate([*hidden, num_classes]):
        first = [*([nn.MaxPool2d(2)] if pooled else []), nn.Flatten()] if number == 0 else []
        layers.append(nn.Sequential(*first, nn.Linear(features, out, bias=bias)))
        features = out
    for layer in nn.ModuleList(layers).modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.ModuleList(layers)
