"""Any network of the timm collection behind the suite's interface."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from leanlight.contracts import MissingExtraError, UserError, nearest
from lit_modules.nn.normalize import Normalize, PixelStatistic


class TimmNet(nn.Module):
    """A timm network by name: (N, in_channels, H, W) in [0, 1] → (N, num_classes) logits.

    Args:
        name: of the network in timm, e.g. ``resnet18``.
        in_channels: channels of an image: 1 for grey, 3 for colour.
        num_classes: number of classes, the size of the output.
        pretrained: load timm's weights, which downloads them.
        options: further arguments of ``timm.create_model``, e.g. ``img_size``.
        mean: subtracted from pixels in [0, 1], one number or one a channel.
        std: divides pixels after that, one number or one a channel.

    Raises:
        MissingExtraError: timm is not installed.
        UserError: timm has no network of that name.
    """

    def __init__(
        self,
        name: str,
        in_channels: int = 3,
        num_classes: int = 10,
        pretrained: bool = False,
        options: dict[str, Any] | None = None,
        mean: PixelStatistic = 0.5,
        std: PixelStatistic = 0.5,
    ) -> None:
        super().__init__()
        try:
            import timm
        except ModuleNotFoundError as error:
            raise MissingExtraError("timm", "vision") from error
        if not timm.is_model(name.partition(".")[0]):
            raise UserError(f"name: timm has no network {name!r}{nearest(name, timm.list_models())}")
        self.normalize = Normalize(in_channels, mean, std)
        self.network: Any = timm.create_model(
            name, pretrained=pretrained, in_chans=in_channels, num_classes=num_classes, **(options or {})
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.network(self.normalize(image))

    def forward_features(self, image: Tensor) -> Tensor:
        """Images in [0, 1] → timm's features."""
        return self.network.forward_features(self.normalize(image))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's features → logits (N, num_classes), or with `pre_logits` the vectors (N, D) before the last layer."""
        return self.network.forward_head(features, pre_logits=pre_logits)
