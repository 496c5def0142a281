"""Shared parts of the benchmarks: interleaving, summaries, documents, comparison."""

import json
import math

import numpy
import pytest

from leanlight.__main__ import main
from leanlight.benchmarks.core import (
    Measurement,
    Target,
    compare,
    document,
    interleave,
    markdown,
    ratios,
    read,
    summarise,
    warnings_of,
)
from leanlight.contracts import UserError
from leanlight.results.format import MISSING


def test_every_round_runs_each_candidate_once_and_starts_with_another():
    order = []
    candidates = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleave(candidates, rounds=6, warmup=3)
    rounds = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert rounds == ["abc", "bca", "cab"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 6, "b": 6, "c": 6}


def test_a_summary_is_median_and_quartiles():
    samples = numpy.random.default_rng(0).normal(size=11)
    figure = summarise(samples.tolist(), "ms")
    assert (figure.low, figure.value, figure.high) == pytest.approx(numpy.percentile(samples, [25, 50, 75]))
    assert figure.n == 11


def test_a_single_sample_is_its_own_spread():
    figure = summarise([3.0], "ms")
    assert (figure.value, figure.low, figure.high, figure.n) == (3.0, 3.0, 3.0, 1)


def test_ratios_pair_samples_of_the_same_round():
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def measured():
    return Measurement(
        settings={"batch_size": 8},
        figures={
            "speed": summarise([99.0, 100.0, 101.0], "samples/s", "higher"),
            "share": summarise([4.0], "%"),
            "items": summarise([7.0], "items", None),
        },
        targets=[
            Target("speed", 50.0, "fast"),
            Target("share", 3.0, "little overhead"),
            Target("not_measured", 1.0, "other"),
        ],
        checks={"equal": True},
        missing={"compile": "no compiler"},
    )


def test_a_target_is_met_on_the_right_side_of_its_bound_and_left_out_without_its_figure():
    targets = document("m", measured(), quick=True)["targets"]
    assert {target["figure"]: target["met"] for target in targets} == {"speed": True, "share": False}


def test_a_document_names_the_machine_but_no_host_user_or_path():
    content = document("m", measured(), quick=False)
    assert {"commit", "dirty", "date", "machine"} <= content.keys()
    assert {"cpu", "cores", "torch", "lightning"} <= content["machine"].keys()
    assert not {"host", "hostname", "user", "path", "cwd"} & content["machine"].keys()
    assert json.loads(json.dumps(content)) == content


def changed(**figures):
    content = document("m", measured(), quick=False)
    content["figures"] |= figures
    return content


def figure(value, spread, better):
    return {"value": value, "low": value - spread, "high": value + spread, "unit": "u", "better": better, "n": 5}


@pytest.mark.parametrize(
    ("before", "after", "better", "verdict"),
    [
        ((10.0, 1.0), (20.0, 1.0), "higher", "better"),
        ((10.0, 1.0), (20.0, 1.0), "lower", "worse"),
        ((20.0, 1.0), (10.0, 1.0), "lower", "better"),
        ((10.0, 5.0), (12.0, 5.0), "lower", "same"),
        ((10.0, 0.0), (20.0, 0.0), None, ""),
    ],
)
def test_a_difference_counts_only_beyond_the_spread(before, after, better, verdict):
    (difference, *_), *_ = compare(
        {"figures": {"x": figure(*before, better)}}, {"figures": {"x": figure(*after, better)}}
    )
    assert (difference.verdict, difference.ratio) == (verdict, after[0] / before[0])


def test_a_ratio_to_zero_is_no_number():
    ((difference,), *_) = compare({"figures": {"x": figure(0, 0, None)}}, {"figures": {"x": figure(1, 0, None)}})
    assert math.isnan(difference.ratio)


def test_documents_of_other_machines_and_settings_are_marked():
    before, after = changed(), changed()
    assert warnings_of(before, after) == []
    after["machine"] = {**after["machine"], "cpu": "Other 9000"}
    after["settings"] = {"batch_size": 16}
    found = "\n".join(warnings_of(before, after))
    assert "cpu" in found
    assert "Other 9000" in found
    assert "batch_size: 8 and 16" in found


def test_compare_shows_ratios_and_names_what_only_one_file_has(tmp_path, capsys):
    before, after = changed(old=figure(1, 0, "lower")), changed(new=figure(1, 0, "lower"))
    after["figures"]["speed"] = figure(150.0, 1.0, "higher")
    for name, content in (("a.json", before), ("b.json", after)):
        (tmp_path / name).write_text(json.dumps(content))
    assert main(["benchmark", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    shown = capsys.readouterr().out
    assert "1.500" in shown
    assert "better" in shown
    assert "only before: old" in shown
    assert "only after: new" in shown


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "table"}'])
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"x\.json"):
        read(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["clasifier"], "'classifier'"),
        (["--compare", "a.json", "b.json"], "a.json"),
        (["--quik"], "--quick"),
    ],
)
def test_wrong_input_is_one_line_with_exit_code_2(arguments, message, capsys):
    assert main(["benchmark", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_report_takes_no_benchmark_for_a_table(tmp_path):
    from leanlight.results.report import find_documents

    (tmp_path / "m").mkdir()
    for name in ("benchmark.json", "digits_small.json"):
        (tmp_path / "m" / name).touch()
    assert [path.name for path in find_documents(tmp_path)] == ["digits_small.json"]


def test_a_page_shows_figures_targets_checks_and_what_is_missing():
    measured = Measurement(
        settings={"threads": 2},
        figures={"a/step": summarise([1.0, 2.0, 3.0], "s"), "a/once": summarise([0.5], "x")},
        targets=[Target("a/step", 1.5, "quick enough"), Target("a/once", 1.0, "half")],
        checks={"equal": True},
        missing={"gpu": "no GPU"},
    )
    page = markdown(document("classifier", measured, quick=True))
    for line in (
        "| a/step | 2 | 1.5 to 2.5 | s |",
        f"| a/once | 0.5 | {MISSING} | x |",
        "- **missed**: quick enough: 2",
        "- **met**: half: 0.5",
        "- **checked**: equal",
        "- **not measured**: gpu: no GPU",
        "Settings: threads 2.",
    ):
        assert line in page.splitlines()
