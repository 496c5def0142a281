"""A run that is killed and resumed ends as if it had never been disturbed: the same weights, the same metrics.csv."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from smallest import words

from leanlight.registry import METHODS

COMMON = [
    "--trainer.max_epochs=3",
    "--trainer.log_every_n_steps=1",
    "--exact_resume.every=3",
    "--run.wandb=disabled",
    "--run.id=a",
    "--trainer.enable_progress_bar=false",
]

CASES = dict.fromkeys(METHODS)
ATARI = {"decisions_per_epoch": 200, "replay_start": 200, "max_decisions": 60, "training_games": 2}
ATARI |= dict.fromkeys(("eval_episodes", "test_episodes"), 2)
CASES["dsqn on two Atari games side by side"] = [
    "--config=dsqn/road_runner_small",
    *(f"--data.init_args.{name}={value}" for name, value in ATARI.items()),
]


def arguments(case):
    return CASES[case] or words(case)


def launch(folder, *arguments):
    command = [sys.executable, "-m", "leanlight", "fit", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def finish(process):
    _, error = process.communicate(timeout=280)
    assert process.returncode == 0, error.decode()[-3000:]


def run_dir(folder):
    (found,) = folder.glob("runs/*/*/a")
    return found


def rows(folder):
    found = list(folder.glob("runs/*/*/a/metrics.csv"))
    return found[0].read_bytes().count(b"\n") if found else 0


def kill_when_written(folder, case, count):
    """Start a run, kill it without warning once metrics.csv has `count` lines and a checkpoint is there."""
    process = launch(folder, *arguments(case), *COMMON)
    while process.poll() is None:
        if rows(folder) >= count and list(folder.glob("runs/*/*/a/checkpoints/last.ckpt")):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stderr.close()
            return
        time.sleep(0.002)
    raise AssertionError(f"the run ended before line {count}: {process.stderr.read().decode()[-2000:]}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Weights and metrics.csv of an undisturbed run, one a case."""
    done = {}

    def get(case):
        if case not in done:
            folder = tmp_path_factory.mktemp("undisturbed")
            finish(launch(folder, *arguments(case), *COMMON))
            found = run_dir(folder)
            checkpoint = torch.load(found / "checkpoints" / "last.ckpt", weights_only=True)
            done[case] = checkpoint, (found / "metrics.csv").read_bytes()
        return done[case]

    return get


def check(folder, case, undisturbed, lines):
    expected, metrics = undisturbed(case)
    kill_when_written(folder, case, lines)
    finish(launch(folder, "--resume", run_dir(folder)))
    found = run_dir(folder)
    resumed = torch.load(found / "checkpoints" / "last.ckpt", weights_only=True)
    assert resumed["global_step"] == expected["global_step"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), f"{name} after a kill at line {lines}"
    told, again = (dict(saved.get("dynamics", {})) for saved in (expected, resumed))  # what training told of its items
    assert told.pop("data", "") == again.pop("data", "")
    torch.testing.assert_close(again, told, rtol=0, atol=0, equal_nan=True)
    assert (found / "metrics.csv").read_bytes() == metrics, f"metrics.csv after a kill at line {lines}"


def test_a_killed_classifier_resumes_exactly(tmp_path, undisturbed):
    lines = undisturbed("classifier")[1].count(b"\n")
    check(tmp_path, "classifier", undisturbed, lines // 2)


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(5))
@pytest.mark.parametrize("case", list(CASES))
def test_a_run_killed_at_a_random_moment_resumes_exactly(tmp_path, undisturbed, case, moment):
    lines = undisturbed(case)[1].count(b"\n")
    check(tmp_path, case, undisturbed, random.Random(f"{case} {moment}").randint(6, lines - 2))


@pytest.mark.parametrize("case", ["classifier", pytest.param("sfedca", marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path, undisturbed, case):
    """Of the federation: inside a round, some of whose clients have trained."""
    expected, metrics = undisturbed(case)
    process = launch(tmp_path, *arguments(case), *COMMON)
    while rows(tmp_path) < metrics.count(b"\n") // 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"--resume" in error
    finish(launch(tmp_path, "--resume", run_dir(tmp_path)))
    resumed = torch.load(run_dir(tmp_path) / "checkpoints" / "last.ckpt", weights_only=True)
    for name, value in expected["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    assert (run_dir(tmp_path) / "metrics.csv").read_bytes() == metrics
