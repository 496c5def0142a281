"""The two loggers of every run: one CSV file that can be cut back on resume, and Weights & Biases."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from leanlight.contracts import Progress, atomic_write

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


class RunWandbLogger(WandbLogger):
    """W&B logger whose charts run over the method's own unit of progress."""

    progress: ProgressSource | None = None

    @rank_zero_only
    def tie_metrics(self, unit: str) -> None:
        """Tell W&B that every metric is drawn over ``progress/<unit>``."""
        for split in ("train", "val", "test"):
            self.experiment.define_metric(f"{split}/*", step_metric=f"progress/{unit}")

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(_with_progress(dict(metrics), self.progress), step)
