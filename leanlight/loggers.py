"""The loggers of runs: one CSV file that can be cut back on resume, W&B, and on request TensorBoard and MLflow."""

from __future__ import annotations

import csv
import io
import math
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from leanlight.contracts import Progress, atomic_write

# A server that is gone keeps training waiting for half a minute, once; by MLflow's own defaults, 7 and 120, for many.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
ProgressSource = Callable[[], Progress]


def _with_progress(metrics: dict[str, Any], source: ProgressSource | None) -> dict[str, Any]:
    if source is None:
        return metrics
    progress = source()
    return {**metrics, f"progress/{progress.unit}": progress.value}


class RunCSVLogger(Logger):
    """Append every logged row to ``metrics.csv``; satisfies `leanlight.contracts.ResumableLogger`.

    Lightning's own CSV logger starts an empty file on resume. This one appends, and `rewind` drops the rows that were
    written after the checkpoint a run resumes from, so that each step stands in the file once. A row is on its way to
    the disk as soon as it is logged; a new column rewrites the file atomically.

    Args:
        directory: the run folder; made when the first row comes.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self.progress: ProgressSource | None = None
        self._columns: list[str] = []
        self._rows = 0
        if self.path.is_file():
            self._columns, rows = self._read()
            self._rows = len(rows)

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @property
    @rank_zero_experiment
    def experiment(self) -> RunCSVLogger:
        return self

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: config.yaml beside the file holds the whole configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row: dict[str, Any] = {"step": step, **_with_progress(dict(metrics), self.progress)}
        fresh = [key for key in row if key not in self._columns]
        if fresh:
            rows = self._read()[1] if self._rows else []
            self._columns += fresh
            self._rewrite(rows)
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)
        self._rows += 1

    def position(self) -> int:
        return self._rows

    @rank_zero_only
    def rewind(self, position: int) -> None:
        if position < self._rows:
            self._rewrite(self._read()[1][:position])
            self._rows = position

    def best(self, metric: str, mode: str) -> float | None:
        """The best value so far of a metric that was logged; None without one."""
        if not self._rows:
            return None
        values = [float(text) for row in self._read()[1] if (text := row.get(metric)) and not math.isnan(float(text))]
        return (min if mode == "min" else max)(values, default=None)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        with open(self.path, newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row.values()]  # a kill may have cut the last line short
            return list(reader.fieldnames or []), rows

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns)
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self.path, text.getvalue())


class _RunsOnProgress:
    """Logs how far training is, in the method's own unit, beside every row."""

    progress: ProgressSource | None = None

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(_with_progress(dict(metrics), self.progress), step)  # type: ignore[misc]


class RunWandbLogger(_RunsOnProgress, WandbLogger):
    """W&B logger whose charts run over the method's own unit of progress."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._wandb_init.pop("anonymous", None)  # W&B warns of it, even of none
        if self._offline:  # Lightning says so by the environment, which W&B reads once: too early after a failed start
            self._wandb_init["mode"] = "offline"

    @rank_zero_only
    def begin(self, config: dict[str, Any], unit: str) -> None:
        """Tell W&B the configuration, and that every metric is drawn over ``progress/<unit>``."""
        self.experiment.config.update(config, allow_val_change=True)
        for split in ("train", "val", "test"):
            self.experiment.define_metric(f"{split}/*", step_metric=f"progress/{unit}")

    @rank_zero_only
    def tell_best(self, metric: str, value: float) -> None:
        """Put the best value of a metric into W&B's summary, as ``best/<metric>``."""
        self.experiment.summary[f"best/{metric}"] = value


class RunTensorBoardLogger(_RunsOnProgress, TensorBoardLogger):
    """TensorBoard's files in a run folder: ``tensorboard --logdir runs`` shows all runs by their paths.

    Args:
        directory: the run folder.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(save_dir=directory, name="tensorboard", version="")

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: config.yaml holds the whole configuration, and Lightning's hparams.yaml would be empty."""

    @rank_zero_only
    def save(self) -> None:
        """Bring what was logged to the disk."""
        self.experiment.flush()


class RunMLFlowLogger(_RunsOnProgress, MLFlowLogger):
    """MLflow's store in a run folder, or the server that ``MLFLOW_TRACKING_URI`` names; a resumed run stays one run.

    Args:
        directory: the run folder.
        project: MLflow's name of an experiment, which holds runs.
        name: of the run.
    """

    def __init__(self, directory: Path, project: str, name: str) -> None:
        server, self._kept = os.environ.get("MLFLOW_TRACKING_URI"), directory / "mlflow.id"
        for setting, value in _PATIENCE.items():
            os.environ.setdefault(setting, value)
        if not server:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 prefers databases, and asks
        super().__init__(
            experiment_name=project,
            run_name=name,
            tracking_uri=server or (directory / "mlflow").resolve().as_uri(),
            run_id=self._kept.read_text() if self._kept.is_file() else None,
        )

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client, with the run begun."""
        client = super().experiment
        if not self._kept.is_file():
            atomic_write(self._kept, str(self._run_id))
        return client
