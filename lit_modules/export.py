"""Take networks out of the suite: files that plain PyTorch loads."""

from __future__ import annotations

import copy
import io
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanlight.contracts import atomic_path, atomic_write


def portable(network: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode, whose spiking neurons need no operators of spikingjelly."""
    network = copy.deepcopy(network).cpu().eval()
    for module in network.modules():
        # spikingjelly fuses neurons with known surrogates into operators of its own, which plain PyTorch lacks. Without
        # gradients a surrogate is a step.
        if isinstance(getattr(module, "surrogate_function", None), nn.Module):
            module.surrogate_function = _Step()
    return network


class _Step(nn.Module):
    """Fire at the threshold or above."""

    def forward(self, x: Tensor) -> Tensor:
        return (x >= 0).to(x.dtype)


def write_program(
    network: nn.Module,
    example: Tensor,
    path: Path,
    batch_dim: int = 0,
    length_dim: int | None = None,
    longest: int | None = None,
) -> bool:
    """Write `network` (made `portable`) as a ``torch.export`` program for one tensor; whether any batch size fits it.

    Where a network fixes the batch size, or a length, the example's is the only one.

    Args:
        network: to write.
        example: an input with at least 2 items along `batch_dim`: torch.export takes a size of 1 for a constant.
        path: of the file.
        batch_dim: dimension of the items.
        length_dim: dimension of sequences of any length, at least 2 in the example, too.
        longest: length of such a sequence at most; None for no limit.
    """
    sizes = {batch_dim: torch.export.Dim("batch", min=1)}
    if length_dim is not None:
        sizes[length_dim] = torch.export.Dim("length", min=1, max=longest)
    return write_exported(network, (example,), (sizes,), path)


def write_exported(network: nn.Module, arguments: tuple[Any, ...], sizes: Any, path: Path) -> bool:
    """The same for any arguments.

    Args:
        network: to write.
        arguments: of a call: tensors and mappings of them.
        sizes: which of their dimensions are open, as ``dynamic_shapes`` of `torch.export.export`.
        path: of the file.
    """
    with torch.no_grad():
        try:
            program, any_size = torch.export.export(network, arguments, dynamic_shapes=sizes), True
        except (torch._dynamo.exc.UserError, RuntimeError, ValueError):
            program, any_size = torch.export.export(network, arguments), False
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # it names the folders of this machine
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    atomic_write(path, buffer.getvalue())
    return any_size


def write_weights(network: nn.Module, path: Path, leave_out: Collection[str] = ()) -> None:
    """Write the state of `network` as safetensors, but the tensors named in `leave_out`."""
    from safetensors.torch import save_file

    state = {name: value for name, value in network.state_dict().items() if name not in leave_out}
    with atomic_path(path) as part:
        save_file({name: value.contiguous().clone() for name, value in state.items()}, part)
