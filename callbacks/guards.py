"""Stop a run that diverged or whose disk is full, before a bad or half-written checkpoint replaces a good one."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.checkpoint import last_checkpoint
from leanlight.contracts import DivergedError, HasTerms, UserError
from leanlight.contracts.ranges import NonNegativeFloat, PositiveInt


class NaNGuard(Callback):
    """Stops training with `DivergedError` when a loss term becomes NaN or infinite.

    The error names the term, the step and the last good checkpoint. The terms are those of `HasTerms.loss_terms` where
    the module has it (the only way for manual optimisation whose `training_step` returns nothing), and the loss that
    `training_step` returns. On the CPU every step is looked at. On an accelerator flags stay on the device and are
    fetched every `check_every_n_steps` batches, before each validation, at the end of each epoch, and before each
    checkpoint, so that no step waits for the device.

    Before a checkpoint the trainable weights are looked at as well: a finite loss can still give an infinite update.
    Weights-only checkpoints of Lightning's `ModelCheckpoint` call no callback and are not guarded.

    Args:
        check_every_n_steps: batches between two looks on an accelerator, at least 1.
    """

    def __init__(self, check_every_n_steps: PositiveInt = 50) -> None:
        if check_every_n_steps < 1:
            raise UserError(f"check_every_n_steps: expected at least 1, got {check_every_n_steps}")
        self.check_every_n_steps = check_every_n_steps
        self._pending: list[tuple[str, list[str], Tensor]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        where = f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {batch_idx})"
        names: list[str] = []
        on_device: list[Tensor] = []
        for name, value in _terms(pl_module, outputs).items():
            if isinstance(value, Tensor) and _must_wait_for(value):
                names.append(name)
                on_device.append(value.detach().isfinite().all())
            elif not math.isfinite(float(value)):
                self._stop(trainer, f"{name!r}", where)
        if names:
            self._pending.append((where, names, torch.stack(on_device)))
        if len(self._pending) >= self.check_every_n_steps:
            self._look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        bad = self._first_pending() or self._bad_weight(trainer, pl_module)
        # Saving is a joint action: when one rank has diverged, no rank may wait for it.
        if not trainer.strategy.reduce_boolean_decision(bad is None, all=True):
            self._stop(trainer, *(bad or ("a term of another process", f"step {trainer.global_step}")))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._pending.clear()

    def _look(self, trainer: Trainer) -> None:
        if bad := self._first_pending():
            self._stop(trainer, *bad)

    def _first_pending(self) -> tuple[str, str] | None:
        pending, self._pending = self._pending, []
        if not pending:
            return None
        finite = torch.cat([flags for _, _, flags in pending]).tolist()
        places = [(f"{name!r}", where) for where, names, _ in pending for name in names]
        return next((place for place, ok in zip(places, finite, strict=True) if not ok), None)

    def _bad_weight(self, trainer: Trainer, pl_module: LightningModule) -> tuple[str, str] | None:
        named = [(name, weight) for name, weight in pl_module.named_parameters() if weight.requires_grad]
        if not named:
            return None
        flags = torch.stack([weight.detach().isfinite().all() for _, weight in named]).tolist()
        where = f"step {trainer.global_step}"
        return next(((f"weight {name!r}", where) for (name, _), ok in zip(named, flags, strict=True) if not ok), None)

    def _stop(self, trainer: Trainer, what: str, where: str) -> None:
        good = last_checkpoint(trainer)
        raise DivergedError(
            f"training diverged: NaN or infinity in {what} at {where}; "
            f"last good checkpoint: {good if good.is_file() else 'none yet'}"
        )


def _must_wait_for(value: Tensor) -> bool:
    return value.device.type != "cpu"


def _terms(pl_module: LightningModule, outputs: Any) -> dict[str, Tensor | float]:
    terms = dict(pl_module.loss_terms()) if isinstance(pl_module, HasTerms) else {}
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return terms if loss is None else {**terms, "loss": loss}


class DiskGuard(Callback):
    """Finds an unwritable or full run folder before training, and a disk that fills up before each checkpoint.

    Args:
        min_free_mb: free space to insist on, in MB (10^6 bytes).
    """

    def __init__(self, min_free_mb: NonNegativeFloat = 500.0) -> None:
        self.min_free_mb = min_free_mb

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            check_folder(Path(trainer.default_root_dir), self.min_free_mb)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        _check_space(Path(trainer.default_root_dir), self.min_free_mb)


def check_folder(folder: Path, min_free_mb: float) -> None:
    """Make sure that a folder exists, can be written, and has `min_free_mb` MB left; raise UserError otherwise."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise UserError(
            f"trainer.default_root_dir: expected a folder that can be written, got {folder} ({error.strerror})"
        ) from error
    _check_space(folder, min_free_mb)


def _check_space(folder: Path, min_free_mb: float) -> None:
    free = shutil.disk_usage(folder).free / 1e6
    if free < min_free_mb:
        raise UserError(
            f"trainer.default_root_dir: expected {min_free_mb:.0f} MB free, got {free:.0f} MB at {folder}; "
            "free some space, choose another folder, or lower --disk_guard.min_free_mb"
        )
