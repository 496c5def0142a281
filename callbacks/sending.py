"""Hand pictures, artefacts and figures to the loggers of a run, whatever they are; none of them can stop it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from callbacks.pictures import size_of
from leanlight.contracts import Animation, Bars, Curve, Heatmap, MediaItem, ResumableLogger, Table

_NAMES = {WandbLogger: "W&B", TensorBoardLogger: "TensorBoard", MLFlowLogger: "MLflow"}
_LARGEST_TABLE = 10_000  # cells; a heat map of more is a picture alone
_LONGEST_WAIT = 8.0  # seconds for a table of W&B, which asks its server in the process that trains, for 10 at most
_EVERYTHING = "data"
_METRICS = "metrics"
_FILES = "tables and artefacts"
_given_up: WeakKeyDictionary[Logger, set[str]] = WeakKeyDictionary()


def name_of(logger: Logger) -> str:
    """What users call a logger."""
    return next((name for kind, name in _NAMES.items() if isinstance(logger, kind)), type(logger).__name__)


def warn(text: str) -> None:
    """Print a line of warning."""
    print(f"leanlight: warning: {' '.join(text.split())}", file=sys.stderr)


def keep_from_stopping(logger: Logger) -> Logger:
    """Make what Lightning calls of a logger harmless, and return it: see `attempt`."""
    metrics = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint")
    for what, methods in {_METRICS: metrics, _FILES: ("log_table",)}.items():
        for method in methods:
            if hasattr(logger, method):
                setattr(logger, method, partial(attempt, logger, what, getattr(logger, method)))
    return logger


def gets_nothing(logger: Logger) -> bool:
    """Whether a logger is asked for nothing any more, and the user has been told."""
    return _EVERYTHING in _given_up.get(logger, ())


def attempt(logger: Logger, what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call something of a logger; an error becomes one line of warning, and `what` is sent there no more.

    Networks fail, homes are read-only, disks fill: a run goes on without its dashboard, and ``metrics.csv`` has all.
    Where not even metrics are taken, or after a `ConnectionError`, as of a process that has died, nothing at all is
    sent there.

    Args:
        logger: whose it is.
        what: kind of what is sent: ``metrics``, ``pictures`` or ``tables and artefacts``.
        call: called with the other arguments.

    Returns:
        What `call` does; None after an error.
    """
    given_up = _given_up.setdefault(logger, set())
    if given_up & {what, _EVERYTHING}:
        return None
    try:
        return call(*args, **kwargs)
    except Exception as error:  # of any library
        what = _EVERYTHING if what == _METRICS or isinstance(error, ConnectionError) else what
        given_up.add(what)
        warn(f"{name_of(logger)} gets no more {what} of this run ({type(error).__name__}: {error})")
        return None


def send_media(
    loggers: Sequence[Logger], split: str, items: Mapping[str, MediaItem], files: Mapping[str, Path], step: int
) -> None:
    """Send pictures to every logger that shows any.

    W&B gets numbers behind curves, bars and heat maps as tables beside the pictures, called ``<name>_table``.

    Args:
        loggers: of the trainer.
        split: first part of their names.
        items: by name.
        files: the same, drawn.
        step: of the trainer.
    """
    for logger in loggers:
        for kind, send in ((WandbLogger, _wandb), (TensorBoardLogger, _tensorboard), (MLFlowLogger, _mlflow)):
            if isinstance(logger, kind):
                attempt(logger, "pictures", send, logger, split, items, files, step)


def send_figures(loggers: Sequence[Logger], figures: Mapping[str, float], step: int) -> None:
    """Send figures that differ from run to run to every logger but those whose files are compared byte for byte."""
    for logger in loggers:
        if not isinstance(logger, ResumableLogger):
            attempt(logger, _METRICS, logger.log_metrics, dict(figures), step)


def send_artifact(
    loggers: Sequence[Logger],
    title: str,
    files: Mapping[str, Path],
    metadata: Mapping[str, Any],
    aliases: Sequence[str],
) -> None:
    """Send the files of a model: to W&B as a version of an artefact of that title, to MLflow as artefacts of the run.

    Args:
        loggers: of the trainer.
        title: letters, digits, dots, dashes and underscores; others become dashes.
        files: by their names inside the artefact.
        metadata: shown beside them by W&B.
        aliases: names of this version.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            attempt(logger, _FILES, _wandb_artifact, logger, title, files, metadata, aliases)
        elif isinstance(logger, MLFlowLogger):
            attempt(logger, _FILES, _mlflow_files, logger, "export", files)


def as_table(item: MediaItem) -> Table | None:
    """The numbers behind a curve, bars or a heat map (one row a cell); None for other pictures."""
    if isinstance(item, Curve):
        return Table((item.xlabel, *item.series), list(zip(item.x, *item.series.values(), strict=True)))
    if isinstance(item, Bars):
        return Table(("name", item.ylabel), list(item.values.items()))
    if isinstance(item, Heatmap) and item.matrix.numel() <= _LARGEST_TABLE:
        matrix = item.matrix.tolist()
        rows: Sequence[str | int] = item.rows or range(len(matrix))
        columns: Sequence[str | int] = item.columns or range(item.matrix.shape[1])
        cells = [
            (a, b, value) for a, line in zip(rows, matrix, strict=True) for b, value in zip(columns, line, strict=True)
        ]
        return Table((item.ylabel, item.xlabel, "value"), cells)
    return None


# -- one function a kind of logger


def _wandb(
    logger: WandbLogger, split: str, items: Mapping[str, MediaItem], files: Mapping[str, Path], step: int
) -> None:
    import wandb

    pictures: dict[str, Any] = {}
    tables: dict[str, Table] = {}
    for name, file in files.items():
        item = items[name]
        if isinstance(item, Table):
            tables[f"{split}/{name}"] = item
            continue
        is_moving = isinstance(item, Animation)
        pictures[f"{split}/{name}"] = wandb.Video(str(file), format="gif") if is_moving else wandb.Image(str(file))
        if (numbers := as_table(item)) is not None:
            tables[f"{split}/{name}_table"] = numbers
    logger.experiment.log({**pictures, "trainer/global_step": step})
    for name, item in tables.items():
        attempt(logger, _FILES, _wandb_table, logger, name, item, step)


def _wandb_table(logger: WandbLogger, name: str, item: Table, step: int) -> None:
    """Log a table; a TimeoutError when the server kept training waiting, so that the next table does not."""
    import wandb

    begin = time.monotonic()
    table = wandb.Table(columns=list(item.columns), data=[list(row) for row in item.rows])
    logger.experiment.log({name: table, "trainer/global_step": step})
    if (waited := time.monotonic() - begin) > _LONGEST_WAIT:
        raise TimeoutError(f"no answer for {waited:.0f} s")


def _tensorboard(
    logger: TensorBoardLogger, split: str, items: Mapping[str, MediaItem], files: Mapping[str, Path], step: int
) -> None:
    from tensorboard.compat.proto.summary_pb2 import Summary

    for name, file in files.items():
        item, tag = items[name], f"{split}/{name}"
        if isinstance(item, Table):
            lines = [item.columns, ["---"] * len(item.columns), *item.rows]
            logger.experiment.add_text(tag, "\n".join("|".join(map(str, line)) for line in lines), step)
            continue
        # The file as it is: `add_image` would code it anew, and `add_video` wants another package. Between fit and test
        # Lightning closes the writer; only its own methods open it again.
        width, height = size_of(file)
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=file.read_bytes())
        logger.experiment._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _mlflow(
    logger: MLFlowLogger, split: str, items: Mapping[str, MediaItem], files: Mapping[str, Path], step: int
) -> None:
    _mlflow_files(logger, f"media/{split}", {file.name: file for file in files.values()})


def _mlflow_files(logger: MLFlowLogger, folder: str, files: Mapping[str, Path]) -> None:
    for name, file in files.items():
        inside = f"{folder}/{name}".rpartition("/")[0]
        logger.experiment.log_artifact(logger.run_id, str(file), inside)


def _wandb_artifact(
    logger: WandbLogger, title: str, files: Mapping[str, Path], metadata: Mapping[str, Any], aliases: Sequence[str]
) -> None:
    import wandb

    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", title)[-120:], type="model", metadata=dict(metadata))
    for name, file in files.items():
        artifact.add_file(str(file), name=name)
    logger.experiment.log_artifact(artifact, aliases=list(aliases))
