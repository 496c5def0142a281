"""Fully connected classifiers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from leanlight.contracts.ranges import PositiveInt
from lit_modules.nn.checks import require_positive
from lit_modules.nn.features import FeatureClassifier
from lit_modules.nn.normalize import Normalize, PixelStatistic


class MLP(FeatureClassifier):
    """Flatten, then linear layers with ReLU between them: (N, C, H, W) in [0, 1] → (N, num_classes) logits.

    Args:
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output.
        hidden: sizes of the hidden layers; an empty list makes a linear probe on pixels.
        image_size: side of the images, pixels.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 1,
        num_classes: PositiveInt = 10,
        hidden: Sequence[PositiveInt] = (128, 128),
        image_size: PositiveInt = 28,
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, num_classes=num_classes, image_size=image_size)
        self.normalize = Normalize(in_channels, mean, std)
        layers: list[nn.Module] = [nn.Flatten()]
        size = in_channels * image_size**2
        for width in hidden:
            require_positive(hidden=width)
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.Identity()  # they are vectors already
        self.head = nn.Linear(size, num_classes)


class LinearClassifier(MLP):
    """Softmax regression on pixels, the floor every network should beat: an `MLP` without hidden layers.

    Args:
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output.
        image_size: side of the images, pixels.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.
    """

    def __init__(
        self,
        in_channels: PositiveInt = 1,
        num_classes: PositiveInt = 10,
        image_size: PositiveInt = 28,
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
    ) -> None:
        super().__init__(in_channels, num_classes, (), image_size, mean, std)
