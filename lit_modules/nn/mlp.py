"""Fully connected classifiers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lit_modules.nn.checks import require_positive
from lit_modules.nn.normalize import Normalize, PixelStatistic


class MLP(nn.Module):
    """Flatten, then linear layers with ReLU between them: (N, C, H, W) in [0, 1] → (N, num_classes) logits.

    hidden: sizes of the hidden layers; empty makes a linear probe on pixels.
    """

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        hidden: Sequence[int] = (128, 128),
        image_size: int = 28,
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
        self.head = nn.Linear(size, num_classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.features(self.normalize(image)))


class LinearClassifier(MLP):
    """Softmax regression on pixels, the floor every network should beat: an `MLP` without hidden layers."""

    def __init__(
        self,
        in_channels: int = 1,
        num_classes: int = 10,
        image_size: int = 28,
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
    ) -> None:
        super().__init__(in_channels, num_classes, (), image_size, mean, std)
