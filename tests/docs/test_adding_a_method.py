"""The pages on methods, data and networks of one's own work as written: files are written, commands run, in order."""

import json

import pytest
from run_page import ROOT, run_page


@pytest.mark.timeout(900)  # a dozen runs
def test_the_page_builds_a_working_method(tmp_path):
    work, ran = run_page(ROOT / "docs" / "adding_a_method.md", tmp_path)
    assert ran == 6
    assert (work / "runs/mixup/digits/first/summary.json").is_file()
    assert "mixup_helps" in (work / "mixup_results.json").read_text()
    assert (work / "site" / "index.html").is_file()
    for run in ("first", "installed"):  # without an optimiser, and yet checkpoints and a best one
        assert {path.name for path in (work / f"runs/gaussian/digits/{run}/checkpoints").iterdir()} >= {
            "last.ckpt",
            "best.ckpt",
        }
        assert metrics(work / f"runs/gaussian/digits/{run}")["test/accuracy"] > 0.9


@pytest.mark.slow
def test_the_page_about_own_data_makes_data_that_a_classifier_learns(tmp_path):
    work, ran = run_page(ROOT / "docs" / "own_data.md", tmp_path)
    assert ran == 1
    assert metrics(work / "runs/classifier/lines/first")["test/accuracy"] > 0.9  # chance: 0.5


@pytest.mark.slow
def test_the_page_about_own_networks_trains_both_and_counts_spikes_of_the_one_that_has_them(tmp_path):
    work, ran = run_page(ROOT / "docs" / "own_network.md", tmp_path)
    assert ran == 2
    ordinary, spiking = (metrics(work / f"runs/classifier/digits/{name}") for name in ("patches", "spiking"))
    assert min(ordinary["test/accuracy"], spiking["test/accuracy"]) > 0.8  # chance: 0.1
    assert "test/firing_rate" not in ordinary
    assert 0 < spiking["test/firing_rate"] < 1
    assert spiking["test/acs"] > 0


def metrics(run):
    """What a run came to."""
    return json.loads((run / "summary.json").read_text())["metrics"]
