"""Fréchet inception distance (FID) and Inception score (IS), with the network and the score of torch-fidelity."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanlight.contracts import MissingExtraError, isolated_rng
from lit_modules.esvae.evaluation import batches, generated_batches
from lit_modules.esvae.metrics import FeatureMoments, frechet_distance
from lit_modules.esvae.networks import Autoencoder, to_unit
from lit_modules.frozen import load_weights

_FEATURES, _SPLITS = 2048, 10


def load_inception(weights: Path) -> nn.Module:
    """Inception v3 of torch-fidelity: bytes (N, 3, H, W) → features (N, 2048) and logits (N, 1008).

    Args:
        weights: its state dict (``weights-inception-2015-12-05-6726825d.pth`` or a file of that layout), as
            ``torch.load(weights_only=True)`` or safetensors reads it.

    Raises:
        UserError: torch-fidelity is missing, no such file, or weights of another network.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise MissingExtraError("torch-fidelity", "fidelity") from error

    def load(state: dict[str, Any]) -> nn.Module:
        # torch-fidelity unpickles without limits, so it is never given the file, but a copy of what was read safely.
        copy = io.BytesIO()
        torch.save(state, copy)
        copy.seek(0)
        return FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], copy)

    with isolated_rng():  # building it must not change what its owner draws
        return load_weights(load, weights, "torch-fidelity's Inception network", "inception_weights")


@torch.no_grad()
def fid_and_score(network: Autoencoder, inception: nn.Module, images: Tensor, count: int) -> tuple[float, float]:
    """FID (Heusel et al. 2017) of generated images from real ones, and their Inception score (Salimans et al. 2016).

    The score is the mean over ten parts, or over as many as there are images.

    Args:
        network: generates.
        inception: see `load_inception`; on the network's device.
        images: the real ones.
        count: how many to generate.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    real, generated = FeatureMoments(_FEATURES), FeatureMoments(_FEATURES)
    for image in batches(network, images, 64):
        real.update(inception(_bytes(image))[0])
    logits = []
    for image in generated_batches(network, count):
        features, scores = inception(_bytes(image))
        generated.update(features)
        logits.append(scores.cpu())
    score = isc_features_to_metric(torch.cat(logits), splits=min(_SPLITS, count))[KEY_METRIC_ISC_MEAN]
    return float(frechet_distance(*real.gaussian(), *generated.gaussian())), score


def _bytes(image: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes of three channels."""
    pixels = (255 * to_unit(image)).round().clamp(0, 255).to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
