"""`leanlight.load`: a run's model, or what a folder holds that left the suite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanlight import experiment
from leanlight.contracts.errors import UserError


def load(
    source: Path | str,
    checkpoint: str = "last",
    trust: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    program: bool = False,
) -> Any:
    """A finished run's model, or the tensors of an export.

    Of a run folder, or a checkpoint file: its LightningModule in evaluation mode on the CPU. Of any other folder, as
    `leanlight export` writes and `leanlight pull` fetches them: ``dict[str, Tensor]``, all tensors of its safetensors
    files by name, with the file's path before each where there are several files (``replica_0/distilled/images``).
    Nothing that the folder holds is executed.

    Args:
        source: run folder, checkpoint file, or folder of an export.
        checkpoint: ``last`` or ``best`` of a run folder.
        trust: packages outside the suite that a run may name; what it names is imported and runs.
        overrides: dotted arguments of a run's model that shall differ, e.g. ``{"network.init_args.weights": path}``.
        program: of an export, return its network instead, the module of its ``torch.export`` program. Such a file may
            do anything when it is read: only of who you trust.

    Raises:
        UserError: nothing of the kind is there, or it names a class that is not admitted.
    """
    place = Path(source)
    if not place.is_dir() or (place / "checkpoints").is_dir():
        return experiment.load(place, checkpoint, trust, overrides)
    return _network(place) if program else _tensors(place)


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.rglob("*.safetensors"))
    tensors: dict[str, Tensor] = {}
    for path in files:
        before = f"{path.relative_to(folder).with_suffix('').as_posix()}/" if len(files) > 1 else ""
        try:
            tensors |= {before + name: value for name, value in load_file(path).items()}
        except SafetensorError as error:
            raise UserError(f"source: {path} is not a readable file of tensors ({error})") from error
    if not tensors:
        raise UserError(f"source: {folder} is neither a run nor an export with tensors{_hint(folder)}")
    return tensors


def _hint(folder: Path) -> str:
    return "; program=True reads its network, if you trust it" if any(folder.glob("*.pt2")) else ""


def _network(folder: Path) -> nn.Module:
    programs = sorted(folder.glob("*.pt2"))
    if len(programs) != 1:
        raise UserError(f"source: expected one network (*.pt2) in {folder}, found {len(programs)}")
    try:
        return torch.export.load(programs[0]).module()
    except Exception as error:  # of a file of any content
        raise UserError(f"source: {programs[0]} is not a readable program ({type(error).__name__})") from error
