"""Networks that a method uses but does not train: teachers, judges, sources of a conversion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from leanlight.contracts import UserError, isolated_rng
from lit_modules.nn.checks import first_line

Module = TypeVar("Module", bound=nn.Module)


class Frozen:
    """A network in evaluation mode that belongs to nobody.

    It is no `nn.Module`: as an attribute of one it stays out of `parameters`, checkpoints, device moves and `train`.
    Gradients pass through it to its input, never into its weights.

    Args:
        network: taken as it is, and frozen in place.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> Frozen:
        """Move it to `device`, in place."""
        self.network.to(device)
        return self

    def __call__(self, *inputs: Any) -> Any:
        return self.network(*inputs)


def frozen_module(
    kind: Callable[..., Module], checkpoint: Path | str | None, argument: str, helps: str, **overrides: Any
) -> Module:
    """Rebuild a module of this suite from its checkpoint, on the CPU, frozen; random states stay as they were.

    Args:
        kind: the LightningModule class that wrote the checkpoint.
        checkpoint: the file.
        argument: name of the caller's argument that holds its path, for errors.
        helps: what to do when there is none, e.g. the command that makes one.
        overrides: arguments of `kind` that shall differ from those in the checkpoint.

    Raises:
        UserError: no such file, or no checkpoint of that class.
    """
    name = getattr(kind, "__name__", "module")
    if checkpoint is None or not Path(checkpoint).is_file():
        raise UserError(f"{argument}: expected the checkpoint of a {name}, got {checkpoint}; {helps}")
    with isolated_rng():  # building it must not change what its owner draws
        try:
            module = kind.load_from_checkpoint(  # type: ignore[attr-defined]
                str(checkpoint), map_location="cpu", weights_only=True, **overrides
            )
        except UserError:
            raise
        except Exception as error:  # of a file of any content
            raise UserError(
                f"{argument}: expected the checkpoint of a {name}; {checkpoint} gives {first_line(error)}; {helps}"
            ) from error
    return module.eval().requires_grad_(False)


def frozen_network(make: Callable[[], nn.Module], weights: Path | str | None, argument: str) -> nn.Module:
    """Make a network with any factory, give it weights from a file, freeze it; random states stay as they were.

    Args:
        make: the factory.
        weights: ``.safetensors``, or a state dict that ``torch.load(weights_only=True)`` reads; None for the factory's.
        argument: name of the caller's argument that holds the path, for errors.

    Raises:
        UserError: no such file, or weights of another network.
    """
    with isolated_rng():
        network = make()
    if weights is not None:
        if not Path(weights).is_file():
            raise UserError(f"{argument}: expected a file of weights, got {weights}")
        try:
            network.load_state_dict(_read_weights(Path(weights)))
        except Exception as error:
            raise UserError(
                f"{argument}: {weights} does not fit a {type(network).__name__}: {first_line(error)}"
            ) from error
    return network.eval().requires_grad_(False)


def _read_weights(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
