"""Checkpoints from which a killed run goes on as if nothing had happened."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
from contextlib import nullcontext
from pathlib import Path
from types import FrameType, MethodType
from typing import Any, Literal

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.common import gather_objects, is_trial
from callbacks.epoch_state import capture_epoch, restore_epoch, restore_newest
from leanlight.contracts import (
    HasReplicas,
    ResumableLogger,
    UserError,
    atomic_path,
    capture_rng,
    note_digest,
    progress_of,
    restore_rng,
    sha256_file,
)
from leanlight.contracts.ranges import PositiveInt

_LAST, _PREVIOUS = "last.ckpt", "previous.ckpt"


def last_checkpoint(trainer: Trainer) -> Path:
    """Where `ExactResume` writes; the file need not exist."""
    return Path(trainer.default_root_dir) / "checkpoints" / _LAST


def best_checkpoint(trainer: Trainer) -> Path:
    """Where `BestCheckpoint` writes; the file need not exist."""
    return last_checkpoint(trainer).with_name("best.ckpt")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, flushes it to disk and renames it: a crash leaves the old file or the new.

    Its sha256 is noted in ``sha256.json`` beside it. A ``last.ckpt`` that it replaces stays as ``previous.ckpt``.

    Loading is the stock one, so ``weights_only`` keeps its meaning (PyTorch's default: true).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write `checkpoint` to `path`. Remote addresses (``s3://…``) and `storage_options` go to the stock writer."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        with atomic_path(path) as part:
            torch.save(checkpoint, part)
            note_digest(path, sha256_file(part))
            if path.name == _LAST and path.is_file():
                _keep(path, path.with_name(_PREVIOUS))


def _keep(path: Path, copy: Path) -> None:
    """Let `copy` be the file that `path` is now, which stays where it is."""
    with atomic_path(copy) as part:
        try:
            os.link(path, part)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, part)


class ExactResume(Checkpoint):
    """Writes ``<run folder>/checkpoints/last.ckpt`` so that a resumed run equals an undisturbed one.

    Equal means: the same weights, bit for bit, and the same rows in the loggers, each once (CPU, same number of
    processes, a training loader with ``state_dict`` whose order depends on seed and epoch alone).

    It saves *between* two training batches, just before the next is fetched: before the first one, then as soon as
    training got on by `every` since the last save, and once more when training ends. What counts is the module's own
    `progress`, so a fit without an optimiser is saved like any other; a module without it counts its steps. Lightning's
    own moment, `on_train_batch_end`, comes too early: the module's hook of that name, the row of that step, a
    validation due at that batch, and the epoch's row and plateau schedulers are still to come and would be lost or
    repeated. Checkpoints wait while gradients are being accumulated, since gradients are not part of them.

    Validation leaves the random states of training as they were.

    Beside what Lightning keeps, a checkpoint holds for every rank the random states and the accumulators of the running
    epoch, and for every `ResumableLogger` its position; a resumed run cuts these loggers back to it.

    Several processes ask one another for a SIGTERM in every `trainer.log_every_n_steps`-th batch, not in each as
    Lightning does: the answer is waited for, and with it everything that a GPU has still to do.

    Ctrl-C in a one-process run finishes the current step (and a validation that has begun), saves, and stops; a second
    Ctrl-C stops at once, with the previous checkpoint in place. SIGTERM saves in the same way. With several processes
    the previous checkpoint stays: ranks interrupted at different batches have no common state.

    A finished run resumed with a larger limit goes on exactly when it had ended with an epoch (and the module draws no
    random numbers in `on_train_start`); one that `max_steps` had stopped inside an epoch goes on with the next epoch.

    On another number of processes a run goes on, but not exactly: means over the running epoch leave out what was
    before.

    A loader without length is read one batch ahead by Lightning, so its own state is saved one batch ahead, too.

    Args:
        every: progress between two saves, in the module's own unit (steps, rounds, frames, images, …), at least 1.
    """

    def __init__(self, every: PositiveInt = 200) -> None:
        super().__init__()
        if every < 1:
            raise UserError(f"every: expected at least 1, got {every}")
        self.every = every
        self._saved_at: int | None = None
        self._resumed: dict[str, Any] | None = None
        self._rng_before_validation: dict[str, Any] | None = None
        self._trainer: Trainer | None = None
        self._interrupted = False

    @property
    def state_key(self) -> str:
        """The same for all settings, so that a resumed run may save more or less often."""
        return "ExactResume"

    # -- hooks, in the order in which they run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        self._resumed = state_dict
        if (before := len(state_dict["ranks"])) != trainer.world_size:
            rank_zero_warn(f"resuming on {trainer.world_size} processes a run of {before}: it will not be exact")
        if trainer.is_global_zero:
            _check_rows(trainer, state_dict["rows"])
        trainer.should_stop = state_dict["should_stop"]  # a run that stopped early and was finished stays finished
        trainer.num_sanity_val_steps = 0  # it would forget the newest metrics, and this run has validated already

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed is not None:
            restore_newest(trainer, self._rank_state(trainer, self._resumed)["epoch"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_at = None
        self._interrupted = False
        epochs = trainer.fit_loop.epoch_progress.current
        finished = epochs.ready == epochs.processed  # type: ignore[attr-defined]  # typed as its base class
        if self._resumed is not None and finished:  # and now to be longer
            self._restore(trainer, pl_module, self._resumed)
        loop = trainer.fit_loop.epoch_loop
        advance = loop.advance

        def advance_from_safe_point(_: Any, data_fetcher: Any) -> None:
            self._between_batches(trainer, pl_module)
            advance(data_fetcher)
            if loop._should_check_val_fx(data_fetcher):  # from here on, making the loader's iterator included
                self._rng_before_validation = capture_rng()

        # No hook runs between two batches after everything of the first is done; Lightning's loop has to be asked.
        loop.advance = MethodType(advance_from_safe_point, loop)  # type: ignore[method-assign]
        if trainer.world_size > 1:
            _ask_rarely(loop, trainer.log_every_n_steps)  # type: ignore[attr-defined]  # set by a connector
        self._listen(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._rng_before_validation is not None:
            restore_rng(self._rng_before_validation)
            self._rng_before_validation = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release(trainer)
        self._save(trainer, pl_module)
        self._stop_if_interrupted()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resumed is not None:  # nothing was left to train: the test comes as it did, or would have, then
            self._rewind(trainer, self._resumed)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Anything may be half done here, so the checkpoint on disk stays the last word.
        self._release(trainer)
        self._rng_before_validation = None

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return {}
        own = {
            "rng": self._rng_before_validation or capture_rng(),
            "epoch": capture_epoch(trainer, trainer.lightning_module),
        }
        rows = [logger.position() for logger in _resumable(trainer)]
        return {"ranks": gather_objects(own), "rows": rows, "should_stop": trainer.should_stop}

    # -- the safe point

    def _between_batches(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing of the previous batch is pending and nothing of the next one has begun."""
        if self._saved_at is None:
            if self._resumed is not None:
                self._restore(trainer, pl_module, self._resumed)
                self._saved_at = progress_of(pl_module).value
            else:
                self._save(trainer, pl_module)
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        # Ranks learn of signals at different batches, and saving is a joint action.
        told_to_stop = trainer.world_size == 1 and (self._interrupted or trainer.received_sigterm)
        if told_to_stop or progress_of(pl_module).value - (self._saved_at or 0) >= self.every:
            self._save(trainer, pl_module)
        self._stop_if_interrupted()

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_trial(trainer):
            trainer.save_checkpoint(last_checkpoint(trainer), weights_only=False)
        self._saved_at = progress_of(pl_module).value

    def _restore(self, trainer: Trainer, pl_module: LightningModule, state: dict[str, Any]) -> None:
        own = self._rank_state(trainer, state)
        if len(state["ranks"]) == trainer.world_size:  # else no sum of another number of processes: means begin anew
            restore_epoch(trainer, pl_module, own["epoch"])
        # Lightning would now skip a validation it takes for done, and an epoch's plateau schedulers: both were settled
        # before this checkpoint was written.
        trainer.fit_loop._restarting = False
        trainer.fit_loop.epoch_loop.restarting = False
        self._rewind(trainer, state)

    def _rewind(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Bring loggers and random states to where the checkpoint was written."""
        if trainer.is_global_zero:
            for logger, position in zip(_resumable(trainer), state["rows"], strict=False):
                logger.rewind(position)
        restore_rng(self._rank_state(trainer, state)["rng"])
        self._resumed = None

    @staticmethod
    def _rank_state(trainer: Trainer, state: dict[str, Any]) -> dict[str, Any]:
        ranks = state["ranks"]
        return ranks[trainer.global_rank % len(ranks)]

    # -- Ctrl-C

    def _listen(self, trainer: Trainer) -> None:
        own_thread = threading.current_thread() is threading.main_thread()
        if own_thread and trainer.world_size == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        rank_zero_info("\nStopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.")

    def _stop_if_interrupted(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt

    def _release(self, trainer: Trainer) -> None:
        for replaced in ("advance", "_broadcast_sigterm_tensor"):
            vars(trainer.fit_loop.epoch_loop).pop(replaced, None)
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class BestCheckpoint(Checkpoint):
    """Keeps ``<run folder>/checkpoints/best.ckpt``: the state after the best validation so far.

    Lightning's own `ModelCheckpoint` saves nothing while no optimiser steps, and forgets its best when the run folder
    has moved; this one does neither.

    Args:
        monitor: logged name of the metric.
        mode: whether ``min`` or ``max`` is better.
    """

    def __init__(self, monitor: str, mode: Literal["min", "max"]) -> None:
        super().__init__()
        self.monitor, self.mode = monitor, mode
        self.best: float | None = None
        self._trainer: Trainer | None = None

    @property
    def state_key(self) -> str:
        """The best of one metric says nothing about another."""
        return f"BestCheckpoint {self.mode} {self.monitor}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._trainer is not None and best_checkpoint(self._trainer).is_file():
            self.best = state_dict["best"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or is_trial(trainer):
            return
        if self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            raise UserError(f"{type(pl_module).__name__}.primary_metric: {self.monitor!r} was not logged, but {logged}")
        value = float(trainer.callback_metrics[self.monitor])
        better = self.best is None or (value < self.best if self.mode == "min" else value > self.best)
        if better and not math.isnan(value):
            self.best = value
            with pl_module.as_best() if isinstance(pl_module, HasReplicas) else nullcontext():
                trainer.save_checkpoint(best_checkpoint(trainer), weights_only=False)


def _ask_rarely(loop: Any, every: int) -> None:
    """Let a training loop that asks the other processes for a SIGTERM do so in every n-th batch."""
    ask = getattr(loop, "_broadcast_sigterm_tensor", None)
    if ask is not None and every > 1:
        loop._broadcast_sigterm_tensor = lambda: ask() if loop.total_batch_idx % every == 0 else None


def _check_rows(trainer: Trainer, saved: list[int]) -> None:
    """Refuse loggers that hold less than they did when the checkpoint was written."""
    for logger, rows in zip(_resumable(trainer), saved, strict=False):
        if logger.position() < rows:
            raise UserError(
                f"{trainer.default_root_dir}: the run's rows were cut: {logger.position()} are there, and {rows} were "
                "when the checkpoint was written; put the file (metrics.csv) back, or start the run anew"
            )


def _resumable(trainer: Trainer) -> list[ResumableLogger]:
    return [logger for logger in trainer.loggers if isinstance(logger, ResumableLogger)]
