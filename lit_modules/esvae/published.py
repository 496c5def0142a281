"""FAD as the published code measures it: statistics of the batch, its feature networks, its reference statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leanlight.contracts import UserError
from lit_modules.esvae.ann import FeatureAutoencoder
from lit_modules.esvae.layers import CHANNELS_32
from lit_modules.esvae.metrics import Gaussian
from lit_modules.frozen import load_weights

_CHANNELS = {32: CHANNELS_32, 64: (*CHANNELS_32, 512)}  # by side of the images


def use_batch_statistics(network: nn.Module) -> None:
    """Let every norm of a network take mean and variance from its batch, also in evaluation mode; for good.

    The published code never switches its feature network to evaluation, neither for generated images nor for those of
    the reference.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = None


def published_features(weights: Path, image_shape: tuple[int, int, int]) -> FeatureAutoencoder:
    """The feature network in a file of the published code (``metrics/stat_checkpoints``): its keys renamed.

    Nothing in the file is run, and no more memory is taken than it has bytes.

    Args:
        weights: a state dict that ``torch.load(weights_only=True)`` or safetensors reads.
        image_shape: (C, H, W) of the images that it shall see.

    Raises:
        UserError: no such file, weights of another network, or images of a size that no published network is for.
    """
    in_channels, size, _ = image_shape
    if size not in _CHANNELS:
        raise UserError(f"feature_weights: the published networks are for images of 32 or 64 pixels, got {size}")
    channels = _CHANNELS[size]

    def load(state: dict[str, Any]) -> FeatureAutoencoder:
        if sum(tensor.nbytes for tensor in state.values()) > Path(weights).stat().st_size:
            raise ValueError("its tensors claim more bytes than the file has")
        with torch.device("meta"):  # the latent's size is the file's word: nothing is allocated before all shapes fit
            network = FeatureAutoencoder(in_channels, size, channels, len(state["latent_layer.weight"]))
        network.load_state_dict(_renamed(state, len(channels)), assign=True)
        return network.eval().requires_grad_(False)

    return load_weights(load, weights, f"the published feature network for {in_channels} channels", "feature_weights")


def _renamed(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Published names of weights → those of `FeatureAutoencoder` with `depth` channels; other names stay."""
    places = {
        "latent_layer": "head",
        "decoder_input": "decoder.0",  # decoder.1 unflattens
        **{f"decoder.{i}": f"decoder.{i + 2}" for i in range(depth - 1)},
        "final_layer.0": f"decoder.{depth + 1}.0",
        "final_layer.1": f"decoder.{depth + 1}.1",
        "final_layer.3": f"decoder.{depth + 2}",
    }
    renamed = {}
    for name, tensor in state.items():
        place = next((old for old in places if name.startswith(f"{old}.")), None)
        renamed[name if place is None else places[place] + name[len(place) :]] = tensor.float()
    return renamed


def reference_gaussian(statistics: Path, size: int) -> Gaussian:
    """Mean and covariance of the reference in a file of the published code (``metrics/stats``).

    Args:
        statistics: ``.npz`` with ``mu`` (d,) and ``sigma`` (d, d); pickled content is refused.
        size: d of the feature network.

    Raises:
        UserError: no such file, or not such statistics.
    """
    expected = f"an .npz file with mu ({size},) and sigma ({size}, {size}) of finite numbers"
    try:
        with np.load(statistics, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[name]).double() for name in ("mu", "sigma"))
    except Exception as error:  # of a file of any content
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"reference_statistics: expected {expected}; {statistics} gives {reason}") from error
    shapes = tuple(mean.shape), tuple(covariance.shape)
    if shapes != ((size,), (size, size)):
        raise UserError(f"reference_statistics: expected {expected}; {statistics} has {shapes[0]} and {shapes[1]}")
    if not (mean.isfinite().all() and covariance.isfinite().all() and torch.allclose(covariance, covariance.T)):
        raise UserError(f"reference_statistics: expected {expected}, sigma symmetric; {statistics} has others")
    return mean, covariance
