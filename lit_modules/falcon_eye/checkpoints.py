"""Checkpoints without the weights of a base that training leaves as they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from leanlight.contracts import UserError


def frozen(network: nn.Module) -> set[str]:
    """Names of the parameters that do not train."""
    return {name for name, parameter in network.named_parameters() if not parameter.requires_grad}


def leave_out(checkpoint: dict[str, Any], network: nn.Module, prefix: str, base: dict[str, str]) -> None:
    """Take what does not train out of a checkpoint, and write down which base holds it.

    Args:
        checkpoint: as Lightning is about to write it.
        network: whose parameters that do not train the base has.
        prefix: of their names in the checkpoint.
        base: its ``name`` and ``digest``.
    """
    resting = {f"{prefix}{name}" for name in frozen(network)}
    if resting:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in resting}
        checkpoint["base"] = dict(base)


def complete(checkpoint: dict[str, Any], network: nn.Module, prefix: str, base: dict[str, str]) -> None:
    """Put back what `leave_out` took, from a network around the same base.

    Args:
        checkpoint: as it was read.
        network: that has read the base.
        prefix: of its names in the checkpoint.
        base: its ``name`` and ``digest``.

    Raises:
        UserError: another base.
    """
    written = checkpoint.get("base")
    if written is None:
        return
    if written["digest"] != base["digest"]:
        raise UserError(
            f"backbone: expected the base that the checkpoint was trained on, {written['name']} "
            f"({written['digest'][:12]}…), got {base['name']} ({base['digest'][:12]}…); name it with "
            "--model.init_args.backbone.init_args.path=FOLDER"
        )
    state = checkpoint["state_dict"]
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            state.setdefault(f"{prefix}{name}", parameter.detach())
