"""Dashboards: what they show comes from what a run has logged."""

import json
import os
from pathlib import Path

import pytest

from leanlight.__main__ import main
from leanlight.contracts import UserError
from leanlight.results.dashboard import describe, find_run, workspace

COLUMNS = (
    "step,epoch,progress/round,train/loss,train/accuracy,val/loss,val/accuracy,val/accuracy_last,"
    "val/firing_rate/conv1,val/firing_rate/conv2,test/accuracy,test/energy_pj"
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of a federation, as it lies there when it has finished."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/sfedca/digits/one")
    for name in ("val/clients.png", "test/clients.png", "val/agent.gif", "val/table.csv"):
        (folder / "artifacts/media" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "artifacts/media" / name).touch()
    (folder / "metrics.csv").write_text(f"{COLUMNS}\n")
    summary = {"method": "sfedca", "primary_metric": {"name": "val/accuracy", "mode": "max"}}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "throughput.json").write_text('{"epoch": 1, "train/samples_per_s": 2.0, "peak_rss_mb": 3}')
    return folder


def test_sections_hold_what_the_run_has_logged_over_its_own_progress(run):
    found = describe(run)
    assert (found.method, found.x) == ("sfedca", "progress/round")
    names = {title: [panel.metrics for panel in panels] for title, panels in found.sections.items()}
    assert names == {
        "Judged by": [("val/accuracy",)],
        "Losses": [("train/loss", "val/loss")],
        "Training and validation": [
            ("train/accuracy",),
            ("val/accuracy_last",),
            ("val/firing_rate/conv1", "val/firing_rate/conv2"),
        ],
        "Test": [("test/accuracy",), ("test/energy_pj",)],
        "Pictures": [("test/clients",), ("val/agent",), ("val/clients",)],
        "Speed": [("train/samples_per_s",)],
    }


def test_charts_have_the_unit_of_the_glossary(run):
    panels = {panel.title: panel.unit for panels in describe(run).sections.values() for panel in panels}
    assert panels["val/accuracy"] == "share"
    assert panels["test/energy_pj"] == "pJ"
    assert panels["firing_rate"] == "spikes"


def test_a_method_stands_for_its_newest_run(run):
    other = run.with_name("two")
    other.mkdir()
    (other / "metrics.csv").write_text(COLUMNS)
    (other / "summary.json").write_text("{}")
    os.utime(other / "metrics.csv", (1, 1))
    assert find_run("sfedca", Path("runs")) == run
    assert find_run(str(other), Path("runs")) == other


def test_a_view_of_wandb_names_the_same_metrics_and_the_methods_runs(run):
    pytest.importorskip("wandb_workspaces")
    dashboard = describe(run)
    view = workspace(dashboard, "someone", "leanlight")
    spec = view._to_model().spec.model_dump(by_alias=True, exclude_none=True, mode="json")
    sections = spec["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][: len(dashboard.sections)] == list(dashboard.sections)
    text = json.dumps(sections)
    for panels in dashboard.sections.values():
        for name in (name for panel in panels for name in panel.metrics):
            assert f'"{name}"' in text
    assert '"progress/round"' in text
    assert "sfedca" in json.dumps(spec["section"]["runSets"])


def test_print_shows_it_as_json_and_saving_needs_a_key(run, capsys, monkeypatch):
    assert main(["dashboard", "sfedca", "--print"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["sections"]["Judged by"][0]["metrics"] == ["val/accuracy"]
    pytest.importorskip("wandb_workspaces")
    assert main(["dashboard", str(run)]) == 2  # tests have W&B offline
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "wandb login" in error


def test_a_method_without_a_run_is_a_line_that_says_how_to_make_one(run):
    with pytest.raises(UserError, match="leanlight fit --config esvae/digits_small"):
        find_run("esvae", Path("runs"))
    with pytest.raises(UserError, match="nothing"):
        find_run("nothing", Path("runs"))
