"""Pixel statistics that belong to a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.ranges import FiniteFloat

PixelStatistic = FiniteFloat | Sequence[FiniteFloat]


class Normalize(nn.Module):
    """Map pixels in [0, 1] to ``(x - mean) / std`` per channel.

    `mean` and `std` are buffers, so that a checkpoint or an exported network is complete without its data module, and
    noise or inversion acts on plain pixels.

    Args:
        channels: of an image.
        mean: one number for all channels or one a channel.
        std: one positive number for all channels or one a channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, mean: PixelStatistic = 0.5, std: PixelStatistic = 0.5) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("std", std)):
            values = [float(value)] * channels if isinstance(value, (int, float)) else [float(v) for v in value]
            if len(values) != channels:
                raise UserError(f"{name}: expected 1 or {channels} numbers (one per input channel), got {len(values)}")
            if name == "std" and min(values) <= 0:
                raise UserError(f"std: expected positive numbers, got {values}")
            self.register_buffer(name, torch.tensor(values).view(channels, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-3] != len(self.mean):  # broadcasting would accept grey images for a colour network
            raise ValueError(f"expected images of {len(self.mean)} channels, got shape {tuple(image.shape)}")
        return (image - self.mean) / self.std
