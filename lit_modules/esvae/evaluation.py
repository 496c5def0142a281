"""Measurements of a trained autoencoder on whole sets of images: FAD, robustness of the decoder, linear probe.

Images are (N, C, H, W) uint8 or float in [0, 1] and stay where they are; batches of them go to the network's device.
Errors are mean squared errors on the [-1, 1] scale. Everything draws from the global random state: seed it for
repeatable figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import UnderNoise
from lit_modules.esvae.metrics import FrechetDistance, Noise, disturb, shuffle_time
from lit_modules.esvae.networks import Autoencoder, to_signed


def batches(network: Autoencoder, images: Tensor, size: int = 256) -> Iterator[Tensor]:
    """Images in [-1, 1] on the network's device.

    Args:
        network: tells the device.
        images: all of them.
        size: images at a time.
    """
    device = next(network.parameters()).device
    for part in images.split(size):
        part = part.to(device)
        yield to_signed(part.float() / 255 if part.dtype == torch.uint8 else part)


@torch.no_grad()
def encode_all(network: Autoencoder, images: Tensor) -> Tensor:
    """Deterministic features (N, d) of all images: firing rates of spiking networks, latents of others."""
    return torch.cat([network.encode(image).features for image in batches(network, images)])


@torch.no_grad()
def frechet_autoencoder_distance(
    network: Autoencoder, feature_network: Autoencoder, images: Tensor, count: int, size: int = 128
) -> float:
    """Fréchet autoencoder distance (Kamata et al. 2022) of generated images from real ones.

    Args:
        network: generates.
        feature_network: in whose latent space the distance is measured.
        images: the real ones.
        count: how many to generate.
        size: images at a time.
    """
    metric = FrechetDistance(feature_network.latent_size, sync_on_compute=False)
    for image in batches(feature_network, images, size):
        metric.update(feature_network.encode(image).features.cpu(), real=True)
    for start in range(0, count, size):
        generated = to_signed(network.generate(min(size, count - start)))
        metric.update(feature_network.encode(generated).features.cpu(), real=False)
    return float(metric.compute())


@torch.no_grad()
def robustness(
    network: Autoencoder, images: Tensor, strengths: Sequence[float], noise: Noise = "flip"
) -> tuple[float, UnderNoise]:
    """Reconstruction error when the steps of the latent spikes are shuffled, and without and with noise on them.

    Args:
        network: a spiking one.
        images: to reconstruct.
        strengths: probabilities that a spike is hit, the levels of the noise.
        noise: see `disturb`.
    """
    error = torch.zeros(2 + len(strengths), dtype=torch.float64)
    for image in batches(network, images):
        z = network.encode(image).z
        disturbed = [z, shuffle_time(z), *(disturb(z, strength, noise) for strength in strengths)]
        errors = [F.mse_loss(network.decode(latent), image) * len(image) for latent in disturbed]
        error += torch.stack(errors).double().cpu()
    clean, shuffled, *noisy = (error / len(images)).tolist()
    levels = dict(zip(strengths, noisy, strict=True))
    return shuffled, UnderNoise(clean, {noise: levels}, higher_is_better=False)


def mean_image_error(train: Tensor, test: Tensor) -> float:
    """Error of always answering with the mean of the training images: what every model has to beat."""
    scale = 255.0 if train.dtype == torch.uint8 else 1.0
    mean = train.double().mean(0) / scale
    return float((4 * (test.double() / scale - mean).square()).mean())
