"""Pictures of an autoencoder of the ESVAE family: what is drawn, not how."""

from __future__ import annotations

import torch
from torch import Tensor

from leanlight.contracts import Heatmap, Histogram, ImageGrid, MediaItem
from lit_modules.esvae.networks import ESVAE, Autoencoder, to_signed, to_unit

_PAIRS = 20
_SAMPLES = 40


def pairs(image: Tensor, rebuilt: Tensor) -> Tensor:
    """The first images, in [0, 1], each followed by its reconstruction, given in [-1, 1]."""
    both = (image[:_PAIRS], to_unit(rebuilt[:_PAIRS]))
    return torch.stack(both, 1).flatten(0, 1).float().cpu()


def pictures(network: Autoencoder, shown: Tensor) -> dict[str, MediaItem]:
    """Reconstructions, samples of the prior and latents of a network in evaluation mode; `shown` comes from `pairs`.

    Draws from the global random state.
    """
    items: dict[str, MediaItem] = {"reconstructions": ImageGrid(shown, columns=10)}
    if network.generates:
        items["samples"] = ImageGrid(network.generate(_SAMPLES).float().clamp(0, 1).cpu(), columns=10)
    device = next(network.parameters()).device
    code = network.encode(to_signed(shown[::2].to(device)))
    if not network.spiking:
        return items | {"latent": Histogram({"means": code.features.cpu()}, "latent value")}
    rates = {"encoder": code.features.cpu()}
    if isinstance(network, ESVAE):
        rates["prior"] = network.prior_rates(1000).cpu()
    raster = Heatmap(code.z[:, 0].T.cpu(), "time step", "latent neuron")
    return items | {"latent_rates": Histogram(rates, "firing rate"), "raster": raster}
