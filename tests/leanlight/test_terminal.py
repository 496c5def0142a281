"""Closed pipes, full disks, poor encodings, endless small files: none of them ends a run or hangs it; what is shown."""

import errno
import io
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from leanlight import runs
from leanlight.contracts import UserError
from leanlight.invocation import read_config
from leanlight.messages import disk_problem, quiet_lightning
from leanlight.results.reading import read_mapping
from leanlight.terminal import EnduringStream, enduring_output


def test_a_reader_that_went_away_is_not_noticed():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        stream = EnduringStream(file)
        for _ in range(3):
            print("x" * 10_000, file=stream, flush=True)


def test_output_that_was_closed_from_the_start_is_nowhere(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with enduring_output():
        assert not sys.stdout.isatty()
        print("lost", flush=True)
    assert sys.stdout is None


def test_what_an_encoding_lacks_is_escaped(monkeypatch):
    kept = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(kept, encoding="ascii"))
    with enduring_output():
        print("Größe ± 1")
    assert kept.getvalue() == b"Gr\\xf6\\xdfe \\xb1 1\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has this device")
def test_commands_survive_a_full_log_and_the_c_locale():
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "20"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "leanlight", "methods", "esvae"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


def full_disk(tmp_path):
    with open("/dev/full", "w") as file:
        file.write("x")
        file.flush()


def full_disk_of_torch(tmp_path):
    torch.save(torch.zeros(100_000), "/dev/full")


def wrapped(tmp_path):
    try:
        raise OSError(errno.EDQUOT, "Disk quota exceeded", "weights")
    except OSError as error:
        raise RuntimeError("could not save") from error


@pytest.mark.parametrize("cause", [full_disk, full_disk_of_torch, wrapped])
def test_a_full_disk_is_recognised_whoever_reports_it(tmp_path, cause):
    with pytest.raises((OSError, RuntimeError)) as caught:
        cause(tmp_path)
    assert disk_problem(caught.value).startswith("cannot write (")


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file"), ValueError("x"), UserError("x")])
def test_other_errors_are_not_the_disks(error):
    assert disk_problem(error) is None


def test_a_summary_on_a_full_disk_still_says_that_the_run_failed(tmp_path, monkeypatch):
    begun = {"status": "running", "error": None, "code_files": ["lit_modules/a.py"] * 40, "seed": 3}
    runs.write_summary(tmp_path, begun)
    size = (tmp_path / "summary.json").stat().st_size

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(runs, "atomic_write", full)
    runs.write_summary(tmp_path, {**begun, "status": "failed", "error": "OSError: " + "long " * 500})
    after = json.loads((tmp_path / "summary.json").read_text())
    assert (after["status"], after["seed"]) == ("failed", 3)
    assert after["error"].startswith("OSError")
    assert (tmp_path / "summary.json").stat().st_size < size
    with pytest.raises(OSError, match="No space"):
        runs.write_summary(tmp_path, {**begun, "status": "finished"})


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))


@pytest.mark.parametrize("read", [read_config, read_mapping])
@pytest.mark.parametrize(("text", "told"), [(BOMB, "aliases"), ("a: " + "[" * 1200, "not valid YAML")])
def test_yaml_that_explodes_is_refused_at_once(tmp_path, read, text, told):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=told) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_aliases_as_such_are_fine(tmp_path):
    path = tmp_path / "größe mit Leerzeichen.yaml"
    path.write_text("a: &a {b: 1}\nc: *a\n", encoding="utf-8")
    assert read_config(path) == {"a": {"b": 1}, "c": {"b": 1}}


def test_a_clock_that_was_set_back_takes_no_folder_twice(tmp_path, monkeypatch):
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    class Clock:
        @staticmethod
        def now():
            return runs_datetime(2020, 1, 1)

    runs_datetime = runs.datetime
    monkeypatch.setattr(runs, "datetime", Clock)
    names = []
    for _ in range(3):
        names.append(runs.new_run_id("a" * 64, tmp_path))
        (tmp_path / names[-1]).mkdir()
    assert names == ["20200101-000000-aaaaaa", "20200101-000000-aaaaaa-2", "20200101-000000-aaaaaa-3"]


def test_lightning_is_quiet_and_what_modules_say_is_shown(monkeypatch):
    logger, said = logging.getLogger("lightning.pytorch.utilities.rank_zero"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    monkeypatch.setattr(logger, "filters", [])  # another test may have made it quiet
    monkeypatch.setattr(logger, "handlers", [handler])
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        Trainer(accelerator="cpu", logger=False)
        assert any("GPU available" in line for line in said)
        said.clear()
        quiet_lightning()
        Trainer(accelerator="cpu", logger=False)
        rank_zero_info("12 of 100 weights train")
        assert said == ["12 of 100 weights train"]
    finally:
        logger.setLevel(level)
