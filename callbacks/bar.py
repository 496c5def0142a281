"""How far a run is: a bar in a terminal, a line now and then where output is a file."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import BatchesProcessedColumn, CustomTimeColumn
from lightning.pytorch.trainer.states import RunningStage
from rich.console import Console
from rich.progress import TextColumn

_NARROW, _WIDE = 40, 70  # columns: below the first description and count alone, from the second on everything
_STAGES = {RunningStage.VALIDATING: "validation", RunningStage.SANITY_CHECKING: "validation"}
_STAGES |= {RunningStage.TESTING: "test", RunningStage.PREDICTING: "prediction"}


def primary_of(trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
    """The metric that a module is judged by, by name, once it is known; else nothing."""
    metric = getattr(pl_module, "primary_metric", None)
    if metric is None or metric.name not in trainer.callback_metrics:
        return {}
    return {metric.name: float(trainer.callback_metrics[metric.name])}


class TerminalBar(RichProgressBar):
    """Lightning's rich bar with the validation metric, which fits into narrow terminals."""

    def __init__(self) -> None:
        super().__init__(leave=True)
        self._validated: dict[str, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if not trainer.sanity_checking:
            self._validated = primary_of(trainer, pl_module)  # once a validation: reading it waits for a GPU

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        shown = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        return {**shown, **self._validated} if Console().width >= _WIDE else {}

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        columns, width = list(super().configure_columns(trainer)), Console().width
        kept: tuple[type, ...] = (TextColumn, BatchesProcessedColumn)
        if width >= _NARROW:
            kept = (*kept, CustomTimeColumn)
        return columns if width >= _WIDE else [column for column in columns if isinstance(column, kept)]


class ProgressLines(ProgressBar):
    """Prints a line about every half minute, also while one step, an evaluation or an export takes long.

    A thread of its own asks how far the run is, so training pays nothing, and what is silent by itself is not.

    Args:
        every_s: seconds between two lines.
    """

    def __init__(self, every_s: float = 30.0) -> None:
        super().__init__()
        self.every_s = every_s
        self._validated: dict[str, float] = {}
        self._began = self._share_before = 0.0
        self._ended: threading.Event | None = None

    def disable(self) -> None:
        """On every rank but zero."""
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._stop()
        if getattr(self, "_enabled", True) and trainer.is_global_zero:
            self._began, self._share_before, self._ended = time.monotonic(), 0.0, threading.Event()
            threading.Thread(target=self._tell, args=(self._ended,), daemon=True).start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._share_before = _share(trainer)  # a resumed run has not done that now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._validated = primary_of(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._ended is not None:
            self._ended.set()

    def _tell(self, ended: threading.Event) -> None:
        while not ended.wait(self.every_s):
            print(self.line(), flush=True)

    def line(self) -> str:
        """How far the run is."""
        trainer, passed = self.trainer, time.monotonic() - self._began
        parts, share = [], None
        if trainer.state.fn == "fit":
            epochs = trainer.max_epochs
            parts.append(f"epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if epochs and epochs > 0 else ""))
            total = trainer.num_training_batches
            done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
            parts.append(f"batch {done}" + (f"/{total}" if total != float("inf") else ""))
            share = _share(trainer)
        stage = trainer.state.stage
        if stage in _STAGES:
            parts.append(_STAGES[stage])
        parts += [f"{name} {value:.4g}" for name, value in self._validated.items()]
        parts.append(f"{_duration(passed)} so far")
        if share is not None and share - self._share_before > 0.01:
            parts.append(f"about {_duration(passed * (1 - share) / (share - self._share_before))} left")
        return ", ".join(parts)


def _share(trainer: Trainer) -> float:
    """Part of the training that is done; 0 where its end is not known."""
    if not trainer.max_epochs or trainer.max_epochs < 1:
        return trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    total = trainer.num_training_batches
    inside = trainer.fit_loop.epoch_loop.batch_progress.current.completed / total if total else 0.0
    return min(1.0, (trainer.current_epoch + inside) / trainer.max_epochs)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def progress_callback() -> ProgressBar:
    """The one that suits standard output."""
    return TerminalBar() if sys.stdout.isatty() else ProgressLines()
