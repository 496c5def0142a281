"""Keeps summary.json of a run true from its first second to its last."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks import ThroughputMonitor
from callbacks.sending import attempt
from leanlight import runs
from leanlight.contracts import DivergedError, HasReplicas, UserError, progress_of
from leanlight.locks import locked
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
        inputs: name → sha256 of the stage inputs.
        before: summary of the run that is gone on with; empty for a new one.
        changes: what of the experiment has changed since, as `leanlight.runs.changes` gives it.
        allow_changes: accept other data, too.
        on_changes: called with all changes so far, once the run has begun to go on with them.
    """

    def __init__(
        self,
        run_dir: Path,
        command: str,
        method: str,
        dataset: str,
        resolved: Mapping[str, Any],
        identity: str,
        *,
        inputs: Mapping[str, str],
        before: Mapping[str, Any],
        changes: Mapping[str, list[Any]],
        allow_changes: bool,
        on_changes: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        self.run_dir, self.resolved = run_dir, resolved
        self.started = False
        self.metrics: dict[str, float] = {}
        self.replicas: dict[str, list[float]] = {}  # values behind the means of a module with replicas
        self.before, self.changes, self.allow_changes = before, dict(changes), allow_changes
        self._on_changes = on_changes
        # What has finished is replaced only by what has finished.
        self._finished = dict(before) if before.get("status") == "finished" else {}
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
            "inputs": dict(inputs),
            "changes": list(before.get("changes") or []),
            "commit": commit,
            "dirty": dirty,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "error": None,
        }

    # -- Lightning hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if (metric := getattr(pl_module, "primary_metric", None)) is not None:
            self.summary["primary_metric"] = {"name": metric.name, "mode": metric.mode}
        for logger in trainer.loggers:
            if hasattr(logger, "progress"):
                logger.progress = partial(progress_of, pl_module)
            if isinstance(logger, RunWandbLogger) and trainer.is_global_zero:
                attempt(logger, "settings", logger.begin, dict(self.resolved), progress_of(pl_module).unit)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse other data than the run began with."""
        then, now = self.before.get("data"), self._data(trainer)
        if then and now and then["fingerprint"] != now["fingerprint"]:
            if not self.allow_changes:
                raise UserError(
                    f"data: the run began with other data ({then['source']}; fingerprint {then['fingerprint'][:12]}) "
                    f"than are found now ({now['source']}; {now['fingerprint'][:12]}); put them back, or go on with "
                    "--allow-changes, which is recorded"
                )
            self.changes["data"] = [then["fingerprint"], now["fingerprint"]]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start(trainer)

    def _start(self, trainer: pl.Trainer) -> None:
        """From now on the run is another than before: until here nothing of it has changed."""
        if self.started:
            return
        self.started = True
        if self.changes:
            self.summary["changes"] += [{"date": self.summary["date"], "keys": self.changes}]
        self._write(trainer)
        if self.changes and trainer.is_global_zero:
            self._on_changes(self.summary["changes"])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._collect(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._collect(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._collect(trainer, pl_module)

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._start(trainer)
        self.metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
        if isinstance(pl_module, HasReplicas) and pl_module.replicas > 1:
            values = pl_module.replica_metrics()
            self.replicas |= {name: list(values[name]) for name in trainer.callback_metrics if name in values}

    # -- summary

    @contextmanager
    def recording(self, trainer: pl.Trainer) -> Iterator[None]:
        """Record the block as this run; the summary ends as finished, interrupted, diverged or failed."""
        if not self.before:
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
        """Write how the run ended; nothing of a resumed one that did not get as far as going on."""
        if status == "finished":
            self._start(trainer)  # also one that had nothing left to do
        elif self.before and not self.started:
            return
        self.summary |= {"status": status, "error": error}
        if status == "finished":
            self.summary["artifacts"] = runs.list_artifacts(self.run_dir)
        self._write(trainer)

    def _write(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero or not self.run_dir.is_dir():
            return
        code_hash, files = runs.code_version()
        monitor = next((c for c in getattr(trainer, "callbacks", []) if isinstance(c, ThroughputMonitor)), None)
        self.summary |= {
            "metrics": self.metrics,
            **({"replicas": self.replicas} if self.replicas else {}),
            "wall_s": round(self._wall_before + time.monotonic() - self._begin, 3),
            "train_wall_s": monitor and monitor.train_wall_s,
            "samples_seen": monitor and monitor.samples_seen,
            "peak_rss_mb": monitor and monitor.peak_rss_mb,
            "peak_cuda_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
            "data": self._data(trainer),
            "code_hash": code_hash,
            "code_files": files,
            "machine": runs.machine(),
        }
        if self.summary["status"] == "finished":
            self._finished = {}
        told = {key: self.summary[key] for key in ("status", "error", "date", "changes")}
        runs.write_summary(self.run_dir, {**self._finished, "resumed": told} if self._finished else self.summary)
        if self.summary["status"] == "finished":
            self._finished = dict(self.summary)

    @staticmethod
    def _data(trainer: pl.Trainer) -> dict[str, Any] | None:
        meta = getattr(getattr(trainer, "datamodule", None), "meta", None)
        if meta is None:
            return None
        return {"name": meta.name, "source": meta.source, "fingerprint": meta.fingerprint, "counts": meta.counts}


class PythonRun(pl.Callback):
    """Keeps a run folder for a trainer that is driven from Python: config.yaml before, summary.json after each call.

    Args:
        recorder: of the run.
        save_config: writes config.yaml into the existing run folder.
    """

    def __init__(self, recorder: RunRecorder, save_config: Callable[[], None]) -> None:
        self.recorder, self.save_config = recorder, save_config
        self._lock = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by a connector
            self._lock.enter_context(locked(self.recorder.run_dir))
            self.recorder.run_dir.mkdir(parents=True, exist_ok=True)
            self.save_config()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.recorder.finish(trainer, "interrupted" if trainer.interrupted else "finished")
        self._lock.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        status = "diverged" if isinstance(exception, DivergedError) else "failed"
        self.recorder.finish(trainer, status, f"{type(exception).__name__}: {exception}")
        self._lock.close()
