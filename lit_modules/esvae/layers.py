"""Spiking encoder and decoder of the ESVAE family, on time-first signals (T, N, ...)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from leanlight.contracts import UserError
from lit_modules.nn import LeakyReadout, ThresholdBatchNorm, fold_time, lif, repeat_time, unfold_time
from lit_modules.nn.checks import require_positive
from lit_modules.nn.neurons import SurrogateName

CHANNELS_32 = (32, 64, 128, 256)  # 32×32 images; one more halving, 512, makes the 64×64 model


@dataclass(frozen=True)
class Neuron:
    """Constants of every hidden neuron.

    Args:
        tau: τ, share of the membrane potential kept a step, in [0, 1].
        v_threshold: V_th, potential that fires.
        surrogate_gradient: ``rect_zero`` centres the boxcar derivative on 0 (published code), ``rect`` on V_th.
    """

    tau: float = 0.25
    v_threshold: float = 0.2
    surrogate_gradient: SurrogateName = "rect_zero"

    def make(self) -> nn.Module:
        return lif(self.tau, self.v_threshold, self.surrogate_gradient)


class SpikingLayer(nn.Module):
    """[weights → tdBN → LIF]: spikes (T, N, ...) → spikes (T, N, ...).

    Args:
        weights: a layer without state, which works on time folded into the batch.
        features: its output channels.
        neuron: constants of its neurons.
        alpha: α of the threshold-dependent norm; 1 in the paper, 2 in FSVAE's latent networks.
    """

    def __init__(
        self, weights: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, features: int, neuron: Neuron, alpha: float = 1.0
    ) -> None:
        super().__init__()
        self.weights = weights
        self.norm = ThresholdBatchNorm(
            features, neuron.v_threshold, alpha, dims=0 if isinstance(weights, nn.Linear) else 2
        )
        self.fire = neuron.make()

    def forward(self, spikes: Tensor) -> Tensor:
        current = self.norm(self.weighted(fold_time(spikes)))
        return self.fire(unfold_time(current, len(spikes)))

    def constant(self, x: Tensor, time_steps: int) -> Tensor:
        """Show x (N, ...) at every step: equal to ``forward(repeat_time(x, time_steps))`` at 1 / time_steps of the
        work.
        """
        current = norm_of_copies(self.norm, self.weighted(x), time_steps)
        return self.fire(repeat_time(current, time_steps))

    def weighted(self, x: Tensor) -> Tensor:
        """`weights` of x. In training the norm subtracts the bias again, so its gradient is 0 and need not be summed
        up.
        """
        if not self.norm.training:
            return self.weights(x)
        weight, bias = self.weights.weight, cast(Tensor, self.weights.bias)
        # 0 * bias keeps the bias in the graph, with gradient 0, for optimisers and DDP.
        return torch.func.functional_call(self.weights, {"weight": weight + 0 * bias.sum(), "bias": bias.detach()}, x)


def norm_of_copies(norm: ThresholdBatchNorm, x: Tensor, copies: int) -> Tensor:
    """Normalise x (N, C, ...) as if the batch held `copies` of it.

    Mean and biased variance are the same for the copies as for x; only the running variance, which is unbiased, has
    another factor: ``copies * n / (copies * n - 1)`` for n values a channel in place of ``n / (n - 1)``.

    Args:
        norm: in either mode; in training its running statistics move.
        x: what the batch holds several times.
        copies: how often.
    """
    batch_norm = norm.norm
    if not (norm.training and batch_norm.track_running_stats):
        return norm(x)
    assert batch_norm.running_var is not None
    assert batch_norm.momentum is not None
    kept = batch_norm.running_var * (1 - batch_norm.momentum)
    out = norm(x)
    n = x.numel() // x.shape[1] * _ranks(batch_norm)
    # Through .data, unseen by autograd, which keeps the running variance for the backward pass but does not read it.
    batch_norm.running_var.data.sub_(kept).mul_(copies * (n - 1) / (copies * n - 1)).add_(kept)
    return out


def _ranks(batch_norm: nn.Module) -> int:
    """Processes whose batches share the statistics, each holding as many items as this one."""
    return torch.distributed.get_world_size() if isinstance(batch_norm, nn.SyncBatchNorm) else 1


class SpikingEncoder(nn.Module):
    """Images (N, C, H, W) in [-1, 1] → spikes (T, N, d): strided spiking convolutions, then a spiking linear layer.

    Each convolution halves the side. The image is shown at every step.

    Args:
        in_channels: C of the images.
        image_size: side of the square images, in pixels.
        channels: output channels of each convolution.
        latent_size: d.
        time_steps: T.
        neuron: constants of all neurons.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        channels: Sequence[int],
        latent_size: int,
        time_steps: int,
        neuron: Neuron,
    ) -> None:
        super().__init__()
        self.time_steps = time_steps
        self.layers = nn.ModuleList(
            SpikingLayer(nn.Conv2d(before, after, 3, stride=2, padding=1), after, neuron)
            for before, after in zip((in_channels, *channels), channels, strict=False)
        )
        side = bottom_side(image_size, channels)
        self.head = SpikingLayer(nn.Linear(channels[-1] * side**2, latent_size), latent_size, neuron)

    def forward(self, image: Tensor) -> Tensor:
        first, *others = self.layers
        spikes = cast(SpikingLayer, first).constant(
            image.contiguous(memory_format=torch.channels_last), self.time_steps
        )
        for layer in others:
            spikes = layer(spikes)
        return self.head(spikes.flatten(2))


class SpikingDecoder(nn.Module):
    """Spikes (T, N, d) → images (N, C, H, W) in (-1, 1): the encoder mirrored, then a leaky readout and tanh.

    Args:
        out_channels: C of the images.
        image_size: side of the square images, in pixels.
        channels: those of the encoder.
        latent_size: d.
        neuron: constants of all neurons.
        readout_decay: λ_o, share of the output potential kept a step.
    """

    def __init__(
        self,
        out_channels: int,
        image_size: int,
        channels: Sequence[int],
        latent_size: int,
        neuron: Neuron,
        readout_decay: float = 0.8,
    ) -> None:
        super().__init__()
        side = bottom_side(image_size, channels)
        self.shape = (channels[-1], side, side)
        flat = channels[-1] * side**2
        self.head = SpikingLayer(nn.Linear(latent_size, flat), flat, neuron)
        backwards = (*reversed(channels), channels[0])
        self.layers = nn.ModuleList(
            SpikingLayer(nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1), after, neuron)
            for before, after in pairwise(backwards)
        )
        self.last = nn.ConvTranspose2d(channels[0], out_channels, 3, padding=1)
        self.readout = LeakyReadout(readout_decay)

    def forward(self, spikes: Tensor) -> Tensor:
        spikes = self.head(spikes).unflatten(2, self.shape)
        spikes = unfold_time(fold_time(spikes).contiguous(memory_format=torch.channels_last), len(spikes))
        for layer in self.layers:
            spikes = layer(spikes)
        return self.potential(spikes).tanh()

    def potential(self, spikes: Tensor) -> Tensor:
        """Last convolution and readout, ``sum_t decay^(T-1-t) (W s[t] + b)``, in the order ``W (sum_t decay^(T-1-t)
        s[t]) + ...``.

        Both are linear, so the convolution is computed once and not T times; b counts with the sum of the weights.
        """
        weighted = self.readout(spikes.movedim(2, -1)).movedim(-1, 1)  # channels last in memory: no copy
        bias = self.last.bias
        assert bias is not None
        total = self.readout(torch.ones(len(spikes), 1, dtype=bias.dtype, device=bias.device))
        return self.last(weighted) + ((total - 1) * bias)[:, None, None]


def bottom_side(image_size: int, channels: Sequence[int]) -> int:
    """Side of the smallest map; UserError when the sizes do not fit each other."""
    if not channels:
        raise UserError("channels: expected at least one number, got none")
    require_positive(image_size=image_size, **{f"channels[{i}]": c for i, c in enumerate(channels)})
    step = 2 ** len(channels)
    if image_size % step:
        raise UserError(
            f"image_size: expected a multiple of {step}, since each of the {len(channels)} channels halves the side; "
            f"got {image_size}"
        )
    return image_size // step
