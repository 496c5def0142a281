"""Checkpoints without what a file of pre-trained weights holds already."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanlight.contracts import UserError
from lit_modules.nn import TimmNet


def from_file(module: nn.Module, net: TimmNet, pretrained: Collection[nn.Parameter]) -> list[str]:
    """Names, in `module`, of parameters that the file of weights gives and no training changes; none without a file.

    Args:
        module: holds the adapted network.
        net: knows its file.
        pretrained: its parameters before a rule of tuning added any.
    """
    if net.weights_file is None:
        return []
    given = {id(parameter) for parameter in pretrained}
    named = module.named_parameters()
    return [name for name, value in named if id(value) in given and not value.requires_grad]


def leave_out(checkpoint: dict[str, Any], names: Collection[str], net: TimmNet) -> None:
    """Take parameters out of a checkpoint and write down which file holds them.

    Args:
        checkpoint: as Lightning is about to write it.
        names: see `from_file`.
        net: knows its file.
    """
    if not names or net.weights_file is None:
        return
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in names}
    checkpoint["weights"] = {"file": net.weights_file.name, "sha256": net.weights_sha256}


def complete(checkpoint: dict[str, Any], names: Collection[str], net: TimmNet, own: Mapping[str, Tensor]) -> None:
    """Put back what `leave_out` took, from a network that has read the same file.

    Args:
        checkpoint: as it was read.
        names: see `from_file`.
        net: knows its file.
        own: name → parameter of the module that is to be loaded.

    Raises:
        UserError: the network has read another file, or none.
    """
    written = checkpoint.get("weights")
    if written is None:
        return
    if net.weights_sha256 != written["sha256"]:
        raise UserError(
            f"weights: expected the file the checkpoint was trained on, {written['file']} with sha256 "
            f"{_short(written['sha256'])}, got {_described(net.weights_file, net.weights_sha256)}; name it with "
            "--model.init_args.network.init_args.weights=FILE"
        )
    checkpoint["state_dict"] |= {name: own[name].detach() for name in names}


def _described(file: Path | None, digest: str | None) -> str:
    return "none" if file is None or digest is None else f"{file} with {_short(digest)}"


def _short(digest: str) -> str:
    return f"{digest[:12]}…"
