"""Keeps summary.json of a run true from its first second to its last."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks import ThroughputMonitor
from callbacks.sending import attempt
from leanlight import runs
from leanlight.contracts import DivergedError, progress_of
from leanlight.loggers import RunWandbLogger


class RunRecorder(pl.Callback):
    """Writes summary.json at the start and at the end, whatever the end is, and tells W&B the configuration once.

    Args:
        run_dir: the run folder.
        command: subcommand of the run, such as ``fit``.
        method: first folder of the run under the runs root.
        dataset: second one.
        resolved: the complete configuration.
        identity: its hash.
    """

    def __init__(
        self, run_dir: Path, command: str, method: str, dataset: str, resolved: Mapping[str, Any], identity: str
    ) -> None:
        self.run_dir, self.resolved = run_dir, resolved
        self.started = False
        self.metrics: dict[str, float] = {}
        before = runs.read_summary(run_dir) or {}
        self._wall_before = float(before.get("wall_s") or 0.0)
        self._begin = time.monotonic()
        commit, dirty = runs.commit()
        self.summary: dict[str, Any] = {
            "status": "running",
            "method": method,
            "dataset": dataset,
            "run_id": run_dir.name,
            "command": [command],
            "seed": resolved.get("seed_everything"),
            "config_hash": identity,
            "commit": commit,
            "dirty": dirty,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "error": None,
        }

    # -- Lightning hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            if hasattr(logger, "progress"):
                logger.progress = partial(progress_of, pl_module)
            if isinstance(logger, RunWandbLogger) and trainer.is_global_zero:
                attempt(logger, "settings", logger.begin, dict(self.resolved), progress_of(pl_module).unit)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = True

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._collect(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._collect(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._collect(trainer)

    def _collect(self, trainer: pl.Trainer) -> None:
        if trainer.sanity_checking:
            return
        self.started = True
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}

    # -- summary

    @contextmanager
    def recording(self, trainer: pl.Trainer) -> Iterator[None]:
        """Record the block as this run; the summary ends as finished, interrupted, diverged or failed."""
        self._write(trainer)
        try:
            yield
        except DivergedError as error:
            self.finish(trainer, "diverged", str(error))
            raise
        except (KeyboardInterrupt, SystemExit):
            self.finish(trainer, "interrupted")
            if trainer.is_global_zero:
                command = self.summary["command"][0]
                again = f"{command} --resume {self.run_dir}" if command in ("fit", "predict") else command
                print(f"interrupted; go on with: leanlight {again}", file=sys.stderr)
            raise
        except BaseException as error:
            self.finish(trainer, "failed", f"{type(error).__name__}: {error}")
            raise
        self.finish(trainer, "interrupted" if trainer.interrupted else "finished")

    def finish(self, trainer: pl.Trainer, status: str, error: str | None = None) -> None:
        """Write how the run ended."""
        self.summary |= {"status": status, "error": error}
        if status == "finished":
            self.summary["artifacts"] = runs.list_artifacts(self.run_dir)
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero or not self.run_dir.is_dir():
            return
        meta = getattr(getattr(trainer, "datamodule", None), "meta", None)
        code_hash, files = runs.code_version()
        data = None
        if meta is not None:
            data = {"name": meta.name, "source": meta.source, "fingerprint": meta.fingerprint, "counts": meta.counts}
        monitor = next((c for c in getattr(trainer, "callbacks", []) if isinstance(c, ThroughputMonitor)), None)
        self.summary |= {
            "metrics": self.metrics,
            "wall_s": round(self._wall_before + time.monotonic() - self._begin, 3),
            "train_wall_s": monitor and monitor.train_wall_s,
            "samples_seen": monitor and monitor.samples_seen,
            "peak_rss_mb": monitor and monitor.peak_rss_mb,
            "peak_cuda_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
            "data": data,
            "code_hash": code_hash,
            "code_files": files,
            "machine": runs.machine(),
        }
        runs.write_summary(self.run_dir, self.summary)


class PythonRun(pl.Callback):
    """Keeps a run folder for a trainer that is driven from Python: config.yaml before, summary.json after each call.

    Args:
        recorder: of the run.
        save_config: writes config.yaml into the existing run folder.
    """

    def __init__(self, recorder: RunRecorder, save_config: Callable[[], None]) -> None:
        self.recorder, self.save_config = recorder, save_config

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            self.recorder.run_dir.mkdir(parents=True, exist_ok=True)
            self.save_config()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.recorder.finish(trainer, "interrupted" if trainer.interrupted else "finished")

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        status = "diverged" if isinstance(exception, DivergedError) else "failed"
        self.recorder.finish(trainer, status, f"{type(exception).__name__}: {exception}")
