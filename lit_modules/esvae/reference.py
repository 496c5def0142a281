"""Two other formulations of ESVAE's training loss, for equality tests and the benchmark; nothing else uses them.

`TimeLast` is the way published code of the family does it: signals (N, C, H, W, T), 3-D convolutions with temporal
kernel 1, the image repeated T times. `Folded` is what a competent user of spikingjelly writes: time folded into the
batch and its plain multi-step neuron. Both have the parameter names of the `ESVAE` they copy, and draw the same
random numbers in the same order.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from lit_modules.esvae.layers import SpikingLayer
from lit_modules.esvae.losses import mmd2
from lit_modules.esvae.networks import ESVAE, to_signed
from lit_modules.esvae.sampling import sample_spikes
from lit_modules.nn import ThresholdBatchNorm
from lit_modules.nn.neurons import RectAroundZeroPotential


class _Half(nn.Module):
    """Layers of an encoder or decoder."""

    def __init__(self, layers: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), head
        self.last: nn.Module = nn.Identity()  # after the decoder's layers


class _Reference(nn.Module):
    """Common part: copy a network layer by layer; compute the two terms of the loss."""

    def __init__(self, network: ESVAE) -> None:
        super().__init__()
        self.network = (network,)  # for its constants; in a tuple, so that its parameters are not these
        self.encoder, self.decoder = (
            _Half([self.copy_layer(cast(SpikingLayer, layer)) for layer in half.layers], self.copy_layer(half.head))
            for half in (network.encoder, network.decoder)
        )
        self.decoder.last = self.copy_weights(network.decoder.last)
        self.bottleneck = copy.deepcopy(network.bottleneck)

    def copy_layer(self, layer: SpikingLayer) -> nn.Module:
        raise NotImplementedError

    def copy_weights(self, weights: nn.Module) -> nn.Module:
        return copy.deepcopy(weights)

    def embed(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] → encoder spikes (T, N, d)."""
        raise NotImplementedError

    def decode(self, spikes: Tensor) -> Tensor:
        """(T, N, d) → (N, C, H, W) in (-1, 1)."""
        raise NotImplementedError

    def losses(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images in [0, 1] → reconstruction loss and divergence."""
        (network,) = self.network
        target = to_signed(image)
        z, rate = sample_spikes(self.embed(target), network.sampler, network.half_width)
        assert self.bottleneck is not None
        prior = self.bottleneck(torch.randn(len(rate), network.latent_size, dtype=rate.dtype)).sigmoid()
        divergence = mmd2(rate, prior, network.kernel)
        return F.mse_loss(self.decode(z), target), divergence


# ---- time last, 3-D convolutions ----


class TimeLast(_Reference):
    """Signals (N, C, H, W, T) through 3-D convolutions, as published."""

    def copy_layer(self, layer: SpikingLayer) -> nn.Module:
        return _TimeLastLayer(self.copy_weights(layer.weights), layer)

    def copy_weights(self, weights: nn.Module) -> nn.Module:
        if isinstance(weights, nn.Linear):
            return copy.deepcopy(weights)
        weights = cast(nn.Conv2d | nn.ConvTranspose2d, weights)
        kind = nn.ConvTranspose3d if isinstance(weights, nn.ConvTranspose2d) else nn.Conv3d
        made = kind(weights.in_channels, weights.out_channels, (3, 3, 1)).to(weights.weight.dtype)
        made.stride, made.padding = (*weights.stride, 1), (*cast(tuple[int, int], weights.padding), 0)
        made.output_padding = (*weights.output_padding, 0)
        with torch.no_grad():
            made.weight.copy_(weights.weight.unsqueeze(-1))
            cast(Tensor, made.bias).copy_(cast(Tensor, weights.bias))
        return made

    def embed(self, image: Tensor) -> Tensor:
        (network,) = self.network
        x = image.unsqueeze(-1).repeat(1, 1, 1, 1, network.time_steps)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.encoder.head(x.flatten(1, 3)).permute(2, 0, 1)

    def decode(self, spikes: Tensor) -> Tensor:
        (network,) = self.network
        x = self.decoder.head(spikes.permute(1, 2, 0)).unflatten(1, network.decoder.shape)
        for layer in self.decoder.layers:
            x = layer(x)
        steps = torch.arange(x.shape[-1] - 1, -1, -1)
        decay = torch.pow(network.decoder.readout.decay, steps).to(x.dtype)
        return (self.decoder.last(x) * decay).sum(-1).tanh()


class _TimeLastLayer(nn.Module):
    def __init__(self, weights: nn.Module, layer: SpikingLayer) -> None:
        super().__init__()
        self.weights = weights
        self.norm = copy.deepcopy(layer.norm)
        lif = cast(neuron.LIFNode, layer.fire)
        self.keep, self.v_threshold = 1 - 1 / lif.tau, lif.v_threshold
        self.centre = 0.0 if isinstance(lif.surrogate_function, RectAroundZeroPotential) else lif.v_threshold

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.weights, nn.Linear):
            x = self.weights(x.transpose(1, 2)).transpose(1, 2)
            return self.fire(self.normalize(x[:, :, None, None])[:, :, 0, 0])
        return self.fire(self.normalize(self.weights(x)))

    def normalize(self, x: Tensor) -> Tensor:
        """tdBN over (N, H, W, T) written out."""
        norm, axes = self.norm.norm, (0, 2, 3, 4)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.momentum is not None
        mean, var = norm.running_mean, norm.running_var
        if self.training:
            mean, var = x.mean(axes), x.var(axes, unbiased=False)
            n = x.numel() / x.shape[1]
            with torch.no_grad():
                norm.running_mean = (1 - norm.momentum) * norm.running_mean + norm.momentum * mean
                norm.running_var = (1 - norm.momentum) * norm.running_var + norm.momentum * var * n / (n - 1)
        shape = (1, -1, 1, 1, 1)
        x = self.norm.scale * (x - mean.view(shape)) / (var.view(shape) + norm.eps).sqrt()
        return x * norm.weight.view(shape) + norm.bias.view(shape)

    def fire(self, x: Tensor) -> Tensor:
        u, spikes = torch.zeros_like(x[..., 0]), torch.zeros_like(x)
        for t in range(x.shape[-1]):
            u = self.keep * u * (1 - spikes[..., max(t - 1, 0)]) + x[..., t]
            spikes[..., t] = _Boxcar.apply(u, self.v_threshold, self.centre)
        return spikes


class _Boxcar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, v_threshold: float, centre: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.centre = centre
        return (u >= v_threshold).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (u,) = ctx.saved_tensors
        return grad * ((u - ctx.centre).abs() < 0.5), None, None


# ---- time folded into the batch, spikingjelly's plain neuron ----


class Folded(_Reference):
    """Signals (T, N, ...), stateless layers on (T·N, ...), every layer computed at every step."""

    def copy_layer(self, layer: SpikingLayer) -> nn.Module:
        return _FoldedLayer(layer)

    def embed(self, image: Tensor) -> Tensor:
        functional.reset_net(self)
        (network,) = self.network
        x = image.unsqueeze(0).repeat(network.time_steps, 1, 1, 1, 1)
        for layer in self.encoder.layers:
            x = layer(x)
        return self.encoder.head(x.flatten(2))

    def decode(self, spikes: Tensor) -> Tensor:
        (network,) = self.network
        x = self.decoder.head(spikes).unflatten(2, network.decoder.shape)
        for layer in self.decoder.layers:
            x = layer(x)
        y = self.decoder.last(x.flatten(0, 1)).unflatten(0, (len(x), -1))
        return network.decoder.readout(y).tanh()


class _FoldedLayer(nn.Module):
    def __init__(self, layer: SpikingLayer) -> None:
        super().__init__()
        self.weights = copy.deepcopy(layer.weights)
        self.norm: ThresholdBatchNorm = copy.deepcopy(layer.norm)
        lif = cast(neuron.LIFNode, layer.fire)
        self.fire = neuron.LIFNode(
            tau=lif.tau,
            decay_input=False,
            v_threshold=lif.v_threshold,
            surrogate_function=copy.deepcopy(lif.surrogate_function),
            step_mode="m",
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fire(self.norm(self.weights(x.flatten(0, 1))).unflatten(0, (len(x), -1)))
