"""Networks that a method uses but does not train: teachers, judges, sources of a conversion."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from textwrap import shorten
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from leanlight.contracts import UserError, isolated_rng

Module = TypeVar("Module", bound=nn.Module)
Loaded = TypeVar("Loaded")


class Frozen(Generic[Module]):
    """A network in evaluation mode that belongs to nobody.

    It is no `nn.Module`: as an attribute of one it stays out of `parameters`, checkpoints, device moves and `train`.
    Gradients pass through it to its input, never into its weights.

    Args:
        network: frozen in place; also found as attribute `network`, for methods other than ``forward``.
    """

    def __init__(self, network: Module) -> None:
        self.network: Module = network.eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> Frozen[Module]:
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
                f"{argument}: expected the checkpoint of a {name}; {checkpoint} gives {_one_line(error)}; {helps}"
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
        load_weights(network.load_state_dict, weights, f"a {type(network).__name__}", argument)
    return network.eval().requires_grad_(False)


def read_weights(path: Path) -> dict[str, Any]:
    """A state dict from ``.safetensors``, or from what ``torch.load(weights_only=True)`` reads."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def load_weights(
    load: Callable[[dict[str, Any]], Loaded],
    weights: Path | str,
    what: str,
    argument: str,
    read: Callable[[Path], dict[str, Any]] = read_weights,
) -> Loaded:
    """Hand the weights in a file to `load` and return what it gives.

    Args:
        load: takes a state dict; may raise anything.
        weights: a file that `read` understands.
        what: the network they are for, for errors.
        argument: name of the caller's argument that holds the path, for errors.
        read: gives the state dict in a file; may raise anything.

    Raises:
        UserError: no such file, or weights of another network: up to three of the keys that differ are named.
    """
    if not Path(weights).is_file():
        raise UserError(f"{argument}: expected a file of weights, got {weights}")
    try:
        return load(read(Path(weights)))
    except UserError:
        raise
    except Exception as error:  # of a file of any content
        raise UserError(f"{argument}: {weights} does not fit {what}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    """An error in short; of ``load_state_dict``, which lists every key on lines of its own, three and their number."""
    text = str(error)
    differing = [
        [f"{kind.lower()} {key}" for listed in re.findall(rf"{kind} key\(s\) .*", text) for key in _quoted(listed)]
        for kind in ("Missing", "Unexpected")
    ]
    mismatch = r"size mismatch for (\S+): .*?torch.Size\((.*?)\).*?torch.Size\((.*?)\)"
    differing.append([f"{key} of shape {theirs} for {ours}" for key, theirs, ours in re.findall(mismatch, text)])
    keys = [key for one_of_each in zip_longest(*differing) for key in one_of_each if key]
    if not keys:
        return shorten(f"{type(error).__name__}: {error}", 240, placeholder=" …")
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _quoted(text: str) -> list[str]:
    return re.findall('"([^"]+)"', text)
