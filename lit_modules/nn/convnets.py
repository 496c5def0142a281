"""Plain convolutional networks, as dataset-distillation papers use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from leanlight.contracts.ranges import PositiveInt
from lit_modules.nn.checks import pooled_size, require_positive
from lit_modules.nn.features import FeatureClassifier
from lit_modules.nn.normalize import Normalize, PixelStatistic

Norm = Literal["instance", "batch", "group", "none"]


def norm_layer(norm: Norm) -> Callable[[int], nn.Module]:
    """Return a maker of norm layers by channel count.

    ``instance`` is GroupNorm with one channel a group (affine, no running statistics), the form of the distillation
    literature; ``group`` has 8 channels a group where that divides.
    """
    makers: dict[str, Callable[[int], nn.Module]] = {
        "instance": lambda channels: nn.GroupNorm(channels, channels),
        "batch": nn.BatchNorm2d,
        "group": lambda channels: nn.GroupNorm(max(1, channels // 8) if channels % 8 == 0 else 1, channels),
        "none": lambda channels: nn.Identity(),
    }
    return makers[norm]


class ConvNet(FeatureClassifier):
    """ConvNet-D: `depth` blocks of [conv 3x3 → norm → ReLU → average pooling by 2], then one linear layer.

    Source: Gidaris & Komodakis 2018, and every dataset-distillation paper since Zhao et al. 2021 (width 128, depth 3,
    instance norm at 32 px). (N, in_channels, image_size, image_size) in [0, 1] → (N, num_classes) logits.

    Args:
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output.
        width: channels of every convolution; 128 in the literature.
        depth: D, number of blocks; 3 at 32 px, 4 at 64 px.
        norm: ``instance`` (of the distillation literature), ``batch``, ``group`` (8 channels a group) or ``none``.
        image_size: side of the images, pixels.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 3,
        num_classes: PositiveInt = 10,
        width: PositiveInt = 128,
        depth: PositiveInt = 3,
        norm: Norm = "instance",
        image_size: PositiveInt = 32,
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, num_classes=num_classes, width=width, depth=depth)
        side = pooled_size(image_size, depth)
        self.normalize = Normalize(in_channels, mean, std)
        make_norm = norm_layer(norm)
        blocks = [
            nn.Sequential(
                nn.Conv2d(in_channels if i == 0 else width, width, 3, padding=1),
                make_norm(width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            )
            for i in range(depth)
        ]
        self.features = nn.Sequential(*blocks)
        self.pool = nn.Flatten()
        self.head = nn.Linear(width * side**2, num_classes)


class VGG11(FeatureClassifier):
    """VGG-11 (Simonyan & Zisserman 2015, configuration A) with a norm after each convolution and one linear layer.

    (N, in_channels, image_size, image_size) in [0, 1] → (N, num_classes) logits.

    Args:
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output.
        width: channels of the first layer, 64 in the paper; later layers have 2, 4, 8 times as many.
        norm: ``instance`` (of the distillation literature), ``batch``, ``group`` (8 channels a group) or ``none``.
        image_size: side of the images, pixels; with `pool` flatten at least 32.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.
        pool: what comes before the linear layer: ``flatten``: all positions, after a maximum pooling by 2 in each of
            the five blocks; ``average``: their mean, after poolings in the first blocks alone, until 4 pixels are left
            of a side: the VGG-11 of the data-free distillation literature.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 3,
        num_classes: PositiveInt = 10,
        width: PositiveInt = 64,
        norm: Norm = "instance",
        image_size: PositiveInt = 32,
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
        pool: Literal["flatten", "average"] = "flatten",
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, num_classes=num_classes, width=width, image_size=image_size)
        average = pool == "average"
        poolings = next((n for n in range(5) if image_size >> n <= 4), 5) if average else 5
        self.normalize = Normalize(in_channels, mean, std)
        make_norm = norm_layer(norm)
        layers: list[nn.Module] = []
        channels = in_channels
        for block, multiples in enumerate(((1,), (2,), (4, 4), (8, 8), (8, 8))):
            for multiple in multiples:
                layers += [nn.Conv2d(channels, multiple * width, 3, padding=1), make_norm(multiple * width), nn.ReLU()]
                channels = multiple * width
            if block < poolings:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()) if average else nn.Flatten()
        self.head = nn.Linear(channels if average else channels * pooled_size(image_size, 5) ** 2, num_classes)


class AlexNet(FeatureClassifier):
    """AlexNet in the small form of the dataset-distillation literature (Zhao et al. 2021): five convolutions, no norm.

    (N, in_channels, image_size, image_size) in [0, 1] → (N, num_classes) logits.

    Args:
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output.
        image_size: side of the images, pixels.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 3,
        num_classes: PositiveInt = 10,
        image_size: PositiveInt = 32,
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, num_classes=num_classes)
        self.normalize = Normalize(in_channels, mean, std)
        self.features = nn.Sequential(
            *(nn.Conv2d(in_channels, 128, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(128, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(192, 256, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(256, 192, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(192, 192, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.pool = nn.Flatten()
        self.head = nn.Linear(192 * pooled_size(image_size, 3) ** 2, num_classes)
