"""The runner of `make gpu`: verdicts, deaths, the limit, what lies on disk when; all without a GPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from leanlight.benchmarks.gpu.checks import Check, Found, NotRun, markdown, near, outcome, without_places
from leanlight.benchmarks.gpu.launch import Documents, Worker, run
from leanlight.contracts import UserError
from leanlight.results.report import find_documents
from leanlight.runs import PROJECT

FAKE = (sys.executable, str(Path(__file__).parents[2] / "support" / "fake_gpu_worker.py"))
FACTS = {"date": "2026-01-01", "commit": "", "dirty": False, "code": "c0de"}
FACTS |= {"machine": {"cpu": "C", "gpus": ["G"], "cuda": "13", "driver": "5", "triton": "3"}}


def check(measure, **more):
    return outcome(Check(**{"method": "m", "name": "n", "what": "w", "measure": measure, **more}))


def launch(folder, groups, alone=None, limit=60.0, **more):
    """Run fake workers; the documents' lines by group and check."""
    documents = Documents(folder / "results", lambda: FACTS, **more)
    workers = [Worker([group], folder, 1, command=FAKE) for group in groups]
    timed = Worker([alone], folder, 1, alone=True, command=FAKE) if alone else None
    run(workers, timed, documents, time.monotonic() + limit)
    return {group: {line["name"]: line for line in lines} for group, lines in documents.lines.items()}


def on_disk(folder, group):
    return json.loads((folder / "results" / group / "gpu.json").read_text())


def test_a_check_passes_fails_or_says_why_it_was_not_run():
    assert check(lambda: near(1.0, 1.1, 0.2))["verdict"] == "passed"
    assert check(lambda: near(1.0, 1.3, 0.2))["verdict"] == "failed"
    assert check(lambda: near(float("nan"), 1.0, 0.2))["verdict"] == "failed"

    def not_here():
        raise NotRun("no ale-py")

    line = check(not_here)
    assert (line["verdict"], line["why"], line["value"]) == ("not_run", "no ale-py", None)


def test_a_check_that_raises_fails_with_the_place_and_without_this_machines_folders():
    def broken():
        return torch.load(PROJECT / "nowhere" / "last.ckpt")

    line = check(broken)
    assert line["verdict"] == "failed"
    assert "nowhere/last.ckpt" in line["why"]
    assert "test_gpu_launch.py" in line["why"]
    assert str(PROJECT) not in line["why"]


def test_texts_are_rid_of_this_machines_folders():
    text = f'File "/opt/x/site-packages/torch/a.py", in {PROJECT}/leanlight/b.py, /tmp/leanlight-gpu-a1/m/c.ckpt'
    assert without_places(text) == 'File "torch/a.py", in leanlight/b.py, m/c.ckpt'


def test_the_schema_of_a_document(tmp_path):
    launch(tmp_path, ["good"])
    content = on_disk(tmp_path, "good")
    assert list(content) == ["kind", "method", "date", "commit", "dirty", "code", "machine", "checks"]
    keys = ["name", "what", "expected", "value", "tolerance", "verdict", "why", "seconds", "figures"]
    assert [list(line) for line in content["checks"]] == [keys, keys]
    assert list(check(lambda: Found(float("inf"), 0.0, "none", False, figures={"a (s)": 1.5}))) == keys
    json.dumps(check(lambda: Found(float("inf"), 0.0, "none", False)), allow_nan=False)
    page = (tmp_path / "results" / "good" / "gpu.md").read_text()
    assert page == markdown(content)
    assert "2 checks passed, 0 failed, 0 not run" in page


def test_a_process_that_dies_costs_one_check_and_the_rest_runs_in_another(tmp_path):
    lines = launch(tmp_path, ["dies", "good"])
    assert {name: line["verdict"] for name, line in lines["dies"].items()} == {
        "pass": "passed",
        "die": "failed",
        "after": "passed",
    }
    assert "last words" in lines["dies"]["die"]["why"]
    assert all(line["verdict"] == "passed" for line in lines["good"].values())


def test_a_process_that_dies_before_its_first_check_is_not_started_again(tmp_path):
    lines = launch(tmp_path, ["stillborn"])
    assert lines["stillborn"]["never"]["verdict"] == "failed"
    assert "no room to be born" in lines["stillborn"]["never"]["why"]


def test_at_the_limit_everything_stops_and_the_rest_is_marked(tmp_path):
    begin = time.monotonic()
    lines = launch(tmp_path, ["hangs"], alone="timed", limit=3.0)
    assert time.monotonic() - begin < 60
    assert {name: line["verdict"] for name, line in lines["hangs"].items()} == {
        "pass": "passed",
        "hang": "not_run",
        "after": "not_run",
    }
    assert lines["timed"]["alone"]["verdict"] == "not_run"
    assert "limit" in lines["timed"]["alone"]["why"]


def test_what_has_been_measured_is_on_disk_before_the_next_check(tmp_path):
    seen = []
    launch(tmp_path, ["good"], told=lambda group, line: seen.append(len(on_disk(tmp_path, group)["checks"])))
    assert seen == [1, 2]


def test_what_is_timed_runs_when_nothing_else_does(tmp_path):
    launch(tmp_path, ["slow", "good"], alone="timed")
    order = (tmp_path / "order.txt").read_text().splitlines()
    assert order[-2:] == ["timed begins alone", "timed ends alone"]


@pytest.mark.parametrize(("code", "kept"), [("c0de", ["pass", "pass2", "after"]), ("other", ["pass", "pass2"])])
def test_a_part_of_the_checks_is_merged_into_a_document_of_the_same_code(tmp_path, code, kept):
    path = tmp_path / "results" / "good" / "gpu.json"
    path.parent.mkdir(parents=True)
    old = [{"name": "pass", "value": 9}, {"name": "after", "value": 9}]
    first = tmp_path / "first"
    first.mkdir()
    launch(first, ["good"])
    lines = [{**on_disk(first, "good")["checks"][0], **line} for line in old]
    path.write_text(json.dumps({"kind": "gpu", "method": "good", **FACTS, "code": code, "checks": lines}))
    launch(tmp_path, ["good"], merge=True)
    merged = {line["name"]: line["value"] for line in on_disk(tmp_path, "good")["checks"]}
    assert sorted(merged) == sorted(kept)
    assert merged["pass"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path):
    command = [sys.executable, "-m", "leanlight.benchmarks.gpu", "--output", str(tmp_path / "results")]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "finds no GPU" in line
    assert not (tmp_path / "results").exists()


def test_a_method_whose_checks_cannot_be_listed_says_why_and_the_others_go_on(tmp_path, monkeypatch):
    from leanlight.benchmarks.gpu import suite
    from leanlight.benchmarks.gpu.worker import found

    def listed(group, folder, device):
        if group == "esvae":
            raise ModuleNotFoundError("No module named 'ale_py'")
        return [Check(group, "n", "w", lambda: near(1.0, 1.0, 0.0))]

    monkeypatch.setattr(suite, "checks", listed)
    task = {"folder": str(tmp_path), "device": "cpu", "alone": False}
    (broken,), (good,) = found("esvae", task), found("dsqn", task)
    line = outcome(broken)
    assert (line["verdict"], line["why"]) == ("not_run", "No module named 'ale_py'")
    assert outcome(good)["verdict"] == "passed"


def test_the_report_does_not_take_a_document_for_a_table(tmp_path):
    launch(tmp_path, ["good"])
    with pytest.raises(UserError, match="no results"):
        find_documents(tmp_path / "results")
