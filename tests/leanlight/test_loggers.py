"""The CSV file of a run: appended, cut back on resume, never half a line."""

import csv
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from leanlight.contracts import Progress, ResumableLogger
from leanlight.loggers import RunCSVLogger, RunMLFlowLogger
from leanlight.tracking import open_logger


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


@pytest.mark.slow
def test_a_server_of_mlflow_that_is_gone_is_asked_three_times(tmp_path, monkeypatch, capsys):
    pytest.importorskip("mlflow", reason="needs the extra tracking")
    asked = []

    class Gone(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)  # and the connection is closed without an answer

        do_POST = do_GET

        def log_message(self, *_):
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Gone)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("MAX_RETRIES", "TIMEOUT"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "")  # so that what the code sets is taken back
        monkeypatch.delenv(f"MLFLOW_HTTP_REQUEST_{name}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    assert open_logger("MLflow", lambda: RunMLFlowLogger(tmp_path, "project", "name")) is None
    server.shutdown()
    server.server_close()
    assert len(asked) == 3
    assert capsys.readouterr().err.count("leanlight: warning: MLflow is left out of this run") == 1
