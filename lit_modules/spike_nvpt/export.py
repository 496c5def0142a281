"""Take a tuned network out of the suite: as a whole for deployment, and what the task added to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanlight.contracts import atomic_path
from lit_modules.classifier.export import export_network
from lit_modules.spike_nvpt.packing import pack
from lit_modules.spike_nvpt.prompts import Prompts
from lit_modules.spike_nvpt.vit import PromptedBlock, TunedNetwork


def export_tuned(
    network: TunedNetwork,
    example: Tensor,
    directory: Path,
    classes: Sequence[str],
    about: Mapping[str, Any],
    from_file: Collection[str] = (),
) -> list[Path]:
    """Write a tuned network, and its prompts apart, and return the paths.

    ``network.pt2`` is whole: prompts are constants in it, adapters are merged, and no neuron is left. It gives the
    logits of the network bit for bit, after a merge up to rounding. ``weights.safetensors`` holds the same network, but
    what a file of pre-trained weights holds already. ``prompts.safetensors`` is what a task adds to a network that
    tasks share, beside its last layer: see `prompt_tensors`. ``card.json`` describes them.

    Args:
        network: the tuned network.
        example: (N, C, H, W) float in [0, 1], N at least 2.
        directory: where to; it exists.
        classes: label names; index = label.
        about: further entries of the card.
        from_file: names of parameters of `network` that stay out of ``weights.safetensors``.
    """
    prompts, content = network.prompts, dict(about)
    if prompts is not None:
        content["prompts"] = _described(network, prompts)
    known = {name.removeprefix("net.") for name in from_file}
    files = export_network(network.folded(), example, directory, classes, content, known)
    if prompts is None:
        return files
    path = directory / "prompts.safetensors"
    from safetensors.torch import save_file

    with atomic_path(path) as part:
        save_file(prompt_tensors(prompts), part)
    return [*files, path]


@torch.no_grad()
def prompt_tensors(prompts: Prompts) -> dict[str, Tensor]:
    """What is stored of prompts (K, L, D), by name, on the CPU.

    Of bits: ``bits``, all of them in order, eight to a byte as ``numpy.unpackbits`` takes them; ``shape`` (3,) int64,
    and ``scales`` (K,) float32, the value of a 1 in each layer. Of any others: ``prompts`` (K, L, D) float32.
    """
    bits = prompts.bits()
    if bits is None:
        return {"prompts": prompts().detach().cpu().contiguous()}
    return {"bits": pack(bits).cpu(), "shape": torch.tensor(prompts.shape), "scales": prompts.scales().cpu()}


def _described(network: TunedNetwork, prompts: Prompts) -> dict[str, Any]:
    """Entry of the card: the kind of prompts, their shape, the blocks they stand before, and the share of ones."""
    vit, bits = network.net.network, prompts.bits()
    before = [i for i, block in enumerate(vit.blocks) if isinstance(block, PromptedBlock) and block.layer is not None]
    return {
        "kind": type(prompts).__name__,
        "shape": list(prompts.shape),
        "before_blocks": before,
        "density": None if bits is None else float(bits.float().mean()),
    }
