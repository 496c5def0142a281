"""Measurements of a trained autoencoder on whole sets of images: FAD, robustness of the decoder, linear probe.

Images are (N, C, H, W) uint8 or float in [0, 1] and stay where they are; batches of them go to the network's device.
Errors are mean squared errors on the [-1, 1] scale. Everything draws from the global random state: seed it for
repeatable figures.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import UnderNoise
from lit_modules.esvae.metrics import FeatureMoments, Gaussian, Noise, disturb, frechet_distance, time_orders
from lit_modules.esvae.networks import Autoencoder, to_signed

_GENERATED_BATCH = 128


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
def generated_batches(network: Autoencoder, count: int) -> Iterator[Tensor]:
    """`count` new images in [-1, 1], 128 at a time as in the published code: it matters where norms see the batch."""
    for start in range(0, count, _GENERATED_BATCH):
        yield to_signed(network.generate(min(_GENERATED_BATCH, count - start)))


@torch.no_grad()
def feature_gaussian(feature_network: Autoencoder, images: Iterable[Tensor]) -> Gaussian:
    """The Gaussian that fits the latents of images, batches in [-1, 1] on the network's device."""
    moments = FeatureMoments(feature_network.latent_size)
    for image in images:
        moments.update(feature_network.encode(image).features)
    return moments.gaussian()


def frechet_autoencoder_distances(
    network: Autoencoder,
    feature_network: Autoencoder,
    test: Tensor,
    train: Tensor,
    count: int,
    reference: Gaussian | None = None,
) -> tuple[float, float | None]:
    """Fréchet autoencoder distances, FAD (Kamata et al. 2022), of real images and of generated ones from a reference.

    That of real images is the floor: what a perfect generator would have with so many images.

    Args:
        network: generates, where it can.
        feature_network: in whose latent space the distance is measured.
        test: the real images of the reference.
        train: real images, of which as many as are generated are drawn for the floor.
        count: how many to generate.
        reference: Gaussian of the reference in place of that of `test`.

    Returns:
        That of real images; that of generated ones, None where the network cannot generate.
    """
    reference = reference or feature_gaussian(feature_network, batches(feature_network, test))
    real = train[torch.randperm(len(train))[:count].to(train.device)]
    samples = [batches(feature_network, real, _GENERATED_BATCH)]
    if network.generates:
        samples.append(generated_batches(network, count))
    floor, *own = (
        float(frechet_distance(*reference, *feature_gaussian(feature_network, images))) for images in samples
    )
    return floor, own[0] if own else None


@torch.no_grad()
def robustness(
    network: Autoencoder, images: Tensor, strengths: Sequence[float], noise: Noise = "flip", shuffles: int = 16
) -> tuple[Tensor, UnderNoise]:
    """Reconstruction error without and with noise on the latent spikes, and with their time steps in other orders.

    Args:
        network: a spiking one.
        images: to reconstruct.
        strengths: probabilities that a spike is hit, the levels of the noise.
        noise: see `disturb`.
        shuffles: orders of the steps, each one for all images.

    Returns:
        Errors (shuffles,) under the orders, of the same spikes as without noise; errors without and with noise.
    """
    error = torch.zeros(1 + len(strengths) + shuffles, dtype=torch.float64)
    orders: Tensor | None = None
    for image in batches(network, images):
        z = network.encode(image).z
        orders = time_orders(len(z), shuffles).to(z.device) if orders is None else orders
        noisy = (disturb(z, strength, noise) for strength in strengths)
        latents = itertools.chain([z], noisy, (z[order] for order in orders))  # made one by one: each is as large as z
        errors = [F.mse_loss(network.decode(latent), image) * len(image) for latent in latents]
        error += torch.stack(errors).double().cpu()
    clean, *disturbed = (error / len(images)).tolist()
    levels = dict(zip(strengths, disturbed, strict=False))
    shuffled = torch.tensor(disturbed[len(strengths) :], dtype=torch.float64)
    return shuffled, UnderNoise(clean, {noise: levels}, higher_is_better=False)


def mean_image_error(train: Tensor, test: Tensor) -> float:
    """Error of always answering with the mean of the training images: what every model has to beat."""
    scale = 255.0 if train.dtype == torch.uint8 else 1.0
    mean = train.double().mean(0) / scale
    return float((4 * (test.double() / scale - mean).square()).mean())
