"""A run that is killed and resumed ends as if it had never been disturbed: weights, metrics.csv, exports, summary."""

import json
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from kill import finish, kill_when, rows, run_dir, start
from smallest import words

from leanlight.predictions import load_predictions
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


def has(folder, *patterns):
    """Whether the run's folder holds something of each pattern."""
    return all(any(folder.glob(f"runs/*/*/a/{pattern}")) for pattern in patterns)


class End(NamedTuple):
    """What counts of a run."""

    folder: Path
    checkpoint: dict
    metrics: bytes
    exports: dict
    told: dict

    @property
    def lines(self):
        return self.metrics.count(b"\n")


def read(folder):
    run = run_dir(folder)
    exported = run / "artifacts" / "export"
    summary = json.loads((run / "summary.json").read_text())
    return End(
        run,
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True),
        (run / "metrics.csv").read_bytes(),
        {path.relative_to(exported): path.read_bytes() for path in exported.rglob("*") if path.is_file()},
        {key: summary[key] for key in ("status", "metrics", "config_hash", "samples_seen", "data", "changes")},
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The end of an undisturbed run, one a case."""
    done = {}

    def get(case):
        if case not in done:
            folder = tmp_path_factory.mktemp("undisturbed")
            finish(start(folder, "fit", *arguments(case), *COMMON))
            done[case] = read(folder)
        return done[case]

    return get


def assert_same(found, expected):
    assert found.checkpoint["global_step"] == expected.checkpoint["global_step"]
    for name, value in expected.checkpoint["state_dict"].items():
        assert torch.equal(value, found.checkpoint["state_dict"][name]), name
    # what training told of its items
    told, again = (dict(end.checkpoint.get("dynamics", {})) for end in (expected, found))
    assert told.pop("data", "") == again.pop("data", "")
    torch.testing.assert_close(again, told, rtol=0, atol=0, equal_nan=True)
    assert found.metrics == expected.metrics
    assert found.exports == expected.exports
    assert found.told == expected.told


def check(folder, expected, case, *moments):
    """Start a run, kill it at the first moment, go on, kill it at the next, …; go on to the end."""
    command = [*arguments(case), *COMMON]
    for moment in moments:
        begin = time.time()
        kill_when(start(folder, "fit", *command), folder, partial(moment, folder, begin))
        command = ["--resume", run_dir(folder)]
    finish(start(folder, "fit", *command))
    assert_same(read(folder), expected)


# A moment is asked, again and again, whether it has come in the run in `folder` since the process began.


def row(number):
    """metrics.csv has so many lines, and a checkpoint is there."""
    return lambda folder, begin: rows(folder) >= number and has(folder, "checkpoints/last.ckpt")


def writing(folder, begin):
    return has(folder, "checkpoints/previous.ckpt", "checkpoints/.last.ckpt.*.part")


def exporting(folder, begin):
    return has(folder, "artifacts/export")


def in_test(folder, begin):
    """Some time after a process that found nothing left to train has begun its test: it then says that it runs."""
    if (run_dir(folder) / "summary.json").stat().st_mtime <= begin:
        return False
    time.sleep(random.uniform(0, 0.3))
    return True


def test_a_killed_classifier_resumes_exactly(tmp_path, undisturbed):
    expected = undisturbed("classifier")
    check(tmp_path, expected, "classifier", row(expected.lines // 2))


@pytest.mark.slow
@pytest.mark.parametrize("moment", range(5))
@pytest.mark.parametrize("case", list(CASES))
def test_a_run_killed_at_a_random_moment_resumes_exactly(tmp_path, undisturbed, case, moment):
    expected = undisturbed(case)
    check(tmp_path, expected, case, row(random.Random(f"{case} {moment}").randint(6, expected.lines - 2)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", list(CASES))
def test_a_run_killed_again_and_again_resumes_exactly(tmp_path, undisturbed, case):
    """Twice in training, while a checkpoint is written, while it exports, and in its test."""
    expected = undisturbed(case)
    first, second = sorted(random.Random(case).choices(range(min(6, expected.lines - 2), expected.lines - 1), k=2))
    check(tmp_path, expected, case, row(first), row(second), writing, exporting, in_test)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_a_killed_prediction_resumes_exactly(tmp_path, undisturbed, case):
    run = shutil.copytree(undisturbed(case).folder, tmp_path / "run")
    options = ["--run.wandb=disabled", "--predictions.piece_items=16", "--trainer.enable_progress_bar=false"]
    process = start(tmp_path, "predict", "--from", run, *options)
    _, error = process.communicate(timeout=280)
    if process.returncode == 2:
        assert error.count(b"leanlight: error: ") == 1
        assert b"predict" in error
        return
    assert process.returncode == 0, error.decode()[-2000:]
    whole = (run / "predict").rename(tmp_path / "whole")
    process = start(tmp_path, "predict", "--from", run, *options)
    kill_when(process, tmp_path, lambda: any(run.glob("predict/artifacts/predictions/*_0.json")))
    finish(start(tmp_path, "predict", "--resume", run / "predict"))
    expected, found = load_predictions(whole), load_predictions(run / "predict")
    assert expected.keys() == found.keys()
    torch.testing.assert_close(
        {name: value for name, value in found.items() if isinstance(value, torch.Tensor)},
        {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)},
        rtol=0,
        atol=0,
        equal_nan=True,
    )
    assert all(found[name] == value for name, value in expected.items() if not isinstance(value, torch.Tensor))


@pytest.mark.parametrize("case", ["classifier", pytest.param("sfedca", marks=pytest.mark.slow)])
def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path, undisturbed, case):
    """Of the federation: inside a round, some of whose clients have trained."""
    expected = undisturbed(case)
    process = start(tmp_path, "fit", *arguments(case), *COMMON)
    while rows(tmp_path) < expected.lines // 2:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"--resume" in error
    finish(start(tmp_path, "fit", "--resume", run_dir(tmp_path)))
    assert_same(read(tmp_path), expected)


PIPELINES = [name for info in METHODS.values() for name in info.pipelines if "_small" in name]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_killed_in_each_of_its_stages_ends_like_an_undisturbed_one(tmp_path, name):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    finish(start(whole, "run", name, "--id=p"), timeout=1800)
    expected = stages(whole)
    for stage in expected:
        condition = partial(is_running, killed, stage, random.uniform(0, 5))
        kill_when(start(killed, "run", name, "--id=p"), killed, condition)
    finish(start(killed, "run", name, "--id=p"), timeout=1800)
    assert stages(killed) == expected


def stages(folder):
    """Name → metrics of the stages of a pipeline, but for times."""
    listed = json.loads((folder / "runs" / "pipelines" / "p" / "summary.json").read_text())["stages"]
    summaries = {stage["name"]: folder / "runs" / stage["run_dir"] / "summary.json" for stage in listed}
    metrics = {name: json.loads(path.read_text())["metrics"] for name, path in summaries.items()}
    times = ("_s", "seconds")
    return {stage: {k: v for k, v in told.items() if not k.endswith(times)} for stage, told in metrics.items()}


def is_running(folder, stage, seconds):
    """Whether a stage has run for so long."""
    for path in folder.glob(f"runs/*/*/*-{stage}-*/summary.json"):
        if json.loads(path.read_text())["status"] == "running":
            time.sleep(seconds)
            return True
    return False
