"""Layers of a network with what a rule of tuning has put behind them."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class AdaptedLayer(nn.Module):
    """y + Up(GELU(Down(y))) of a layer's output y: an adapter as Pfeiffer et al. (2021) place it, behind the MLP.

    Up is 0 at first, so that the network begins as it was. Were Down, too, neither would ever get a gradient.

    Args:
        layer: (..., D) → (..., D).
        width: of its output (D).
        bottleneck: between Down and Up, at least 1.
    """

    def __init__(self, layer: nn.Module, width: int, bottleneck: int) -> None:
        super().__init__()
        up = nn.Linear(bottleneck, width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.layer, self.adapter = layer, nn.Sequential(nn.Linear(width, bottleneck), nn.GELU(), up)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + self.adapter(y)


class ScaledLayer(nn.Module):
    """γ y + β of a layer's output y, by channel, with γ from N(1, 0.02²) and β from N(0, 0.02²).

    Args:
        layer: linear, a convolution over images, or a norm over the last axis; with weights.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d | nn.LayerNorm) -> None:
        super().__init__()
        channels = len(layer.weight)
        self.layer = layer
        self.gamma = nn.Parameter(1 + 0.02 * torch.randn(channels))
        self.beta = nn.Parameter(0.02 * torch.randn(channels))
        self._tail = (1, 1) if isinstance(layer, nn.Conv2d) else ()

    def forward(self, x: Tensor) -> Tensor:
        channels = (-1, *self._tail)
        return self.layer(x) * self.gamma.view(channels) + self.beta.view(channels)

    def merged(self) -> nn.Module:
        """A layer like that within, which does both."""
        layer, gamma, beta = copy.deepcopy(self.layer), self.gamma.detach(), self.beta.detach()
        weight = layer.weight.detach()
        layer.weight = nn.Parameter(weight * gamma.view(-1, *[1] * (weight.ndim - 1)), requires_grad=False)
        bias = beta if layer.bias is None else layer.bias.detach() * gamma + beta
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
        return layer
