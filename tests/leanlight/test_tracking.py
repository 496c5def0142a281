"""W&B begins online, else offline, else not at all, and never stops the run."""

import json
import os
import signal
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from wandb.apis.public import Api
from wandb_file import records
from wandb_server import WandbServer

from callbacks import sending
from callbacks.pictures import render
from callbacks.sending import send_media
from leanlight import tracking
from leanlight.contracts import Heatmap, MissingExtraError
from leanlight.loggers import RunWandbLogger

NAMES = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", *tracking._PATIENCE, *tracking._HOMES)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that what the code sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def maker(*fails):
    """Makes loggers that fail to begin where `offline` is among `fails`."""
    made = []

    class Tracker(Logger):
        name, version = "tracker", "0"

        def __init__(self, offline):
            super().__init__()
            self.offline = offline
            made.append(offline)

        @property
        def experiment(self):
            if self.offline in fails:
                raise ConnectionError("no such host\nand a stack of reasons")
            return object()

        def log_metrics(self, *_):
            """None."""

        log_hyperparams = log_metrics

    return Tracker, made


@pytest.mark.parametrize(
    ("mode", "fails", "made", "told"),
    [
        ("online", (), [False], ""),
        ("offline", (), [True], ""),
        ("online", (False,), [False, True], "is kept offline; later: wandb sync"),
        ("online", (False, True), [False, True], "no such host; offline: ConnectionError: no such host)"),
        ("offline", (True,), [True], "left out of this run (ConnectionError: no such host)"),
        ("auto", (True,), [True], "left out of this run (ConnectionError: no such host)"),
    ],
)
def test_wandb_falls_back_with_one_line(tmp_path, capsys, mode, fails, made, told):
    make, tried = maker(*fails)
    logger = tracking.open_wandb(mode, tmp_path, make)
    err = capsys.readouterr().err
    assert tried == made
    assert err.count("\n") == bool(told)
    assert told in err
    assert (logger is None) == (tried[-1] in fails)


def test_a_logger_that_cannot_begin_is_left_out(capsys):
    make, _ = maker(True)
    assert tracking.open_logger("MLflow", lambda: make(True)) is None
    assert capsys.readouterr().err.startswith("leanlight: warning: MLflow is left out of this run")


def test_a_missing_package_is_the_users_to_install():
    def make():
        raise ModuleNotFoundError("no", name="mlflow")

    with pytest.raises(MissingExtraError, match=r"'mlflow'.*leanlight\[tracking\]"):
        tracking.open_logger("MLflow", make)


def test_a_home_that_cannot_be_written_is_replaced_by_the_run_folder(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setenv("WANDB_CACHE_DIR", "mine")
    tracking.prepare_wandb(tmp_path / "run")
    assert tracking.os.environ["WANDB_DATA_DIR"] == str(tmp_path / "run/wandb/data")
    assert tracking.os.environ["WANDB_CACHE_DIR"] == "mine"


def test_a_key_is_found_in_netrc_for_the_server_in_use(tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine wandb.example.org\n  login user\n  password x\n")
    assert tracking.is_offline("auto")
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not tracking.is_offline("auto")


@pytest.fixture
def refusing():
    """Address of a server that takes no key."""

    class Refuse(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(401)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_):
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_wrong_key_leaves_an_offline_copy(tmp_path, monkeypatch, capsys, refusing):
    monkeypatch.setenv("WANDB_BASE_URL", refusing)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    logger = tracking.open_wandb(
        "online", tmp_path, lambda offline: RunWandbLogger(save_dir=tmp_path, offline=offline, project="p", id="taken")
    )
    logger.log_metrics({"val/accuracy": 0.5}, 1)
    tracking.close_wandb([logger], 0)
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert sum("leanlight: warning" in line for line in capsys.readouterr().err.splitlines()) == 1


@pytest.fixture
def online(tmp_path, monkeypatch):
    """A run that has begun online and sent a row and a table, its folder, and the server that has them."""
    server = WandbServer()
    settings = {"BASE_URL": server.address, "API_KEY": "0" * 40, "ERROR_REPORTING": "false", "DISABLE_CODE": "true"}
    patience = {"HTTP_TIMEOUT": "1", "FINISH_TIMEOUT": "1"}
    for name, value in {**settings, **patience}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setattr(Api, "_HTTP_TIMEOUT", 1)  # read from the environment when it was imported
    monkeypatch.setattr(sending, "_LONGEST_WAIT", 0.5)
    tracking._forget_wandb()  # of other tests, whose settings it keeps
    make = partial(RunWandbLogger, save_dir=tmp_path, project="p", id="one")
    logger = tracking.open_wandb("online", tmp_path, lambda offline: make(offline=offline))
    yield logger, tmp_path, server
    tracking._forget_wandb()


def send(logger, folder, step):
    """A row, a picture and the table behind it."""
    logger.log_metrics({"val/accuracy": step}, step)
    item = Heatmap(torch.eye(2), "predicted", "true")
    send_media([logger], "val", {"heat": item}, {"heat": render(item, folder / "heat", "heat")}, step)


def own_process():
    """Id of the process that W&B has started for this one."""
    children = Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text().split()
    (found,) = [pid for pid in children if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return int(found)


@pytest.mark.parametrize("breaks", ["fall_silent", "die"])
def test_a_connection_that_is_lost_costs_a_wait_and_leaves_every_row_for_later(online, capsys, breaks):
    logger, folder, server = online
    send(logger, folder, 1)
    for _ in range(200):  # W&B's own process asks in its own time
        if server.asked["CreateArtifact"]:
            break
        time.sleep(0.1)
    assert server.asked["CreateArtifact"]
    getattr(server, breaks)()
    for step in (2, 3):
        send(logger, folder, step)
    tracking.close_wandb([logger], 0)
    tables, end = capsys.readouterr().err.splitlines()
    assert tables.startswith("leanlight: warning: W&B gets no more tables and artefacts of this run (")
    (kept,) = folder.glob("wandb/run-*")
    assert end == f"leanlight: warning: W&B has not taken everything; later: wandb sync '{kept}'"
    for _ in range(50):  # less than the 15 seconds after which W&B writes by its own default
        if (steps := accuracies(kept / "run-one.wandb")) == [1, 2, 3]:
            break
        time.sleep(0.1)
    assert steps == [1, 2, 3]


def accuracies(file):
    """Those in the rows of history that a file holds."""
    items = [item for record in records(file) for item in record.history.item]
    return [int(item.value_json) for item in items if (item.key or item.nested_key[0]) == "val/accuracy"]


def test_a_process_of_wandb_that_dies_costs_one_line(online, capsys):
    logger, folder, _ = online
    logger.log_metrics({"val/accuracy": 1}, 1)
    os.kill(own_process(), signal.SIGKILL)
    for step in (2, 3):
        send(logger, folder, step)
    tracking.close_wandb([logger], 0)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("leanlight")]
    assert len(told) == 1
    assert "W&B gets no more data of this run (Connection" in told[0]


@pytest.mark.parametrize("error", [TimeoutError("60 s"), BrokenPipeError("gone")])
def test_an_end_without_the_server_is_one_line_that_says_where_the_copy_lies(capsys, error):
    def finish(exit_code):
        raise error

    logger = object.__new__(WandbLogger)
    logger._experiment = SimpleNamespace(finish=finish, dir="/runs/a/wandb/run-1/files")
    tracking.close_wandb([logger], 0)
    assert capsys.readouterr().err.count("\n") == 1


class Told:
    """Keeps what a run of W&B is told to log and to use, instead of sending it."""

    def __init__(self):
        self.logged, self.used = [], []

    def log_artifact(self, artifact, aliases):
        self.logged.append((artifact.name, artifact.type, artifact.manifest.digest()))

    def _log_artifact(self, artifact, is_user_created, use_after_commit):
        assert use_after_commit
        self.used.append((artifact.name, artifact.type, artifact.manifest.digest()))


def finished(folder, weights, inputs=None, data="digits"):
    """A run folder with a checkpoint, and what its W&B run was told."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {experiment: base}")
    artifacts = [{"path": "checkpoints/last.ckpt", "sha256": weights, "bytes": 3}]
    facts = {"name": data, "source": str(folder), "fingerprint": "f" * 64, "counts": {"train": 4}}
    summary = {"method": "m", "dataset": data, "run_id": folder.name, "artifacts": artifacts, "data": facts}
    summary["inputs"] = dict.fromkeys(inputs or {}, "0" * 64)
    (folder / "summary.json").write_text(json.dumps(summary))
    told, given = Told(), {name: str(path) for name, path in (inputs or {}).items()}
    tracking._tell_lineage(SimpleNamespace(experiment=told), folder, given)
    return told


def test_a_student_uses_the_very_version_that_its_teacher_has_logged(tmp_path):
    teacher = finished(tmp_path / "runs/m/digits/teacher", "a" * 64)
    other = finished(tmp_path / "runs/m/digits/other", "b" * 64)
    given = {"teacher": tmp_path / "runs/m/digits/teacher/checkpoints/last.ckpt"}
    student = finished(tmp_path / "runs/m/digits/student", "c" * 64, given)
    whole = finished(tmp_path / "runs/m/digits/whole", "d" * 64, {"teacher": tmp_path / "runs/m/digits/teacher"})
    assert student.used[1:] == whole.used[1:] == teacher.logged
    assert student.used[:1] == teacher.used  # the data
    assert teacher.logged[0][0] == "m-base-run"
    assert len({told.logged[0] for told in (teacher, other, student)}) == 3


def test_who_trains_on_a_selection_uses_what_the_selection_has_logged(tmp_path):
    scorer = tmp_path / "runs/adq/digits/scorer"
    finished(scorer, "a" * 64)
    chosen = scorer / "artifacts/chosen"
    chosen.mkdir(parents=True)
    for name in ("selection.json", "selection.safetensors"):
        (chosen / name).write_text(name)
    made = tracking._selection(chosen, {"rule": "random"})
    given = {"selection": chosen / "selection.safetensors"}
    student = finished(tmp_path / "runs/m/digits/student", "c" * 64, given)
    assert student.used[1:] == [(made.name, "selection", made.manifest.digest())]


def test_an_input_of_no_run_stands_for_itself(tmp_path):
    (tmp_path / "weights.bin").touch()
    student = finished(tmp_path / "runs/m/digits/student", "c" * 64, {"weights": tmp_path / "weights.bin"})
    assert student.used[1][:2] == ("input-weights", "input")
