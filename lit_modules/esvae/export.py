"""Take a trained autoencoder out of the suite."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from leanlight.contracts import atomic_write
from lit_modules.esvae.networks import Autoencoder, to_unit
from lit_modules.export import portable, write_program, write_weights


class _Decoder(nn.Module):
    """Latent → images (N, C, H, W) in [0, 1]."""

    def __init__(self, network: Autoencoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        return to_unit(self.network.decode(z))


def export_autoencoder(network: Autoencoder, directory: Path) -> list[Path]:
    """Write ``decoder.pt2`` (latent → images in [0, 1]), ``weights.safetensors`` and ``card.json``; return their paths.

    The decoder reads spikes (T, N, d), or numbers (N, d) for ordinary networks. Where the network can generate,
    ``samples.safetensors`` holds 16 latents drawn from its prior, so that the decoder draws new images anywhere.
    """
    network = portable(network)  # type: ignore[assignment]
    program, weights, card = (directory / name for name in ("decoder.pt2", "weights.safetensors", "card.json"))
    with torch.no_grad():
        z = network.draw(16) if network.generates else network.encode(torch.zeros(16, *network.image_shape)).z
    batch_dim = 1 if network.spiking else 0
    any_batch = write_program(_Decoder(network), z, program, batch_dim)
    write_weights(network, weights)
    paths = [program, weights, card]
    if network.generates:
        from safetensors.torch import save_file

        save_file({"z": z.contiguous()}, directory / "samples.safetensors")
        paths.append(directory / "samples.safetensors")
    shape: list[int | str] = list(z.shape)
    if any_batch:
        shape[batch_dim] = "N"
    content = {
        "network": type(network).__name__,
        "input": {"shape": shape, "meaning": "spikes (T, N, d)" if network.spiking else "latent (N, d)"},
        "output": {"shape": ["N" if any_batch else 16, *network.image_shape], "range": [0.0, 1.0]},
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "torch": str(torch.__version__),
        "use": "torch.export.load('decoder.pt2').module()(z)",
    }
    atomic_write(card, json.dumps(content, indent=2) + "\n")
    return paths
