"""Take a trained agent out of the suite."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from leanlight.contracts import atomic_write
from lit_modules.export import portable, write_program, write_weights


def export_agent(network: nn.Module, shape: tuple[int, ...], actions: Sequence[str], directory: Path) -> list[Path]:
    """Write ``agent.pt2`` (states in [0, 1] → values), ``weights.safetensors``, ``card.json``; return their paths.

    Args:
        network: the agent; it stays where it is.
        shape: (K, H, W) of a state.
        actions: names, in the order of the values.
        directory: an existing folder.
    """
    network = portable(network)
    program, weights, card = (directory / name for name in ("agent.pt2", "weights.safetensors", "card.json"))
    any_batch = write_program(network, torch.zeros(2, *shape), program)
    write_weights(network, weights)
    content = {
        "network": type(network).__name__,
        "input": {
            "shape": ["N" if any_batch else 2, *shape],
            "range": [0.0, 1.0],
            "meaning": "last frames, newest last",
        },
        "output": {"shape": ["N" if any_batch else 2, len(actions)], "meaning": "value of each action"},
        "actions": list(actions),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "torch": str(torch.__version__),
        "use": "torch.export.load('agent.pt2').module()(state).argmax(1)",
    }
    atomic_write(card, json.dumps(content, indent=2) + "\n")
    return [program, weights, card]
