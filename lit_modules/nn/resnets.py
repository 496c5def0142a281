"""Residual networks for small images, on torchvision's blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveInt, Share
from lit_modules.nn.checks import require_positive
from lit_modules.nn.convnets import Norm, norm_layer
from lit_modules.nn.features import FeatureClassifier
from lit_modules.nn.normalize import Normalize, PixelStatistic


class _PadShortcut(nn.Module):
    """Shortcut without parameters (option A of He et al. 2016): take every second pixel, pad channels with zeros."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class _SmallImageResNet(FeatureClassifier):
    """A 3x3 stem of stride 1 without pooling, stages of residual blocks, global average pooling, one linear layer."""

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        in_channels: int,
        num_classes: int,
        width: int,
        norm: Norm,
        pad_shortcut: bool,
        mean: PixelStatistic,
        std: PixelStatistic,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, num_classes=num_classes, width=width)
        make_norm = norm_layer(norm)
        self.normalize = Normalize(in_channels, mean, std)
        layers: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            make_norm(width),
            nn.ReLU(),
        ]
        channels = width
        for stage, count in enumerate(blocks):
            planes = width << stage
            for position in range(count):
                stride = 2 if stage > 0 and position == 0 else 1
                out = planes * block.expansion
                shortcut: nn.Module | None = None
                if stride != 1 or channels != out:
                    shortcut = (
                        _PadShortcut(out - channels, stride)
                        if pad_shortcut
                        else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), make_norm(out))
                    )
                layers.append(block(channels, planes, stride, shortcut, norm_layer=make_norm))
                channels = out
        self.features = nn.Sequential(*layers)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class ResNet18(_SmallImageResNet):
    """ResNet-18 (He et al. 2016) with the 3x3 stem of small images: (N, C, H, W) in [0, 1] → (N, num_classes) logits.

    Args:
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output.
        width: channels of the first stage, 64 in the paper; doubled in each further stage.
        norm: ``batch`` as published; ``instance``, ``group`` or ``none`` where batch statistics do harm.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 3,
        num_classes: PositiveInt = 10,
        width: PositiveInt = 64,
        norm: Norm = "batch",
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
    ) -> None:
        super().__init__(BasicBlock, (2, 2, 2, 2), in_channels, num_classes, width, norm, False, mean, std)


class ResNet34(_SmallImageResNet):
    """ResNet-34 (He et al. 2016) with the 3x3 stem of small images: (N, C, H, W) in [0, 1] → (N, num_classes) logits.

    Args:
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output.
        width: channels of the first stage, 64 in the paper; doubled in each further stage.
        norm: ``batch`` as published; ``instance``, ``group`` or ``none`` where batch statistics do harm.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 3,
        num_classes: PositiveInt = 10,
        width: PositiveInt = 64,
        norm: Norm = "batch",
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
    ) -> None:
        super().__init__(BasicBlock, (3, 4, 6, 3), in_channels, num_classes, width, norm, False, mean, std)


class ResNet50(_SmallImageResNet):
    """ResNet-50 (He et al. 2016) with the 3x3 stem of small images: (N, C, H, W) in [0, 1] → (N, num_classes) logits.

    Args:
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output.
        width: channels of the first stage, 64 in the paper; bottleneck blocks put out four times as many.
        norm: ``batch`` as published; ``instance``, ``group`` or ``none`` where batch statistics do harm.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 3,
        num_classes: PositiveInt = 10,
        width: PositiveInt = 64,
        norm: Norm = "batch",
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
    ) -> None:
        super().__init__(Bottleneck, (3, 4, 6, 3), in_channels, num_classes, width, norm, False, mean, std)


class CifarResNet(_SmallImageResNet):
    """The thin ResNets of the CIFAR experiments (He et al. 2016, section 4.2): depth = 6n + 2, widths 16, 32, 64.

    Shortcuts without parameters (option A). (N, C, H, W) in [0, 1] → (N, num_classes) logits.

    Args:
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output.
        depth: number of layers with weights, 6n + 2: 20, 32, 44, 56, 110, …
        width: channels of the first stage, 16 in the paper.
        norm: ``batch`` as published; ``instance``, ``group`` or ``none`` where batch statistics do harm.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 3,
        num_classes: PositiveInt = 10,
        depth: PositiveInt = 20,
        width: PositiveInt = 16,
        norm: Norm = "batch",
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
    ) -> None:
        if depth < 8 or (depth - 2) % 6:
            raise UserError(f"depth: expected 6n + 2 (20, 32, 44, 56, 110, …), got {depth}")
        blocks = ((depth - 2) // 6,) * 3
        super().__init__(BasicBlock, blocks, in_channels, num_classes, width, norm, True, mean, std)


class _PreActivationBlock(nn.Module):
    """norm → ReLU → conv → norm → ReLU → dropout → conv, with a 1x1 shortcut where shapes change."""

    def __init__(self, channels: int, out: int, stride: int, dropout: float, norm: Norm) -> None:
        super().__init__()
        make_norm = norm_layer(norm)
        self.activate = nn.Sequential(make_norm(channels), nn.ReLU())
        self.residual = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            make_norm(out),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
        )
        self.shortcut = None if channels == out else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.activate(x)
        return self.residual(activated) + (x if self.shortcut is None else self.shortcut(activated))


class WideResNet(FeatureClassifier):
    """WRN-`depth`-`widen_factor` (Zagoruyko & Komodakis 2016): (N, C, H, W) in [0, 1] → (N, num_classes) logits.

    Args:
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output.
        depth: number of layers with weights, 6n + 4: 10, 16, 22, 28, 40, …
        widen_factor: k, channels of the first stage over 16.
        dropout: probability that a value inside a block is set to zero in training, in [0, 1).
        norm: ``batch`` as published; ``instance``, ``group`` or ``none`` where batch statistics do harm.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 3,
        num_classes: PositiveInt = 10,
        depth: PositiveInt = 28,
        widen_factor: PositiveInt = 10,
        dropout: Share = 0.0,
        norm: Norm = "batch",
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, num_classes=num_classes, widen_factor=widen_factor)
        if depth < 10 or (depth - 4) % 6:
            raise UserError(f"depth: expected 6n + 4 (10, 16, 22, 28, 40, …), got {depth}")
        self.normalize = Normalize(in_channels, mean, std)
        layers: list[nn.Module] = [nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)]
        channels = 16
        for stage in range(3):
            out = (16 << stage) * widen_factor
            for position in range((depth - 4) // 6):
                stride = 2 if stage > 0 and position == 0 else 1
                layers.append(_PreActivationBlock(channels, out, stride, dropout, norm))
                channels = out
        self.features = nn.Sequential(*layers, norm_layer(norm)(channels), nn.ReLU())
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
