"""The CSV file of a run: appended, cut back on resume, never half a line."""

import csv

from leanlight.contracts import Progress, ResumableLogger
from leanlight.loggers import RunCSVLogger


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def log(logger, steps):
    for step in steps:
        logger.log_metrics({"train/loss": step / 3}, step)


def test_it_is_a_resumable_logger(tmp_path):
    assert isinstance(RunCSVLogger(tmp_path), ResumableLogger)


def test_a_new_column_keeps_the_rows_before_it(tmp_path):
    logger = RunCSVLogger(tmp_path)
    log(logger, [0, 1])
    logger.log_metrics({"val/accuracy": 0.5}, 1)
    assert [row["train/loss"] for row in rows(logger.path)] == ["0.0", str(1 / 3), ""]
    assert rows(logger.path)[2]["val/accuracy"] == "0.5"


def test_resuming_equals_never_having_stopped(tmp_path):
    undisturbed, killed = RunCSVLogger(tmp_path / "a"), RunCSVLogger(tmp_path / "b")
    for logger in (undisturbed, killed):
        log(logger, range(5))
    position = killed.position()
    log(killed, range(5, 8))
    with open(killed.path, "a") as file:
        file.write("8,")  # a kill in the middle of a line
    again = RunCSVLogger(tmp_path / "b")
    again.rewind(position)
    for logger in (undisturbed, again):
        log(logger, range(5, 10))
    assert again.path.read_bytes() == undisturbed.path.read_bytes()


def test_progress_stands_in_every_row(tmp_path):
    logger = RunCSVLogger(tmp_path)
    logger.progress = lambda: Progress("round", 7)
    log(logger, [3])
    assert rows(logger.path)[0]["progress/round"] == "7"
