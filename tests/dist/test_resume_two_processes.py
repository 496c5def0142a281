"""Runs of two processes that die and go on with two or with one, that are on two nodes, and that start from a run."""

import json
import os
import shutil
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

from leanlight.predictions import load_predictions
from leanlight.registry import METHODS

pytestmark = pytest.mark.slow
COMMON = ["--trainer.max_epochs=2", "--trainer.log_every_n_steps=1", "--exact_resume.every=3", "--run.wandb=disabled"]
COMMON += ["--trainer.enable_progress_bar=false"]
NAMED = [*COMMON, "--run.id=a"]
ONE = ["--trainer.accelerator=cpu", "--trainer.strategy=auto", "--trainer.devices=1"]
TWO = ["--config=trainer/ddp", "--trainer.accelerator=cpu", "--trainer.devices=2"]
NODES = ["--config=trainer/ddp", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def has_trained(folder, least):
    found = list(folder.glob("runs/*/*/a/checkpoints/previous.ckpt"))
    return found and rows(folder) >= least


def result(folder):
    """Weights and metrics of the only run below a folder, whatever its id."""
    (run,) = folder.glob("runs/*/*/*/")
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return weights, (run / "metrics.csv").read_bytes()


def assert_equal(found, expected):
    assert all(torch.equal(value, found[0][name]) for name, value in expected[0].items())
    assert found[1] == expected[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an undisturbed run of two processes, one a method."""
    done = {}

    def get(method):
        if method not in done:
            done[method] = tmp_path_factory.mktemp("whole")
            finish(start(done[method], "fit", *words(method), *NAMED, *TWO))
        return done[method]

    return get


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


@pytest.mark.parametrize("method", ["classifier", "spike_nvpt", "hid"])
def test_a_run_one_of_whose_processes_was_killed_resumes_exactly(tmp_path, whole, method):
    process = start(tmp_path, "fit", *words(method), *NAMED, *TWO)
    other = second_rank(process)
    while not has_trained(tmp_path, 8):
        assert process.poll() is None
        time.sleep(0.001)
    os.kill(other, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    finish(start(tmp_path, "fit", "--resume", run_dir(tmp_path)))
    assert_equal(result(tmp_path), result(whole(method)))


@pytest.mark.parametrize(("before", "after"), [(TWO, ONE), (ONE, TWO)], ids=["two to one", "one to two"])
@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_goes_on_with_another_number_of_processes_and_says_that_it_is_not_exact(tmp_path, method, before, after):
    process = start(tmp_path, "fit", *words(method), *NAMED, *before)
    kill_when(process, tmp_path, lambda: has_trained(tmp_path, 6))
    process = start(tmp_path, "fit", "--resume", run_dir(tmp_path), *after)
    _, error = process.communicate(timeout=280)
    assert process.returncode == 0, error.decode()[-3000:]
    assert b"it will not be exact" in error
    assert json.loads((run_dir(tmp_path) / "summary.json").read_text())["status"] == "finished"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_two_nodes_of_torchrun_make_the_run_of_one_node_with_two_processes(tmp_path, whole):
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}"]
    command = [*TORCHRUN, *rendezvous, "-m", "leanlight", "fit", *words("classifier"), *COMMON, *NODES]
    nodes = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) for _ in range(2)]
    for node in nodes:
        finish(node)
    assert_equal(result(tmp_path), result(whole("classifier")))  # there is one folder, though none was named


def test_two_nodes_started_by_hand_make_the_run_of_one_node_with_two_processes(tmp_path, whole):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = ["fit", *words("classifier"), *NAMED, *NODES]
    for node in [start(tmp_path, *command, **place, NODE_RANK=rank) for rank in "01"]:
        finish(node)
    assert_equal(result(tmp_path), result(whole("classifier")))


def test_processes_of_torchrun_that_start_from_a_run_work_in_one_folder(tmp_path, whole):
    run = shutil.copytree(run_dir(whole("classifier")), tmp_path / "run")
    # The second process looks for a free name when the first has made its folder.
    later = (
        f"while os.environ.get('LOCAL_RANK') == '1' and not os.path.exists({str(run / 'predict')!r}): time.sleep(0.1)"
    )
    (tmp_path / "sitecustomize.py").write_text(f"import os, time\n{later}\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "leanlight", "predict", "--from", str(run), *TWO]
    finish(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}))
    (folder,) = run.glob("predict*")
    finish(start(tmp_path, "predict", "--from", run, *ONE))
    (alone,) = set(run.glob("predict*")) - {folder}
    assert torch.equal(load_predictions(folder)["index"], load_predictions(alone)["index"])
