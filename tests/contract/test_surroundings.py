"""Trackers that die and disks that fill up in the middle of a real run: nothing of the run is lost."""

import json
import resource
import time

import pytest
import torch
from kill import finish, rows, run_dir, start
from smallest import words
from wandb_server import WandbServer

pytestmark = pytest.mark.slow

COMMON = [
    *("--trainer.max_epochs=3", "--trainer.log_every_n_steps=1", "--exact_resume.every=3", "--run.id=a"),
    *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
]
ALONE, FIT = ["--config=logger/none"], ["fit", *words("classifier"), *COMMON]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run without trackers that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(folder, *FIT, *ALONE))
    return run_dir(folder)


def assert_same(run, expected):
    """Metrics byte for byte, weights, and what the summary says."""
    assert (run / "metrics.csv").read_bytes() == (expected / "metrics.csv").read_bytes()
    weights, again = (torch.load(x / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for x in (expected, run))
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    told, again = (json.loads((x / "summary.json").read_text()) for x in (expected, run))
    assert (again["status"], again["metrics"]) == ("finished", told["metrics"])


def warnings(process):
    """Lines of warning of a process that ends well."""
    _, error = process.communicate(timeout=280)
    assert process.returncode == 0, error.decode()[-3000:]
    return [line for line in error.decode().splitlines() if line.startswith("leanlight: warning")]


def wait_for(process, condition):
    """Wait until something holds while a process runs."""
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        time.sleep(0.005)


@pytest.mark.parametrize("breaks", ["die", "fall_silent"])
def test_a_run_outlives_the_server_of_wandb(tmp_path, undisturbed, breaks):
    server = WandbServer()
    settings = {"BASE_URL": server.address, "API_KEY": "0" * 40, "FINISH_TIMEOUT": "5", "MODE": "online"}
    process = start(tmp_path, *FIT, "--run.wandb=online", **{f"WANDB_{name}": x for name, x in settings.items()})
    wait_for(process, lambda: rows(tmp_path) > 2)
    getattr(server, breaks)()
    told = warnings(process)
    assert server.asked["UpsertBucket"]
    assert_same(run_dir(tmp_path), undisturbed)
    assert len(told) == 2
    assert "no more tables and artefacts" in told[0]
    assert "later: wandb sync" in told[1]
    assert list(run_dir(tmp_path).glob("wandb/run-*/run-*.wandb"))


def test_a_run_that_a_full_disk_ended_goes_on_when_there_is_room(tmp_path, undisturbed):
    process = start(tmp_path, *FIT, *ALONE)
    wait_for(process, lambda: rows(tmp_path) > 30)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, 8192))  # room for a summary, for no checkpoint
    _, error = process.communicate(timeout=280)
    run = run_dir(tmp_path)
    assert process.returncode == 1
    (line,) = error.decode().splitlines()
    assert line.startswith("leanlight: error: cannot write (the disk is full, or a limit on sizes is reached)")
    assert line.endswith(f"go on with: leanlight fit --resume {run}")
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    assert not list(run.rglob("*.part"))
    finish(start(tmp_path, "fit", "--resume", run))
    assert_same(run, undisturbed)
