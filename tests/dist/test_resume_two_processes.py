"""Runs of two processes that die, and go on with two, with one, or on two nodes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kill import finish, kill_when, rows, run_dir, start
from smallest import words

from leanlight.registry import METHODS

pytestmark = pytest.mark.slow
COMMON = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--exact_resume.every=3", "--run.wandb=disabled"]
COMMON += ["--run.id=a", "--trainer.enable_progress_bar=false"]
ONE = ["--trainer.accelerator=cpu", "--trainer.strategy=auto", "--trainer.devices=1"]
TWO = ["--config=trainer/ddp", "--trainer.accelerator=cpu", "--trainer.devices=2"]
CONFIG = ["--config=classifier/digits_small"]


def has_trained(folder, least):
    found = list(folder.glob("runs/*/*/a/checkpoints/previous.ckpt"))
    return found and rows(folder) >= least


def result(folder):
    run = run_dir(folder)
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"], (run / "metrics.csv").read_bytes()


def assert_equal(found, expected):
    assert all(torch.equal(value, found[0][name]) for name, value in expected[0].items())
    assert found[1] == expected[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights and metrics of an undisturbed run of two processes."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(folder, "fit", *CONFIG, *COMMON, *TWO))
    return result(folder)


def second_rank(process):
    """The other process of a launch."""
    while True:
        for child in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((child / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == process.pid and b"LOCAL_RANK=1" in (child / "environ").read_bytes().split(b"\0"):
                    return int(child.name)
            except (OSError, ValueError):
                continue
        time.sleep(0.01)


def test_a_run_one_of_whose_processes_was_killed_resumes_exactly(tmp_path, whole):
    process = start(tmp_path, "fit", *CONFIG, *COMMON, *TWO)
    other = second_rank(process)
    while not has_trained(tmp_path, 12):
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(other, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    finish(start(tmp_path, "fit", "--resume", run_dir(tmp_path)))
    assert_equal(result(tmp_path), whole)


@pytest.mark.parametrize(("before", "after"), [(TWO, ONE), (ONE, TWO)], ids=["two to one", "one to two"])
@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_goes_on_with_another_number_of_processes_and_says_that_it_is_not_exact(tmp_path, method, before, after):
    process = start(tmp_path, "fit", *words(method), *COMMON, *before)
    kill_when(process, tmp_path, lambda: has_trained(tmp_path, 6))
    process = start(tmp_path, "fit", "--resume", run_dir(tmp_path), *after)
    _, error = process.communicate(timeout=280)
    assert process.returncode == 0, error.decode()[-3000:]
    assert b"it will not be exact" in error
    assert json.loads((run_dir(tmp_path) / "summary.json").read_text())["status"] == "finished"


def test_two_nodes_make_the_run_of_one_node_with_two_processes(tmp_path, whole):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={address}"]
    command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "-m", "leanlight", "fit"]
    options = [*CONFIG, *COMMON, "--config=trainer/ddp", "--trainer.accelerator=cpu"]
    options += ["--trainer.devices=1", "--trainer.num_nodes=2"]
    nodes = [subprocess.Popen([*command, *options], cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    for node in nodes:
        finish(node)
    assert_equal(result(tmp_path), whole)
