"""One writer a run folder, whatever became of the writers before."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from leanlight.contracts import UserError
from leanlight.locks import RunLock, locked


@pytest.fixture
def run(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def leave(run, **owner):
    """What somebody left who did not release the lock."""
    path = RunLock(run).path
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "job": None, "since": "yesterday", **owner}))
    return path


def test_a_second_writer_is_refused_in_a_line_that_names_the_first(run):
    with locked(run), pytest.raises(UserError, match=rf"process {os.getpid()}, since 2.*; wait for it"), locked(run):
        pass


def test_a_released_lock_leaves_nothing_and_can_be_taken_again(run):
    for _ in range(2):
        with locked(run):
            assert RunLock(run).path.is_file()
        assert list(run.parent.iterdir()) == [run]


def test_a_folder_has_one_lock_by_whatever_path_it_is_called(run, monkeypatch):
    (run.parent / "link").symlink_to(run)
    monkeypatch.chdir(run)
    with locked(run.parent / "link"), pytest.raises(UserError), locked(run / ".." / "run"):
        pass


def test_what_a_killed_process_left_is_taken_over(run):
    child = os.fork()
    if child == 0:
        RunLock(run).acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert RunLock(run).owner()["pid"] == child
    with locked(run):
        assert RunLock(run).owner()["pid"] == os.getpid()


def test_a_lock_of_another_machine_is_refused_until_it_is_removed(run):
    path = leave(run)
    with pytest.raises(UserError, match=f"process 1 on elsewhere, since yesterday.*remove {path}"), locked(run):
        pass
    with pytest.raises(UserError, match="on elsewhere"), locked(run, waiting=lambda: None):
        pass
    path.unlink()
    with locked(run):
        pass


@pytest.mark.parametrize(("job", "free"), [("7", True), ("8", False)])
def test_a_requeued_job_takes_over_what_it_left_on_another_node(run, monkeypatch, job, free):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    leave(run, job=job)
    lock = RunLock(run)
    assert lock.acquire() == free
    if free:
        lock.release()


def test_without_flock_the_number_of_a_living_process_refuses_and_that_of_a_dead_one_does_not(run, monkeypatch):
    def unknown(*args):
        raise OSError("flock: not supported")

    monkeypatch.setattr("fcntl.flock", unknown)
    dead = subprocess.Popen([sys.executable, "-S", "-c", ""])
    dead.wait()
    for pid, free in ((os.getpid(), False), (dead.pid, True)):
        leave(run, host=socket.gethostname(), pid=pid)
        assert RunLock(run).acquire() == free


def test_a_child_works_under_the_lock_that_was_taken_for_it(run, monkeypatch):
    parent, other = RunLock(run), RunLock(run)
    assert parent.acquire()
    (name,) = parent.for_child()
    monkeypatch.setenv(name, f"{os.dup(parent.fd)}:{parent.path}")  # as a child has it
    with locked(run):
        assert not other.acquire()
    assert not other.acquire(), "the parent has it still"
    parent.release()
    assert other.acquire()
    other.release()
