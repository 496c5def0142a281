"""Take a trained network out of the suite: files that plain PyTorch loads."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from leanlight.contracts import atomic_path, atomic_write


def export_network(network: nn.Module, example: Tensor, directory: Path, classes: Sequence[str] = ()) -> list[Path]:
    """Write ``network.pt2``, ``weights.safetensors`` and ``card.json`` into `directory` and return their paths.

    ``torch.export.load("network.pt2").module()(image)`` gives logits wherever torch is installed, for any batch size
    (for the example's alone where a network fixes it; the card says which). example: (N, C, H, W) float in [0, 1], N
    at least 2.
    """
    from safetensors.torch import save_file

    network = copy.deepcopy(network).cpu().eval()
    for module in network.modules():
        # spikingjelly fuses neurons with known surrogates into operators of its own, which plain PyTorch lacks. Without
        # gradients a surrogate is a step.
        if isinstance(getattr(module, "surrogate_function", None), nn.Module):
            module.surrogate_function = _Step()
    example = example.cpu()
    program, any_batch = _trace(network, example)
    paths = [directory / name for name in ("network.pt2", "weights.safetensors", "card.json")]
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    atomic_write(paths[0], buffer.getvalue())
    with atomic_path(paths[1]) as part:
        save_file({name: value.contiguous().clone() for name, value in network.state_dict().items()}, part)
    card = {
        "network": type(network).__name__,
        "input": {
            "shape": ["N" if any_batch else len(example), *example.shape[1:]],
            "dtype": "float32",
            "range": [0.0, 1.0],
            "layout": "NCHW",
        },
        "output": {"logits": ["N" if any_batch else len(example), *_output_shape(network, example)]},
        "classes": list(classes),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "torch": str(torch.__version__),
        "use": "torch.export.load('network.pt2').module()(image).softmax(1)",
    }
    atomic_write(paths[2], json.dumps(card, indent=2) + "\n")
    return paths


class _Step(nn.Module):
    """Fire at the threshold or above."""

    def forward(self, x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)


def _trace(network: nn.Module, example: Tensor) -> tuple[torch.export.ExportedProgram, bool]:
    """Export with a free batch size, or with the example's where the network needs that."""
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        try:
            return torch.export.export(network, (example,), dynamic_shapes=({0: batch},)), True
        except (torch._dynamo.exc.UserError, RuntimeError, ValueError):
            return torch.export.export(network, (example,)), False


def _output_shape(network: nn.Module, example: Tensor) -> list[int]:
    with torch.no_grad():
        return list(network(example).shape[1:])
