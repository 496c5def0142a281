"""Networks of several widths on shared bases, spiking and, as their twins, with ReLU (`docs/methods/sfedhifi.md`).

All are classifiers, (N, C, H, W) in [0, 1] → (N, num_classes); `forward_steps` gives what the output does at every
time step. The width scales every factorised convolution; bases have one shape for all widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveFloat, PositiveInt, PositiveShare, TimeSteps, UnitInterval
from lit_modules.nn import Normalize, fold_time, integrate_and_fire, lif, repeat_time, reset, unfold_time
from lit_modules.nn.checks import pooled_size, require_positive
from lit_modules.nn.neurons import SurrogateName
from lit_modules.nn.normalize import PixelStatistic
from lit_modules.sfedhifi.decomposition import DecomConv, make_orthonormal

CIFAR_MEAN = (125.3 / 255, 123.0 / 255, 113.9 / 255)
CIFAR_STD = (63.0 / 255, 62.1 / 255, 66.7 / 255)


@dataclass(frozen=True)
class Neuron:
    """Constants of neurons with hard reset to 0 that fire at `v_threshold`.

    Args:
        leaky: LIF, ``h[t] = tau v[t-1] + (1 - tau) I[t]``; otherwise IF, ``h[t] = v[t-1] + I[t]``.
        tau: share of the potential that a step keeps, in LIF.
        v_threshold: potential at which a neuron fires.
        surrogate_gradient: derivative of a spike, see `lit_modules.nn.lif`.
        detach_reset: keep the reset out of the gradient.
    """

    leaky: bool
    tau: float
    v_threshold: float
    surrogate_gradient: SurrogateName
    detach_reset: bool

    def make(self) -> nn.Module:
        constants = (self.v_threshold, self.surrogate_gradient, self.detach_reset)
        return lif(self.tau, *constants, decay_input=True) if self.leaky else integrate_and_fire(*constants)


class Spikes(nn.Module):
    """Neurons on time folded into the batch: currents (T·N, ...) → spikes (T·N, ...) in {0, 1}.

    Args:
        neuron: their constants.
        time_steps: T.
    """

    def __init__(self, neuron: Neuron, time_steps: int) -> None:
        super().__init__()
        self.neuron = neuron.make()
        self.time_steps = time_steps

    def forward(self, current: Tensor) -> Tensor:
        return fold_time(self.neuron(unfold_time(current, self.time_steps)))

    def constant(self, current: Tensor) -> Tensor:
        """Show the current (N, ...) at every step: spikes (T·N, ...)."""
        return fold_time(self.neuron(repeat_time(current, self.time_steps)))


class Rectified(nn.ReLU):
    """What stands in for `Spikes` in a network without time."""

    def constant(self, current: Tensor) -> Tensor:
        return self(current)


@dataclass(frozen=True)
class Factors:
    """How bases follow from a layer's channels at p = 1.

    a1 = round(basis_fraction · reference channels), a2 = round(n_basis · output channels).

    Args:
        basis_fraction: input channels that a basis reads, as a share.
        n_basis: filters of a basis over output channels.
    """

    basis_fraction: float
    n_basis: float

    def shape(self, reference: int, out_channels: int) -> tuple[int, int]:
        """(a1, a2); UserError where one would be 0."""
        channels, filters = round(self.basis_fraction * reference), round(self.n_basis * out_channels)
        if channels < 1 or filters < 1:
            raise UserError(
                f"basis_fraction, n_basis: {self.basis_fraction} of {reference} channels and {self.n_basis} of "
                f"{out_channels} must be at least 1, got {channels} and {filters}"
            )
        return channels, filters


class WidthNetwork(nn.Module):
    """Base of the networks of different widths. Subclasses set `stem` and give `body`.

    Args:
        width: p in (0, 1], the share of its `channels` that a layer has.
        in_channels: C of the image.
        num_classes: K.
        channels: of the layers at p = 1.
        factors: sizes of the bases; None makes ordinary convolutions, the first of them scaled as the others are.
        neuron: constants of the neurons; None makes the twin with ReLU.
        time_steps: T; 1 without neurons.
        output_neuron: end in neurons, so that outputs are spikes.
        mean: of a pixel, one number or one a channel.
        std: of a pixel, one number or one a channel.
        scaler: divide what convolutions give by the width in training; ordinary ones alone.
    """

    stem: nn.Module

    def __init__(
        self,
        width: float,
        in_channels: int,
        num_classes: int,
        channels: Sequence[int],
        factors: Factors | None,
        neuron: Neuron | None,
        time_steps: int,
        output_neuron: bool,
        mean: PixelStatistic,
        std: PixelStatistic,
        scaler: bool,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, num_classes=num_classes, time_steps=time_steps)
        require_positive(**{f"channels[{i}]": count for i, count in enumerate(channels)})
        if not 0.0 < width <= 1.0:
            raise UserError(f"width: expected a number in (0, 1], got {width}")
        if scaler and factors is not None:
            raise UserError("scaler: needs ordinary convolutions; set factorised: false")
        self._scaler = scaler
        self.width, self.time_steps, self.spiking = width, time_steps, neuron is not None
        self._neuron, self._factors = neuron, factors
        self.stem_channels = channels[0] if factors is not None else self.scaled(channels[0])
        self.normalize = Normalize(in_channels, mean, std)
        self.fire = self.activation()
        self.output = self.activation() if neuron is not None and output_neuron else nn.Identity()

    def body(self, x: Tensor) -> Tensor:
        """(T·N, C, H, W) from the stem → (T·N, num_classes) before the output neuron."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] → (N, num_classes), the mean of `forward_steps` over time: firing rates where an
        output neuron is.
        """
        return self.forward_steps(image).mean(0)

    def forward_steps(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] → (T, N, num_classes): spikes in {0, 1} with an output neuron, otherwise currents.

        The image is shown at every step; the stem computes it once. Neurons start at rest and hold nothing afterwards.
        """
        reset(self)
        x = self.fire.constant(self.stem(self.normalize(image)))
        outputs = unfold_time(self.output(self.body(x)), self.time_steps)
        reset(self)
        return outputs

    def activation(self, v_threshold: float | None = None) -> Spikes | Rectified:
        """A new layer of neurons, or ReLU. v_threshold: another than the network's."""
        if self._neuron is None:
            return Rectified()
        neuron = self._neuron if v_threshold is None else replace(self._neuron, v_threshold=v_threshold)
        return Spikes(neuron, self.time_steps)

    def scaled(self, channels: int) -> int:
        """Channels at this width; UserError when none is left."""
        count = round(channels * self.width)
        if count < 1:
            raise UserError(f"width: {self.width} leaves none of {channels} channels")
        return count

    def convolution(
        self,
        in_channels: int,
        full_out: int,
        reference: int,
        stride: int = 1,
        inner: nn.Module | None = None,
    ) -> nn.Module:
        """3x3 convolution without bias to the scaled `full_out` channels. reference: channels that a1 is a fraction
        of.
        """
        out_channels = self.scaled(full_out)
        if self._factors is None:
            return self.ordinary(in_channels, out_channels, 3, stride, 1, bias=False)
        a1, a2 = self._factors.shape(reference, full_out)
        return DecomConv(in_channels, out_channels, a1, a2, stride=stride, inner=inner)

    def ordinary(self, *args: Any, **options: Any) -> nn.Conv2d:
        """A convolution that is no product of factors; arguments of `nn.Conv2d`."""
        return kaiming(ScaledConv2d(self.width, *args, **options) if self._scaler else nn.Conv2d(*args, **options))


class ScaledConv2d(nn.Conv2d):
    """A convolution whose output is divided by `width` in training (HeteroFL, Diao et al., ICLR 2021).

    A narrow network then sends on as much as the widest, of which it is a part.

    Args:
        width: p in (0, 1].
        *args: of `nn.Conv2d`.
        **options: of `nn.Conv2d`.
    """

    def __init__(self, width: float, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y / self.width if self.training else y


def kaiming(conv: nn.Conv2d) -> nn.Conv2d:
    """`conv` with new Kaiming-normal weights by fan-out, bias 0."""
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class _Block(nn.Module):
    """Residual block; the bases of its two convolutions are orthonormal to each other, too."""

    def __init__(self, network: WidthNetwork, in_channels: int, full_out: int, reference: int, stride: int) -> None:
        super().__init__()
        out = network.scaled(full_out)
        self.conv1 = network.convolution(in_channels, full_out, reference, stride)
        self.norm1, self.fire1 = nn.BatchNorm2d(out), network.activation()
        self.conv2 = network.convolution(out, full_out, reference)
        self.norm2, self.fire2 = nn.BatchNorm2d(out), network.activation()
        if isinstance(self.conv1, DecomConv) and isinstance(self.conv2, DecomConv):
            make_orthonormal([self.conv1, self.conv2])
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out:
            projection = network.ordinary(in_channels, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.fire1(self.norm1(self.conv1(x)))))
        return self.fire2(y + self.shortcut(x))


class _ResNet18(WidthNetwork):
    def __init__(self, channels: Sequence[int], in_channels: int, num_classes: int, **options: Any) -> None:
        super().__init__(channels=channels, in_channels=in_channels, num_classes=num_classes, **options)
        now = self.stem_channels
        self.stem = nn.Sequential(self.ordinary(in_channels, now, 3, padding=1, bias=False), nn.BatchNorm2d(now))
        stages: list[nn.Module] = []
        for before, full in pairwise((channels[0], *channels)):
            stride = 2 if stages else 1
            blocks = [_Block(self, now, full, before, stride), _Block(self, self.scaled(full), full, full, 1)]
            stages.append(nn.Sequential(*blocks))
            now = self.scaled(full)
        self.stages = nn.Sequential(*stages)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(now, num_classes))

    def body(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x))


class FactorisedSpikingResNet18(_ResNet18):
    """Spiking ResNet-18 of one width with a 3x3 stem of stride 1; the defaults are the paper's network for CIFAR-10.

    Args:
        width: p in (0, 1], the share of its `channels` that a layer has.
        in_channels: C of the image.
        num_classes: K.
        channels: of the four stages at p = 1; the stem has the first of them at every p.
        basis_fraction: share of its input channels at p = 1 that a basis reads (a1); 1/8 in the paper.
        n_basis: filters of a basis (a2) over output channels at p = 1; 1/4 in the paper.
        time_steps: T; 10 in the paper.
        tau: share of the potential that a LIF neuron keeps a step; it takes 1 - tau of the input; 1/2 in the paper.
        v_threshold: of all neurons, hard reset to 0; 1 in the paper.
        surrogate_gradient: derivative of a spike; sigmoid as published.
        detach_reset: keep the reset out of the gradient; published code does not.
        output_neuron: end in neurons, so that outputs are spikes.
        factorised: false makes ordinary convolutions, the first of them scaled too, for rivals that slice weights.
        scaler: divide what they give by the width in training (HeteroFL); without `factorised` only.
        mean: of a pixel, one number or one a channel.
        std: of a pixel, one number or one a channel.
    """

    def __init__(
        self,
        width: PositiveShare = 1.0,
        in_channels: PositiveInt = 3,
        num_classes: PositiveInt = 10,
        channels: Sequence[PositiveInt] = (64, 128, 256, 512),
        basis_fraction: PositiveShare = 0.125,
        n_basis: PositiveFloat = 0.25,
        time_steps: TimeSteps = 10,
        tau: UnitInterval = 0.5,
        v_threshold: PositiveFloat = 1.0,
        surrogate_gradient: SurrogateName = "sigmoid",
        detach_reset: bool = False,
        output_neuron: bool = True,
        factorised: bool = True,
        scaler: bool = False,
        mean: PixelStatistic = CIFAR_MEAN,
        std: PixelStatistic = CIFAR_STD,
    ) -> None:
        super().__init__(
            width=width,
            in_channels=in_channels,
            num_classes=num_classes,
            channels=channels,
            factors=Factors(basis_fraction, n_basis) if factorised else None,
            neuron=Neuron(True, tau, v_threshold, surrogate_gradient, detach_reset),
            time_steps=time_steps,
            output_neuron=output_neuron,
            mean=mean,
            std=std,
            scaler=scaler,
        )


class FactorisedResNet18(_ResNet18):
    """`FactorisedSpikingResNet18` with ReLU for every hidden neuron, without time: (N, C, H, W) → logits.

    Args:
        width: p in (0, 1], the share of its `channels` that a layer has.
        in_channels: C of the image.
        num_classes: K.
        channels: of the four stages at p = 1; the stem has the first of them at every p.
        basis_fraction: share of its input channels at p = 1 that a basis reads (a1); 1/8 in the paper.
        n_basis: filters of a basis (a2) over output channels at p = 1; 1/4 in the paper.
        factorised: false makes ordinary convolutions, the first of them scaled too, for rivals that slice weights.
        scaler: divide what they give by the width in training (HeteroFL); without `factorised` only.
        mean: of a pixel, one number or one a channel.
        std: of a pixel, one number or one a channel.
    """

    def __init__(
        self,
        width: PositiveShare = 1.0,
        in_channels: PositiveInt = 3,
        num_classes: PositiveInt = 10,
        channels: Sequence[PositiveInt] = (64, 128, 256, 512),
        basis_fraction: PositiveShare = 0.125,
        n_basis: PositiveFloat = 0.25,
        factorised: bool = True,
        scaler: bool = False,
        mean: PixelStatistic = CIFAR_MEAN,
        std: PixelStatistic = CIFAR_STD,
    ) -> None:
        super().__init__(
            width=width,
            in_channels=in_channels,
            num_classes=num_classes,
            channels=channels,
            factors=Factors(basis_fraction, n_basis) if factorised else None,
            neuron=None,
            time_steps=1,
            output_neuron=False,
            mean=mean,
            std=std,
            scaler=scaler,
        )


class _CNN(WidthNetwork):
    def __init__(
        self,
        channels: Sequence[int],
        in_channels: int,
        num_classes: int,
        image_size: int,
        norm: bool,
        inner_neuron: bool,
        inner_threshold: PositiveFloat = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(channels=channels, in_channels=in_channels, num_classes=num_classes, **options)
        if len(channels) != 3:
            raise UserError(f"channels: expected 3 numbers, one a convolution, got {len(channels)}")
        first, second, third = channels

        def norm_of(count: int) -> nn.Module:
            return nn.BatchNorm2d(count) if norm else nn.Identity()

        def inner() -> nn.Module | None:
            return self.activation(inner_threshold) if inner_neuron else None

        now = self.stem_channels
        self.stem = nn.Sequential(self.ordinary(in_channels, now, 3, padding=1, bias=not norm), norm_of(now))
        self.conv1 = self.convolution(now, second, first, inner=inner())
        self.norm1, self.fire1 = norm_of(self.scaled(second)), self.activation()
        self.conv2 = self.convolution(self.scaled(second), third, second, inner=inner())
        self.norm2, self.fire2 = norm_of(self.scaled(third)), self.activation()
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(self.scaled(third) * pooled_size(image_size, 2) ** 2, num_classes)

    def body(self, x: Tensor) -> Tensor:
        x = self.pool(self.fire1(self.norm1(self.conv1(x))))
        x = self.pool(self.fire2(self.norm2(self.conv2(x))))
        return self.head(x.flatten(1))


class FactorisedSpikingCNN(_CNN):
    """Four spiking layers of one width; the defaults are the paper's network for Fashion-MNIST.

    conv 3x3 - IF - conv 3x3 - IF - max pooling by 2 - conv 3x3 - IF - max pooling by 2 - linear - IF.

    Args:
        width: p in (0, 1], the share of its `channels` that a layer has.
        in_channels: C of the image.
        num_classes: K.
        image_size: H = W.
        channels: of the three convolutions at p = 1; the first has them at every p and is not factorised.
        basis_fraction: share of its input channels at p = 1 that a basis reads (a1); 1/8 in the paper.
        n_basis: filters of a basis (a2) over output channels at p = 1; 1/4 in the paper.
        time_steps: T; 10 in the paper.
        leaky: LIF in place of IF.
        tau: share of the potential that a LIF neuron keeps a step; it takes 1 - tau of the input.
        v_threshold: of the neurons behind convolutions and output, hard reset to 0; 0.5 in the paper.
        inner_neuron: neurons between basis and factor, as published; such convolutions cannot be folded.
        inner_threshold: of those; 1 in the published code.
        surrogate_gradient: derivative of a spike; sigmoid as published.
        detach_reset: keep the reset out of the gradient; published code does not.
        norm: batch norm behind every convolution; none in the paper.
        output_neuron: end in neurons, so that outputs are spikes.
        factorised: false makes ordinary convolutions, the first of them scaled too, for rivals that slice weights.
        scaler: divide what they give by the width in training (HeteroFL); without `factorised` only.
        mean: of a pixel, one number or one a channel.
        std: of a pixel, one number or one a channel.
    """

    def __init__(
        self,
        width: PositiveShare = 1.0,
        in_channels: PositiveInt = 1,
        num_classes: PositiveInt = 10,
        image_size: PositiveInt = 28,
        channels: Sequence[PositiveInt] = (64, 128, 128),
        basis_fraction: PositiveShare = 0.125,
        n_basis: PositiveFloat = 0.25,
        time_steps: TimeSteps = 10,
        leaky: bool = False,
        tau: UnitInterval = 0.5,
        v_threshold: PositiveFloat = 0.5,
        inner_neuron: bool = True,
        inner_threshold: PositiveFloat = 1.0,
        surrogate_gradient: SurrogateName = "sigmoid",
        detach_reset: bool = False,
        norm: bool = False,
        output_neuron: bool = True,
        factorised: bool = True,
        scaler: bool = False,
        mean: PixelStatistic = 0.1307,
        std: PixelStatistic = 0.3081,
    ) -> None:
        super().__init__(
            width=width,
            in_channels=in_channels,
            num_classes=num_classes,
            image_size=image_size,
            channels=channels,
            factors=Factors(basis_fraction, n_basis) if factorised else None,
            norm=norm,
            inner_neuron=inner_neuron,
            inner_threshold=inner_threshold,
            neuron=Neuron(leaky, tau, v_threshold, surrogate_gradient, detach_reset),
            time_steps=time_steps,
            output_neuron=output_neuron,
            mean=mean,
            std=std,
            scaler=scaler,
        )


class FactorisedCNN(_CNN):
    """`FactorisedSpikingCNN` with ReLU for every hidden neuron, without time: (N, C, H, W) → logits.

    Args:
        width: p in (0, 1], the share of its `channels` that a layer has.
        in_channels: C of the image.
        num_classes: K.
        image_size: H = W.
        channels: of the three convolutions at p = 1; the first has them at every p and is not factorised.
        basis_fraction: share of its input channels at p = 1 that a basis reads (a1); 1/8 in the paper.
        n_basis: filters of a basis (a2) over output channels at p = 1; 1/4 in the paper.
        inner_neuron: a ReLU between basis and factor; such convolutions cannot be folded.
        norm: batch norm behind every convolution; none in the paper.
        factorised: false makes ordinary convolutions, the first of them scaled too, for rivals that slice weights.
        scaler: divide what they give by the width in training (HeteroFL); without `factorised` only.
        mean: of a pixel, one number or one a channel.
        std: of a pixel, one number or one a channel.
    """

    def __init__(
        self,
        width: PositiveShare = 1.0,
        in_channels: PositiveInt = 1,
        num_classes: PositiveInt = 10,
        image_size: PositiveInt = 28,
        channels: Sequence[PositiveInt] = (64, 128, 128),
        basis_fraction: PositiveShare = 0.125,
        n_basis: PositiveFloat = 0.25,
        inner_neuron: bool = True,
        norm: bool = False,
        factorised: bool = True,
        scaler: bool = False,
        mean: PixelStatistic = 0.1307,
        std: PixelStatistic = 0.3081,
    ) -> None:
        super().__init__(
            width=width,
            in_channels=in_channels,
            num_classes=num_classes,
            image_size=image_size,
            channels=channels,
            factors=Factors(basis_fraction, n_basis) if factorised else None,
            norm=norm,
            inner_neuron=inner_neuron,
            neuron=None,
            time_steps=1,
            output_neuron=False,
            mean=mean,
            std=std,
            scaler=scaler,
        )
