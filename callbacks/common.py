"""Questions that several callbacks ask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from leanlight.contracts import Batch, UserError


def writes_files(trainer: Trainer) -> bool:
    """Whether this process writes the run's files: rank zero does, except in a `fast_dev_run`."""
    return trainer.is_global_zero and not is_trial(trainer)


def is_trial(trainer: Trainer) -> bool:
    """Whether this is a `fast_dev_run`, which leaves nothing behind."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by a connector, out of mypy's sight


@contextmanager
def lightning_internals(purpose: str) -> Iterator[None]:
    """Around code that uses private names of Lightning, for want of public ones: a version that lacks one is named."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{purpose} uses internals of Lightning that version {lightning.__version__} does not have ({error}); "
            "install a version that constraints.txt names"
        ) from error


def inputs_of(outputs: Any, batch: Any) -> int:
    """Inputs of the network behind a step: its output's ``inputs`` where an item stands for several, as an episode does
    for its decisions; else the items of the batch."""
    if isinstance(outputs, Mapping) and "inputs" in outputs:
        return int(outputs["inputs"])
    return items_in(batch)


def items_in(batch: Any) -> int:
    """Number of items in a batch of any kind; 1 for a batch without tensors."""
    if isinstance(batch, (Batch, Tensor)):
        return len(batch)
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        return 1


def gather_objects(own: Any) -> list[Any]:
    """The objects of all processes, in rank order. Tensors in them should be on the CPU."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone
