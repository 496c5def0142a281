"""What a run says at its beginning and at its end."""

import re
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from leanlight.announce import Opening, closing, show_value


def test_the_list_at_the_end_has_its_points_under_one_another_and_units():
    metrics = {
        "test/accuracy": 0.913,
        "test/energy_pj": 544825.9,
        "val/loss": 12.5,
        "train/loss": 1.0,
        "val/class/a": 1.0,
    }
    *lines, last = closing(metrics, "no_such_method", Path("runs/a")).splitlines()
    assert last == "run: runs/a"
    assert [line.split()[0] for line in lines] == ["test/accuracy", "test/energy_pj", "val/loss"]
    assert len({re.search(r"\d(\.)\d", line).start(1) for line in lines}) == 1
    assert [line.split()[1:] for line in lines] == [["91.3", "%"], ["544.8", "nJ"], ["12.5"]]


def test_long_names_are_not_cut():
    name = f"test/{'long_' * 20}"
    assert name in closing({name: 1.5}, "no_such_method", Path("runs/a"))


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("test/macs", 46_720.0, ("46.72", "k")),
        ("test/energy_pj_at_1.0", 2.5e9, ("2.5", "mJ")),
        ("test/energy_pj", 0.0, ("0", "J")),
        ("test/parameters", 67_505.0, ("67,505", "")),
        ("val/loss", float("nan"), ("nan", "")),
        ("val/loss", float("inf"), ("inf", "")),
        ("val/score", 1.0, ("1", "")),
        ("predict/agreement_dropped", 0.12, ("12.0", "%")),
    ],
)
def test_a_value_has_the_unit_its_name_tells(name, value, shown):
    assert show_value(name, value, {}) == shown


def test_units_are_those_of_the_methods_tables():
    assert "0.215 µJ" in closing({"test/energy_pj": 214_900.0}, "classifier", Path("runs/a"))


def test_units_of_a_stages_metric_are_those_of_the_stage_itself():
    assert "2.0 s" in closing({"test/seconds": 2.04}, "adq", Path("runs/a"))


@pytest.mark.parametrize(("data", "shown"), [("catch", "0.66"), ("road_runner", "1")])
def test_a_score_has_the_decimals_of_its_games_table(data, shown):
    assert closing({"test/score": 0.656}, "dsqn", Path(f"runs/dsqn/{data}/a")).splitlines()[0].split()[1] == shown


def test_one_block_says_what_runs_where(capsys):
    module = pl.LightningModule()
    module.weight, module.frozen = torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(2), False)
    meta = SimpleNamespace(name="digits", source="scikit-learn", counts={"train": 1293, "test": 360})
    trainer = pl.Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False)
    trainer.datamodule, trainer.state.fn = SimpleNamespace(meta=meta), "fit"
    opening = Opening("method: a [red] config", Path("/runs/größe"))
    opening.on_fit_start(trainer, module)
    opening.on_test_start(trainer, module)
    said = capsys.readouterr().out.splitlines()
    for line in (
        "method: a [red] config",
        "  data    digits: train 1,293, test 360 (scikit-learn)",
        "  device  cpu, 32-true",
        "  size    7 parameters, 5 of them trained",
        "  length  3 epochs",
        "  folder  /runs/größe",
    ):
        assert said.count(line) == 1
