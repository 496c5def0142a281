"""Overlays set only what their folder is about, with keys that exist."""

import inspect
from dataclasses import fields

import lightning.pytorch as pl
import pytest
import yaml

from leanlight.configs_path import config_root
from leanlight.experiment import resolve
from leanlight.runs import RunSettings

TRAINER = sorted((config_root() / "trainer").glob("*.yaml"))
LOGGER = sorted((config_root() / "logger").glob("*.yaml"))


@pytest.mark.parametrize("path", TRAINER, ids=lambda path: path.stem)
def test_a_trainer_overlay_sets_only_arguments_of_the_trainer(path):
    content = yaml.safe_load(path.read_text())
    assert content.keys() == {"trainer"}
    assert content["trainer"].keys() <= inspect.signature(pl.Trainer).parameters.keys()


@pytest.mark.parametrize("path", LOGGER, ids=lambda path: path.stem)
def test_a_logger_overlay_sets_only_settings_of_the_run(path):
    content = yaml.safe_load(path.read_text())
    assert content.keys() == {"run"}
    assert content["run"].keys() <= {field.name for field in fields(RunSettings)}


def trainer_of(*overlays):
    configs = [part for name in ("classifier/digits_small", *overlays) for part in ("--config", name)]
    return resolve("fit", configs)["trainer"]


def test_slurm_takes_nodes_and_processes_from_the_job(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "4")
    trainer = trainer_of("trainer/slurm")
    assert (trainer["num_nodes"], trainer["devices"]) == (3, 4)


@pytest.mark.parametrize(
    ("overlays", "devices"),
    [
        ((), 1),
        (("trainer/gpu",), 1),
        (("trainer/ddp",), "auto"),
        (("trainer/gpus",), -1),
        (("trainer/gpus", "trainer/cpu"), 1),
    ],
)
def test_a_run_takes_one_device_unless_an_overlay_asks_for_all(overlays, devices):
    assert trainer_of(*overlays)["devices"] == devices


def test_a_later_overlay_wins():
    trainer = trainer_of("trainer/bf16", "trainer/gpu", "trainer/cpu")
    assert (trainer["accelerator"], trainer["precision"]) == ("cpu", "32-true")
