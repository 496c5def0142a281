"""Sweeps: trials are stand-ins but in the slow tests."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest
import yaml

pytest.importorskip("optuna")
import fake_sweep

from leanlight.__main__ import main

SUPPORT = Path(fake_sweep.__file__).parent
BASE = {
    "name": "search",
    "command": ["leanlight", "fit", "--config", "fake", "${args}"],
    "method": "grid",
    "metric": {"name": "val/accuracy", "goal": "maximize"},
}
VALUES = {"value": {"values": [0.2, 0.7, 0.4]}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, where `leanlight sweep` runs stand-ins."""
    fake_sweep.stand_in(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT.parent.parent), str(SUPPORT)]))
    return tmp_path


def opens(descriptor, path):
    try:
        return os.readlink(descriptor) == str(path)
    except OSError:
        return False


def write(folder, **changes):
    (folder / "s.yaml").write_text(yaml.safe_dump({**BASE, **changes}, sort_keys=False))


def sweep(*words):
    return main(["sweep", "s.yaml", *words])


def started(folder):
    """What was typed for each trial that a process began with."""
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def result(folder):
    return json.loads((folder / "runs/sweeps/search/sweep.json").read_text())


def outcome(folder):
    """Settings, state and value of each trial."""
    return [(trial["parameters"], trial["state"], trial["value"]) for trial in result(folder)["trials"]]


def test_a_grid_covers_the_product_once_in_the_order_of_the_file(folder):
    write(folder, parameters={"value": {"values": [0.2, 0.7]}, "b": {"min": 1, "max": 3}, "c": {"value": "x"}})
    assert sweep("--jobs=2") == 0
    settings = [trial["parameters"] for trial in result(folder)["trials"]]
    assert settings == [{"value": a, "b": b, "c": "x"} for a, b in product([0.2, 0.7], [1, 2, 3])]
    assert len(started(folder)) == 6
    assert sweep() == 0
    assert len(started(folder)) == 6


def test_a_trial_is_what_the_file_says_and_stays_offline(folder):
    command = ["${env}", "python", "-m", "${program}", "fit", "--config", "fake", "--config", "logger/wandb_online"]
    nested = {"parameters": {"lr": {"value": 1e-4}, "deep": {"parameters": {"on": {"value": True}}}}}
    write(folder, command=[*command, "--a=1", "${args}"], parameters={"value": {"value": 0.5}, "m.net": nested})
    assert sweep("--b=2") == 0
    (words,) = started(folder)
    assert words[:4] == ["--config=fake", "--a=1", "--b=2", "--value=0.5"]
    assert words[4:7] == ["--m.net.lr=0.0001", "--m.net.deep.on=true", "--run.wandb=offline"]
    write(folder, name="online", parameters=VALUES)
    assert sweep("--run.wandb=online", "--trials=1") == 0
    assert "--run.wandb=offline" not in started(folder)[-1]


def test_files_name_the_best_trial_and_the_command_that_runs_it_again(folder, capsys):
    write(folder, parameters={**VALUES, "epochs": {"value": 3}})
    assert sweep() == 0
    best = result(folder)["best"]
    assert (best["number"], best["value"], best["parameters"]["value"]) == (1, 0.72, 0.7)
    assert best["command"] == "leanlight fit --config=fake --value=0.7 --epochs=3 --run.wandb=offline"
    shown = capsys.readouterr().out
    assert best["command"] in shown
    assert "validation data" in shown
    assert "validation data" in result(folder)["note"]
    with open(folder / "runs/sweeps/search/sweep.csv", newline="") as file:
        assert [float(row["val/accuracy"]) for row in csv.DictReader(file)] == pytest.approx([0.22, 0.72, 0.42])
    assert (folder / "runs/sweeps/search/sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "runs" / best["run"] / "metrics.csv").is_file()


def test_less_is_better_where_the_goal_says_so(folder):
    write(folder, metric={"name": "val/loss", "goal": "minimize"}, parameters=VALUES)
    assert sweep() == 0
    assert result(folder)["best"]["parameters"] == {"value": 0.7}


@pytest.mark.parametrize("orphan", [False, True], ids=["killed with it", "outlives it"])
def test_a_killed_sweep_goes_on_with_the_interrupted_trial_and_ends_as_if_it_had_not_been(folder, orphan):
    drawn = {"value": {"min": 0.1, "max": 0.9}, "epochs": {"value": 5}, "wait": {"value": 0.15}}
    write(folder, method="random", run_cap=3, parameters=drawn)
    process = subprocess.Popen([sys.executable, fake_sweep.__file__, "sweep", "s.yaml"], start_new_session=True)

    def rows():
        return [path.read_text().count("\n") for path in sorted(folder.glob("runs/fake/made/search-001-*/metrics.csv"))]

    while not (rows() and rows()[0] > 2):  # in mid of the second trial
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    if not orphan:
        (lock,) = folder.glob("runs/fake/made/.search-001-*.lock")
        child = next(int(path.parts[2]) for path in Path("/proc").glob("[0-9]*/fd/*") if opens(path, lock))
        os.kill(child, signal.SIGKILL)
    kept = [path.stat().st_mtime_ns for path in folder.glob("runs/fake/made/search-000-*/metrics.csv")]
    assert sweep() == 0
    assert kept == [path.stat().st_mtime_ns for path in folder.glob("runs/fake/made/search-000-*/metrics.csv")]
    resumed = [words for words in started(folder) if words[0] == "--resume"]
    (run,) = folder.glob("runs/fake/made/search-001-*")
    assert resumed == ([] if orphan else [["--resume", str(run.relative_to(folder))]])
    assert len(started(folder)) == 3 + len(resumed)
    before = outcome(folder)
    write(folder, name="other", method="random", run_cap=3, parameters=drawn)
    assert sweep("--wait=0") == 0
    assert [(p["value"], s, v) for p, s, v in before] == [
        (trial["parameters"]["value"], trial["state"], trial["value"])
        for trial in json.loads((folder / "runs/sweeps/other/sweep.json").read_text())["trials"]
    ]


def test_an_interrupted_sweep_stops_its_trials_cleanly(folder):
    write(folder, parameters={**VALUES, "epochs": {"value": 100}, "wait": {"value": 0.2}})
    process = subprocess.Popen([sys.executable, fake_sweep.__file__, "sweep", "s.yaml"], stderr=subprocess.PIPE)
    while not list(folder.glob("runs/fake/made/search-000-*/summary.json")):
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert "interrupted" in process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    (summary,) = folder.glob("runs/fake/made/search-*/summary.json")
    assert json.loads(summary.read_text())["status"] == "interrupted"


def test_pruning_stops_a_trial_that_is_behind_and_keeps_what_leads(folder):
    write(
        folder,
        early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2},
        parameters={"value": {"values": [0.7, 0.1, 0.8]}, "epochs": {"value": 40}, "wait": {"value": 0.05}},
    )
    assert sweep() == 0
    states = [state for _, state, _ in outcome(folder)]
    assert states == ["finished", "stopped", "finished"]
    (stopped,) = folder.glob("runs/fake/made/search-001-*")
    assert json.loads((stopped / "summary.json").read_text())["status"] == "interrupted"
    assert 2 < (stopped / "metrics.csv").read_text().count("\n") < 41
    assert sweep() == 0
    assert len(started(folder)) == 3


def test_a_diverged_trial_has_ended_and_a_failed_one_is_tried_again_by_the_next_command(folder, capsys):
    write(folder, parameters={**VALUES, "diverge": {"value": 0.7}, "fail": {"value": 0.4}})
    assert sweep() == 1
    assert [state for _, state, _ in outcome(folder)] == ["finished", "failed", "unfinished"]
    assert "boom: the reason" in capsys.readouterr().out
    assert sweep() == 0
    assert [state for _, state, _ in outcome(folder)] == ["finished", "failed", "finished"]
    assert [words[0] for words in started(folder)].count("--resume") == 1


def test_no_new_trial_starts_after_three_that_failed(folder):
    command = ["leanlight", "fit", "--config", "fake", "--value=1", "--fail=1", "${args}"]
    write(folder, command=command, parameters={"a": {"values": [1, 2, 3, 4, 5]}})
    assert sweep() == 1
    assert len(started(folder)) == 3


def test_more_trials_go_on_where_the_sweep_ended(folder):
    write(folder, method="bayes", run_cap=2, parameters={"value": {"min": 0.1, "max": 0.9}})
    assert sweep() == 0
    before = outcome(folder)
    assert sweep("--trials=4") == 0
    assert outcome(folder)[:2] == before
    assert len(outcome(folder)) == len(started(folder)) == 4
    assert len({parameters["value"] for parameters, _, _ in outcome(folder)}) == 4


def test_a_lost_study_takes_the_runs_that_are_there(folder):
    write(folder, parameters=VALUES)
    assert sweep() == 0
    (folder / "runs/sweeps/search/study.db").unlink()
    assert sweep() == 0
    assert len(started(folder)) == 3
    assert result(folder)["best"]["number"] == 1


def error(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_another_sweep_of_the_same_name_is_refused(folder, capsys):
    write(folder, parameters=VALUES)
    assert sweep() == 0
    write(folder, parameters={"value": {"values": [0.2, 0.3]}})
    assert sweep() == 2
    assert "parameters: " in error(capsys)


def test_a_metric_that_no_trial_has_is_one_line_and_may_be_mended(folder, capsys):
    write(folder, metric={"name": "val/acuracy", "goal": "maximize"}, parameters=VALUES)
    assert sweep() == 2
    assert "did you mean 'val/accuracy'" in error(capsys)
    write(folder, parameters=VALUES)
    assert sweep() == 0
    assert len(started(folder)) == 3


@pytest.mark.parametrize(
    ("parameters", "named"),
    [({"unknown": {"value": 1}}, "unknown"), ({"value": {"values": [0.5, "wrong"]}}, "value")],
)
def test_what_the_config_does_not_take_is_one_line_before_anything_is_written(folder, parameters, named, capsys):
    write(folder, parameters=parameters)
    assert sweep() == 2
    assert named in error(capsys)
    assert [path.name for path in folder.iterdir()] == ["s.yaml"]


def test_a_file_that_is_no_study_is_one_line(folder, capsys):
    write(folder, parameters=VALUES)
    place = folder / "runs/sweeps/search"
    place.mkdir(parents=True)
    (place / "study.db").write_bytes(b"\x00\xff not a data base, but longer than its header" * 20)
    assert sweep() == 2
    assert "study.db" in error(capsys)


@pytest.mark.slow
def test_trials_are_runs_of_fit_and_go_on_exactly_after_a_kill(leanlight, tmp_path):
    """The weights and rows of a sweep that was killed in mid-trial, and of `leanlight fit` with the same settings."""
    import torch
    from kill import kill_when, start

    write(
        tmp_path,
        command=["leanlight", "fit", "--config", "classifier/digits_small", "${args}"],
        parameters={"trainer.max_epochs": {"value": 2}, "data.init_args.batch_size": {"values": [64, 32]}},
    )
    options = ["--exact_resume.every=5", "--run.test=none"]

    def begun():
        return any(path.read_text().count("\n") > 2 for path in tmp_path.glob("runs/*/*/search-001-*/metrics.csv"))

    kill_when(start(tmp_path, "sweep", "s.yaml", *options), tmp_path, begun)
    assert leanlight("sweep", "s.yaml", *options).returncode == 0
    for trial in result(tmp_path)["trials"]:
        run = tmp_path / "runs" / trial["run"]
        words = [*trial["command"].split()[1:], "--run.id=a", "--trainer.default_root_dir", f"fit{trial['number']}"]
        assert leanlight(*words).returncode == 0
        (fit,) = tmp_path.glob(f"fit{trial['number']}/*/*/a")
        assert (fit / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
        ours, theirs = (torch.load(place / "checkpoints/last.ckpt")["state_dict"] for place in (run, fit))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
