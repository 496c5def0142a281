"""A real table on real digits: reproduce, reuse, report; and a real pipeline of teacher and student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from leanlight.__main__ import main

pytestmark = pytest.mark.slow

WIDTH = "model.init_args.network.init_args.width"
FAST = {"trainer.max_epochs": 1, "trainer.accelerator": "cpu", "run.wandb": "disabled"}
TABLE = {
    "method": "classifier",
    "dataset": "digits",
    "scale": "small",
    "title": "Wide and narrow networks on digits",
    "seeds": [0, 1],
    "metrics": {
        "test/accuracy": {"label": "Accuracy", "higher_is_better": True, "unit": "%", "scale": 100, "digits": 1}
    },
    "rows": [
        {
            "name": "wide",
            "config": "classifier/digits_small",
            "overrides": {**FAST, WIDTH: 16},
            "setting": {"width": 16},
        },
        {
            "name": "narrow",
            "config": "classifier/digits_small",
            "overrides": {**FAST, WIDTH: 1},
            "setting": {"width": 1},
        },
    ],
    "claims": [
        {
            "id": "width_helps",
            "text": "A wide network is at least 10 points more accurate",
            "scope": "reduced",
            "expr": "wide['test/accuracy'] - narrow['test/accuracy']",
            "margin": 0.1,
            "min_seeds": 2,
        }
    ],
}


def _summary_times(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.glob("*/*/*/summary.json")}


def test_a_small_table_on_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wide.yaml").write_text(yaml.safe_dump(TABLE))
    assert main(["reproduce", "wide.yaml", "--jobs", "2"]) == 0
    document: dict[str, Any] = json.loads(Path("runs/results/classifier/wide.json").read_text())
    wide, narrow = (row["metrics"]["test/accuracy"] for row in document["rows"])
    assert wide["n"] == narrow["n"] == 2
    assert wide["mean"] > 0.5 > narrow["mean"]
    assert len(set(wide["by_seed"].values())) == 2  # seeds differ
    assert document["rows"][0]["data"][0]["name"] == "digits"
    assert document["rows"][0]["peak_rss_mb"] > 50
    assert document["claims"][0]["evidence"]["n"] == 2
    for row in document["rows"]:
        for run in row["runs"]:
            summary = json.loads((Path("runs") / run["run"] / "summary.json").read_text())
            assert summary["config_hash"] == run["config_hash"]
            assert not run["stale"]
    times = _summary_times(Path("runs"))
    assert len(times) == 4
    assert main(["reproduce", "wide.yaml"]) == 0
    assert _summary_times(Path("runs")) == times
    assert main(["report", "--all", "--output", "out"]) == 0
    page = Path("out/index.html").read_text()
    assert "confusion (test)" in page
    assert "A wide network is at least 10 points more accurate" in page


def test_a_student_learns_from_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = "model.init_args"
    student = {f"{model}.teacher_checkpoint": "${stages.teacher.artifacts.checkpoint}", f"{model}.distill_weight": 0.5}
    stages = [
        {"name": "teacher", "config": "classifier/digits_small", "overrides": FAST},
        {"name": "student", "config": "classifier/digits_small", "overrides": {**FAST, **student}},
        {"name": "packed", "command": "export", "inputs": {"source": "${stages.student.run_dir}"}},
    ]
    content = {"method": "classifier", "dataset": "digits", "stages": stages}
    Path("distil.yaml").write_text(yaml.safe_dump(content))
    assert main(["run", "distil.yaml"]) == 0
    summary = json.loads(Path("runs/pipelines/distil/summary.json").read_text())
    assert [stage["status"] for stage in summary["stages"]] == ["finished"] * 3
    times = _summary_times(Path("runs"))
    assert main(["run", "distil.yaml"]) == 0
    assert _summary_times(Path("runs")) == times
    Path("runs").rename("elsewhere")
    assert main(["run", "distil.yaml", "--runs-root", "elsewhere"]) == 0
    assert len(_summary_times(Path("elsewhere"))) == 3
