"""The terminal dashboard shows what run folders say."""

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "dashboard.py"


@pytest.fixture
def dashboard(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    return call


def make_run(root, name, status, date, metrics=None):
    folder = root / "method" / "data" / name
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"status": status, "date": date}))
    if metrics is not None:
        (folder / "metrics.csv").write_text(metrics)


def test_runs_are_shown_newest_first_with_their_newest_metrics(dashboard, tmp_path):
    make_run(tmp_path, "old", "finished", "2026-01-01", "step,progress/step,val/loss\n1,10,0.5\n2,20,\n")
    make_run(tmp_path, "new", "diverged", "2026-02-01")
    shown = dashboard(tmp_path)
    assert shown.index("method/data/new") < shown.index("method/data/old")
    assert "diverged" in shown
    assert "step 20" in shown
    assert "0.5000" in shown


def test_other_metrics_and_fewer_runs_can_be_asked_for(dashboard, tmp_path):
    for month in (1, 2):
        make_run(tmp_path, f"run{month}", "running", f"2026-0{month}-01", f"step,val/return\n1,{month}.25\n")
    shown = dashboard(tmp_path, "--metric", "val/return", "--last", 1)
    assert "2.2500" in shown
    assert "run1" not in shown


def test_no_runs_is_an_empty_table(dashboard, tmp_path):
    assert "0 runs" in dashboard(tmp_path)
