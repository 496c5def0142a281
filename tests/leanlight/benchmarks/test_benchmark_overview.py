"""All methods in one table: rows from measured files, methods that fail beside others, what is skipped."""

import json

import pytest

from leanlight.__main__ import main
from leanlight.benchmarks.core import Measurement, Target, document, is_current, summarise
from leanlight.benchmarks.overview import performance_page, read_rows, write_performance
from leanlight.cli import benchmark
from leanlight.registry import MethodInfo
from leanlight.results.format import MISSING
from leanlight.runs import PROJECT

# A package whose method `steady` is measured at once; `broken` fails in more than one line, `killed` without one.
PACKAGE = """
import os, signal
from leanlight.benchmarks.core import Measurement, Target, summarise
from leanlight.registry import MethodInfo
from leanlight.results.format import MISSING
from pathlib import Path

def info(name):
    return MethodInfo(name, "", "", "", benchmark=f"stand_in:{name}", configs_folder=Path(__file__).parent)

STEADY, BROKEN, KILLED = info("steady"), info("broken"), info("killed")

def steady(quick):
    with open(Path(__file__).parent / "measured", "a") as file:
        file.write("once\\n")
    return Measurement(figures={"step": summarise([2.0], "ms")}, targets=[Target("step", 3.0, "short")])

def broken(quick):
    raise RuntimeError("the device caught fire")

def killed(quick):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def measured(value=8.0, **figures):
    figures = {
        "batch_64/ours": summarise([value], "ms"),
        "batch_64/times_time_last": summarise([9.0, 9.5, 10.0], "x", "higher"),
    }
    targets = [Target("batch_64/times_time_last", 10.0, "ten times as fast"), Target("batch_64/ours", 9.0, "short")]
    return Measurement(figures=figures, targets=targets)


def a_gpu_document():
    speed = {"what": "", "tolerance": None, "expected": None, "verdict": "passed"}
    figures = {"steps/s": 20.0, "peak GPU memory (MiB)": 1234.0}
    checks = [
        {**speed, "name": "speed/big", "value": 20.0, "figures": figures},
        {
            **speed,
            "name": "speed/big/bf16",
            "value": 0.5,
            "expected": 0.9,
            "tolerance": "at least",
            "verdict": "failed",
            "figures": {},
        },
        {**speed, "name": "speed/big/compile", "value": None, "verdict": "not_run", "figures": {}},
        {**speed, "name": "export", "value": 4, "expected": 1, "tolerance": "bit for bit", "figures": {}},
    ]
    return {
        "kind": "gpu",
        "method": "esvae",
        "date": "2026-11-26T14:14:22+00:00",
        "machine": {"cpu": "C", "gpus": ["Card 9"]},
        "checks": checks,
    }


def save(folder, method, content, name="benchmark.json"):
    (folder / method).mkdir(parents=True, exist_ok=True)
    (folder / method / name).write_text(json.dumps(content))


def cells(page, link):
    (line,) = [line for line in page.splitlines() if line.startswith("| [") and f"]({link})" in line]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_method_is_a_row_with_its_step_and_every_bound_the_missed_first(tmp_path):
    save(
        tmp_path, "tical", document("tical", Measurement(figures={"sequences/tical": summarise([600.0], "ms")}), False)
    )
    content = document("esvae", measured(), False)
    content["machine"] |= {"cpu": "Made | Processor", "gpus": []}
    content["date"] = "2026-01-02T03:04:05+00:00"
    save(tmp_path, "esvae", content)
    page = performance_page(tmp_path)
    assert cells(page, "esvae/benchmark.md") == [
        "[esvae](esvae/benchmark.md)",
        r"Made \| Processor",
        "2026-01-02",
        "`batch_64/ours` 8 ms",
        MISSING,
        "1 of 2",
        "`batch_64/times_time_last` 9.5 x (≥ 10), **missed**<br>`batch_64/ours` 8 ms (≤ 9), met",
    ]
    assert cells(page, "tical/benchmark.md")[3:6] == ["`sequences/tical` 600 ms", MISSING, MISSING]
    assert page.index("(esvae/") < page.index("(tical/")  # as in the registry


def test_a_gpu_is_a_row_of_its_own_with_speeds_of_the_paper_s_shapes(tmp_path):
    save(tmp_path, "esvae", a_gpu_document(), "gpu.json")
    _, processor, date, step, memory, met, ratios = cells(performance_page(tmp_path), "esvae/gpu.md")
    assert (step, memory, met) == ("`big` 20 steps/s", "`big` 1,234 MiB", "0 of 1")
    assert ratios == "`speed/big/bf16` 0.5 x (≥ 0.9), **missed**"
    assert (processor, date) == ("Card 9", "2026-11-26")


def test_of_a_folder_without_measurements_no_page_is_written(tmp_path):
    assert write_performance(tmp_path) == []
    save(tmp_path, "esvae", document("esvae", measured(), False))
    assert write_performance(tmp_path, tmp_path / "nowhere") == [tmp_path / "performance.md"]
    assert len(read_rows(tmp_path)) == 1


def test_the_report_writes_the_page_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = tmp_path / "docs/results"
    save(results, "esvae", document("esvae", measured(), False))
    results.joinpath("performance.md").write_text("old")
    monkeypatch.setattr("leanlight.results.report.find_documents", lambda *folders: [])
    monkeypatch.setattr("leanlight.results.report.write_report", lambda *a, **k: tmp_path / "index.html")
    assert main(["report", "--all"]) == 0
    assert cells(results.joinpath("performance.md").read_text(), "esvae/benchmark.md")[3] == "`batch_64/ours` 8 ms"


# ---- leanlight benchmark --all ----


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The three made methods are all there are, here and in child processes; returns the folder of their package."""
    package = tmp_path / "package"
    (package / "stand_in-1.0.dist-info").mkdir(parents=True)
    (package / "stand_in.py").write_text(PACKAGE)
    (package / "stand_in-1.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: stand-in\nVersion: 1.0\n")
    points = "[leanlight.methods]\nbroken = stand_in:BROKEN\nkilled = stand_in:KILLED\nsteady = stand_in:STEADY\n"
    (package / "stand_in-1.0.dist-info/entry_points.txt").write_text(points)
    monkeypatch.setenv("PYTHONPATH", str(package))
    made = {name: MethodInfo(name, "", "", "", benchmark=f"stand_in:{name}") for name in ("broken", "killed", "steady")}
    monkeypatch.setattr(benchmark, "methods", lambda: made)
    monkeypatch.chdir(tmp_path)
    return package


def test_an_error_in_one_method_is_a_line_and_the_others_are_measured(installed, capfd):
    assert main(["benchmark", "--all"]) == 1
    shown, errors = capfd.readouterr()
    assert errors == ""
    assert shown.count("failed: broken: RuntimeError: the device caught fire") == 2  # when it happens, and at the end
    assert shown.count("failed: killed: killed by SIGKILL") == 2
    assert "Traceback" not in shown
    results = installed.parent / "runs/results"
    assert json.loads((results / "steady/benchmark.json").read_text())["figures"]["step"]["value"] == 2
    assert not (results / "broken").exists()
    assert cells((results / "performance.md").read_text(), "steady/benchmark.md")[5] == "1 of 1"


def test_quick_measurements_of_all_are_shown_and_not_written(installed, monkeypatch, capfd):
    monkeypatch.setattr(
        benchmark, "methods", lambda: {"steady": MethodInfo("steady", "", "", "", benchmark="stand_in:steady")}
    )
    assert main(["benchmark", "--all", "--quick"]) == 0
    assert "1 of 1" in capfd.readouterr().out
    assert not (installed.parent / "runs").exists()


def test_what_the_present_code_has_measured_is_skipped_unless_asked_for_again(installed, monkeypatch, capfd):
    def times():
        return len((installed / "measured").read_text().splitlines())

    only = {"steady": MethodInfo("steady", "", "", "", benchmark="stand_in:steady")}
    monkeypatch.setattr(benchmark, "methods", lambda: only)
    monkeypatch.setattr(benchmark, "METHODS", only)  # as one of the suite's own
    assert main(["benchmark", "--all", "--publish"]) == 0
    assert times() == 1
    assert main(["benchmark", "--all", "--publish"]) == 0
    assert times() == 1
    assert "steady: measured on this code" in capfd.readouterr().out
    assert main(["benchmark", "--all", "--publish", "--again"]) == 0
    assert times() == 2
    path = installed.parent / "docs/results/steady/benchmark.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "code": {**content["code"], "hash": "of other code"}}))
    assert main(["benchmark", "--all", "--publish"]) == 0
    assert times() == 3


def test_only_full_measurements_that_name_their_code_count_as_current():
    content = document("esvae", measured(), quick=False)
    assert "leanlight/benchmarks/core.py" in content["code"]["files"]
    assert all((PROJECT / name).is_file() for name in content["code"]["files"])
    assert is_current(content)
    assert not is_current(document("esvae", measured(), quick=True))
    assert not is_current({key: value for key, value in content.items() if key != "code"})


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "--all"),
        (["classifier", "--all"], "--all"),
        (["classifier", "--again"], "--again"),
        (["classifier", "--rounds=2"], "--rounds"),
        (["--all", "--output=x.json"], "--output"),
        (["--all", "--commits", "a", "b"], "--commits"),
        (["classifier", "--commits", "a", "b", "--publish"], "--commits"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(words, named, capsys):
    assert main(["benchmark", *words]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
