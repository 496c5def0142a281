"""Runs that are forked behave as those that Python starts anew."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from leanlight import __version__
from leanlight.locks import RunLock
from leanlight.results.forker import Forked, Forker
from leanlight.results.launch import command, environment, signal_group, stop


@pytest.fixture(scope="module")
def forker():
    forker = Forker(environment())
    yield forker
    forker.close()


@pytest.fixture
def start(forker: Forker, tmp_path: Path):
    """Starts a command, with a log and the lock of a run."""

    def start(*arguments: str) -> Forked:
        lock = RunLock(tmp_path / "run")
        assert lock.acquire()
        with open(tmp_path / "log", "wb") as log:
            child = forker.start(arguments, log.fileno(), lock)
        os.close(lock.fd)  # as if this process had died
        return child

    return start


def locked(folder: Path) -> bool:
    lock = RunLock(folder / "run")
    if free := lock.acquire():
        lock.release()
    return not free


def test_output_and_exit_codes_are_those_of_the_program(start, tmp_path: Path):
    assert start("--version").wait() == 0
    assert (tmp_path / "log").read_text().strip() == __version__
    child = start("fitt")
    assert child.wait() == child.poll() == child.returncode == 2
    assert "command 'fitt' is unknown" in (tmp_path / "log").read_text()


def test_a_run_holds_its_lock_and_is_stopped_by_signals(start, tmp_path: Path):
    fifo = tmp_path / "never"
    os.mkfifo(fifo)
    child = start("audit", "--data", str(fifo), "--format", "jsonl", "--judge", "keyword")  # reads until killed
    assert child.poll() is None
    assert os.getpgid(child.pid) == child.pid
    assert locked(tmp_path)
    signal_group(child, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not locked(tmp_path)
    stop([child])  # has ended already


def test_an_end_of_the_process_that_forks_is_said(tmp_path: Path):
    forker = Forker({**environment(), "PYTHONPATH": "", "PYTHONHOME": "nowhere"})  # a Python that cannot start
    lock = RunLock(tmp_path / "run")
    assert lock.acquire()
    with open(tmp_path / "log", "wb") as log, pytest.raises(ChildProcessError, match="has ended"):
        forker.start(["--version"], log.fileno(), lock)
    lock.release()
    forker.close()


@pytest.mark.slow
def test_a_forked_training_is_that_of_a_fresh_process(start, tmp_path: Path):
    def words(name: str) -> list[str]:
        limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--run.test", "none"]
        return [
            "fit",
            "--config",
            "classifier/digits_small",
            "--trainer.default_root_dir",
            str(tmp_path),
            "--run.id",
            name,
            *limits,
        ]

    assert start(*words("forked")).wait() == 0, (tmp_path / "log").read_text()
    subprocess.run(command(*words("fresh")), env=environment(), check=True)
    forked, fresh = (tmp_path / "classifier/digits" / name / "metrics.csv" for name in ("forked", "fresh"))
    assert forked.read_bytes() == fresh.read_bytes()
