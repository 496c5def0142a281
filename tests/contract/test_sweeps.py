"""The command a W&B sweep makes from its file really runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from leanlight.configs_path import config_root

SWEEPS = sorted((config_root() / "sweeps").glob("*.yaml"))


def value(parameter):
    if "values" in parameter:
        return parameter["values"][0]
    return parameter["min"] if "min" in parameter else parameter["value"]


def arguments(sweep):
    """The command as W&B's agent makes it, with the first value of each parameter."""
    given = [f"--{name}={value(parameter)}" for name, parameter in sweep["parameters"].items()]
    return [word for part in sweep["command"] for word in (given if part == "${args}" else [part])]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_metric_of_a_sweep_is_not_measured_on_test_data(path):
    assert yaml.safe_load(path.read_text())["metric"]["name"].startswith("val/")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_command_of_a_sweep_runs(path, tmp_path):
    program, command, *rest = arguments(yaml.safe_load(path.read_text()))
    assert (program, command) == ("leanlight", "fit")
    short = ["--config", "trainer/debug", "--run.wandb=offline", "--run.id=one"]
    full = [sys.executable, "-m", "leanlight", command, *rest, *short]
    done = subprocess.run(full, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    (summary,) = Path(tmp_path).glob("runs/*/*/one/summary.json")
    assert json.loads(summary.read_text())["status"] == "finished"
