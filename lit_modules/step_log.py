"""Logging of steps: of training without waits for a device or needless ones for other processes; of evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from leanlight.contracts import on_host


def log_step(
    module: LightningModule, values: Mapping[str, Tensor | float], batch_size: int, over_processes: bool = False
) -> None:
    """Log what a training step gave, by step.

    With `over_processes` several processes log the mean of what each has, by one collective for all values, and only in
    steps that the loggers write and in the last of an epoch, whose values callbacks read. Lightning's ``sync_dist``
    takes two collectives a value in every step.

    Args:
        module: in its `training_step`.
        values: by name; tensors are scalars.
        batch_size: items of the step.
        over_processes: whether to log means over the processes; else each process logs what it has.
    """
    if over_processes and module.trainer.world_size > 1:
        if not _is_written(module):
            return
        row = torch.stack([torch.as_tensor(value, device=module.device).detach().float() for value in values.values()])
        mean = module.trainer.strategy.reduce(row, reduce_op="mean")
        assert isinstance(mean, Tensor)
        values = dict(zip(values, mean, strict=True))
    module.log_dict(on_host(values), on_step=True, on_epoch=False, batch_size=batch_size)


def log_evaluation(module: LightningModule, values: Mapping[str, Any], items: float) -> None:
    """Log what a batch of evaluation gave, for a mean over the items of all batches and processes.

    Args:
        module: in its `validation_step` or `test_step`.
        values: by name; scalar means over the batch's items, or metrics of torchmetrics.
        items: of the batch; or what else its means are over, such as tokens by their weights.
    """
    # Lightning divides by the mean of the processes' numbers of items, and rounds it down where these are integers.
    size: Any = float(items)
    module.log_dict(dict(values), on_step=False, on_epoch=True, sync_dist=True, batch_size=size)


def _is_written(module: LightningModule) -> bool:
    """Whether the loggers write this step, or its values are what the epoch ends with."""
    trainer, every = module.trainer, module.trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
    return bool(every and (module.global_step + 1) % every == 0) or trainer.is_last_batch
