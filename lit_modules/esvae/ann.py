"""Ordinary counterparts of the spiking autoencoders: VAE, the feature autoencoder behind FAD, and the mean image."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from leanlight.contracts.ranges import PositiveInt
from lit_modules.esvae.layers import CHANNELS_32, bottom_side
from lit_modules.esvae.losses import gaussian_kl
from lit_modules.esvae.networks import Autoencoder, Code


class _Stack(nn.Sequential):
    """Compiled in place, torch's own would run as written: `nn.Module.compile` skips what is all torch's code."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class FeatureAutoencoder(Autoencoder):
    """Plain convolutional autoencoder: convolutions with batch norm and LeakyReLU, a linear latent, the mirror of both.

    Its latent is the feature space of the Fréchet autoencoder distance.

    Args:
        in_channels: C of the images.
        image_size: side of the square images, in pixels.
        channels: output channels of each convolution; each halves the side.
        latent_size: d; 64 (MNIST, Fashion-MNIST) or 128 in the paper's measurements.
    """

    spiking = False
    generates = False

    def __init__(
        self,
        in_channels: PositiveInt = 1,
        image_size: PositiveInt = 32,
        channels: Sequence[PositiveInt] = CHANNELS_32,
        latent_size: PositiveInt = 64,
    ) -> None:
        super().__init__(in_channels, image_size, latent_size)
        side = bottom_side(image_size, channels)
        flat = channels[-1] * side**2
        self.encoder = _Stack(
            *(
                _block(nn.Conv2d(before, after, 3, stride=2, padding=1), after)
                for before, after in zip((in_channels, *channels), channels, strict=False)
            ),
            nn.Flatten(),
        )
        self.head = nn.Linear(flat, latent_size)
        backwards = (*reversed(channels), channels[0])
        self.decoder = _Stack(
            nn.Linear(latent_size, flat),
            nn.Unflatten(1, (channels[-1], side, side)),
            *(
                _block(nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1), after)
                for before, after in pairwise(backwards)
            ),
            nn.ConvTranspose2d(channels[0], in_channels, 3, padding=1),
            nn.Tanh(),
        )

    def encode(self, image: Tensor) -> Code:
        latent = self.head(self.encoder(image))
        return Code(latent, latent, latent.new_zeros(()))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


class VAE(FeatureAutoencoder):
    """Variational autoencoder with a Gaussian latent (Kingma & Welling 2014) on the convolutions of its parent.

    Its divergence is the KL divergence from N(0, 1).

    Args:
        in_channels: C of the images.
        image_size: side of the square images, in pixels.
        channels: output channels of each convolution; each halves the side.
        latent_size: d; 128 in the paper's comparison.
    """

    generates = True

    def __init__(
        self,
        in_channels: PositiveInt = 1,
        image_size: PositiveInt = 32,
        channels: Sequence[PositiveInt] = CHANNELS_32,
        latent_size: PositiveInt = 128,
    ) -> None:
        super().__init__(in_channels, image_size, channels, latent_size)
        self.log_variance = nn.Linear(self.head.in_features, latent_size)

    def encode(self, image: Tensor) -> Code:
        hidden = self.encoder(image)
        mean, log_variance = self.head(hidden), self.log_variance(hidden)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return Code(z, mean, gaussian_kl(mean, log_variance))

    def draw(self, count: int) -> Tensor:
        weight = self.head.weight
        return torch.randn(count, self.latent_size, dtype=weight.dtype, device=weight.device)


class MeanImage(Autoencoder):
    """What needs no model: each answer is the mean of the training images, an image's features are its pixels.

    A model that learned something has a smaller error, and features that keep more of the classes than a linear probe
    finds in the pixels. The mean is learned with the optimiser of the other models.

    Args:
        in_channels: C of the images.
        image_size: side of the square images, in pixels.
    """

    spiking = False
    generates = False

    def __init__(self, in_channels: PositiveInt = 1, image_size: PositiveInt = 32) -> None:
        super().__init__(in_channels, image_size, in_channels * image_size**2)
        self.encoder, self.decoder = nn.Flatten(), _Constant(self.image_shape)

    def encode(self, image: Tensor) -> Code:
        pixels = self.encoder(image)
        return Code(pixels, pixels, pixels.new_zeros(()))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)


class _Constant(nn.Module):
    """The same learned answer to every item of a batch."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(shape))

    def forward(self, z: Tensor) -> Tensor:
        return self.value.expand(len(z), *self.value.shape)


def _block(convolution: nn.Conv2d | nn.ConvTranspose2d, channels: int) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.LeakyReLU())
