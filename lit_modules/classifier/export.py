"""Take a trained classifier out of the suite."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanlight.contracts import atomic_write
from lit_modules.export import portable, write_program, write_weights


def export_network(
    network: nn.Module,
    example: Tensor,
    directory: Path,
    classes: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
    leave_out: Collection[str] = (),
) -> list[Path]:
    """Write ``network.pt2``, ``weights.safetensors`` and ``card.json`` into `directory` and return their paths.

    ``torch.export.load("network.pt2").module()(image)`` gives logits wherever torch is installed, for any batch size
    (for the example's alone where a network fixes it; the card says which).

    Args:
        network: images → logits.
        example: (N, C, H, W) float in [0, 1], N at least 2.
        directory: where to; it exists.
        classes: label names; index = label.
        about: further entries of the card.
        leave_out: names of tensors that ``weights.safetensors`` shall not hold.
    """
    network, example = portable(network), example.cpu()
    program, weights, card = (directory / name for name in ("network.pt2", "weights.safetensors", "card.json"))
    items = "N" if write_program(network, example, program) else len(example)
    write_weights(network, weights, leave_out)
    with torch.no_grad():
        logits = network(example)
    content = {
        "network": type(network).__name__,
        "input": {
            "shape": [items, *example.shape[1:]],
            "dtype": "float32",
            "range": [0.0, 1.0],
            "layout": "NCHW",
        },
        "output": {"logits": [items, *logits.shape[1:]]},
        "classes": list(classes),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "torch": str(torch.__version__),
        "use": "torch.export.load('network.pt2').module()(image).softmax(1)",
        **(about or {}),
    }
    atomic_write(card, json.dumps(content, indent=2) + "\n")
    return [program, weights, card]
