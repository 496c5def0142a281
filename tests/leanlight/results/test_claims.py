"""Verdicts against SciPy's t-test and against hand-made cases."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from scipy.stats import levene, t, ttest_1samp, ttest_ind

from leanlight.results.claims import interval, judge, smallest_difference
from leanlight.results.expression import metric_of, parse_expression
from leanlight.results.format import show_evidence
from leanlight.results.table_spec import Claim, TableSpec


def _spec(scale: str = "small", seeds: tuple[int, ...] = (0, 1, 2)) -> TableSpec:
    return TableSpec("t", "t", "m", "d", scale, "", "", seeds, "last", {}, ())  # type: ignore[arg-type]


def _claim(margin: float = 0.0, scope: str = "reduced", expr: str = "a['m'] - b['m']", min_seeds: int = 3) -> Claim:
    expression = parse_expression(expr, ["a", "b"], ["m"], "claim")
    return Claim("c", "text", scope, expression, margin, min_seeds)  # type: ignore[arg-type]


def _values(a: dict[int, float], b: dict[int, float]) -> dict[tuple[str, str], dict[int, float]]:
    return {("a", "m"): a, ("b", "m"): b}


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_the_interval_is_that_of_the_t_test(count: int) -> None:
    draw = random.Random(count)
    values = [draw.gauss(1.0, 0.3) for _ in range(count)]
    expected = ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert interval(values) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_three_seeds_give_the_interval_computed_by_hand() -> None:
    # mean 2, s = 1, t(0.975, 2) = 4.302653: 2 ± 4.302653 / sqrt(3)
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 2.484138, 2 + 2.484138), abs=1e-6)


@pytest.mark.parametrize(
    ("margin", "verdict"), [(0.1, "reproduced"), (0.21, "inconclusive"), (0.3, "not_reproduced"), (-1.0, "reproduced")]
)
def test_the_verdict_follows_the_interval(margin: float, verdict: str) -> None:
    values = _values({0: 0.8, 1: 0.82, 2: 0.84}, {0: 0.6, 1: 0.61, 2: 0.62})  # differences 0.20, 0.21, 0.22
    judged = judge(_claim(margin), _spec(), values)
    assert judged["verdict"] == verdict
    assert judged["evidence"]["mean"] == pytest.approx(0.21)
    assert judged["evidence"]["interval"] == pytest.approx([0.21 - 0.024841, 0.21 + 0.024841], abs=1e-6)


@pytest.mark.parametrize("count", [3, 5, 10])
def test_an_inconclusive_claim_says_the_smallest_difference_that_its_seeds_could_show(count: int) -> None:
    draw = random.Random(count)
    first = {seed: draw.gauss(0.0, 1.0) for seed in range(count)}
    judged = judge(
        _claim(float(np.mean(list(first.values())))),
        _spec(seeds=tuple(first)),
        _values(first, dict.fromkeys(first, 0.0)),
    )
    least = t.ppf(0.975, count - 1) * np.std(list(first.values()), ddof=1) / count**0.5
    assert judged["verdict"] == "inconclusive"
    assert smallest_difference(judged) == pytest.approx(least, rel=1e-9)
    assert f"that {count} seeds of this spread could show is {least:.2g}" in show_evidence(judged, {})


def test_the_smallest_difference_is_told_in_the_unit_that_the_table_shows() -> None:
    judged = judge(_claim(0.21), _spec(), _values({0: 0.80, 1: 0.82, 2: 0.84}, {0: 0.6, 1: 0.61, 2: 0.62}))
    percent, seconds = {"scale": 100.0, "unit": "%"}, {"scale": 1.0, "unit": "s"}
    assert show_evidence(judged, {"m": percent}).endswith(" is 2.5 points")  # 0.024841, the half width below
    assert show_evidence(judged, {"m": seconds}).endswith(" is 0.025 s")


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        ("a['m'] - b['m']", "m"),
        ("max(a['m'], b['m']) - 0.5 * mean(a['m'], 3)", "m"),
        ("-abs(deviation(a['m'])) / 2 + 1", "m"),
        ("a['m'] / b['m']", None),
        ("a['m'] * b['m']", None),
        ("1 / a['m']", None),
        ("log(a['m'])", None),
        ("a['m'] - b['n']", None),
        ("(a['m'] - b['m']) * (2 / 4)", "m"),
    ],
)
def test_a_difference_has_the_unit_of_its_metric_and_a_ratio_has_none(text: str, metric: str | None) -> None:
    assert metric_of(text) == metric


@pytest.mark.parametrize("margin", [-9.0, 9.0])
def test_a_claim_with_another_verdict_says_none(margin: float) -> None:
    judged = judge(_claim(margin), _spec(), _values({0: 1.0, 1: 1.1, 2: 1.2}, {0: 0.0, 1: 0.0, 2: 0.0}))
    assert smallest_difference(judged) is None
    assert show_evidence(judged, {}) == judged["evidence"]["why"]


def test_pairing_removes_what_seeds_share() -> None:
    shared = {0: 0.1, 1: 0.5, 2: 0.9}
    judged = judge(_claim(0.009), _spec(), _values({s: v + 0.01 for s, v in shared.items()}, shared))
    assert judged["verdict"] == "reproduced"


def test_equal_differences_give_a_point_not_an_error() -> None:
    values = _values({0: 2.0, 1: 3.0, 2: 4.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    assert judge(_claim(0.5), _spec(), values)["verdict"] == "reproduced"
    assert judge(_claim(1.0), _spec(), values)["verdict"] == "not_reproduced"
    assert judge(_claim(0.5), _spec(), values)["evidence"]["interval"] == [1.0, 1.0]


def test_only_seeds_that_both_rows_have_count() -> None:
    judged = judge(_claim(), _spec(seeds=(0, 1, 2, 3)), _values({0: 1, 1: 1, 2: 1, 3: 1}, {1: 0, 2: 0}))
    assert judged["verdict"] == "not_tested"
    assert judged["evidence"]["by_seed"] == {"1": 1.0, "2": 1.0}
    assert "2 of at least 3 seeds" in judged["evidence"]["why"]
    assert "seed 0: no b/m" in judged["evidence"]["why"]


def test_a_claim_of_the_paper_is_not_tested_at_reduced_scale() -> None:
    values = _values({0: 1.0, 1: 1.1, 2: 1.2}, {0: 0.0, 1: 0.0, 2: 0.0})
    small = judge(_claim(scope="paper"), _spec("small"), values)
    assert (small["verdict"], small["counts_for_paper"]) == ("not_tested", False)
    paper = judge(_claim(scope="paper"), _spec("paper"), values)
    assert (paper["verdict"], paper["counts_for_paper"]) == ("reproduced", True)


def test_a_reduced_claim_never_counts_for_the_paper() -> None:
    values = _values({0: 1.0, 1: 1.1, 2: 1.2}, {0: 0.0, 1: 0.0, 2: 0.0})
    for scale in ("small", "paper"):
        assert judge(_claim(), _spec(scale), values)["counts_for_paper"] is False


@pytest.mark.parametrize("expr", ["a['m'] / b['m']", "log(b['m']) + a['m']"])
def test_a_seed_without_a_value_is_named_and_left_out(expr: str) -> None:
    judged = judge(_claim(expr=expr, min_seeds=2), _spec(), _values({0: 1, 1: 2, 2: 4}, {0: 0, 1: 1, 2: 1}))
    assert list(judged["evidence"]["by_seed"]) == ["1", "2"]
    assert "seed 0:" in judged["evidence"]["why"]


def test_deviations_compare_spreads_as_brown_and_forsythe_do() -> None:
    draw = random.Random(0)
    seeds = tuple(range(12))
    wide, narrow = {s: draw.gauss(5, 4.0) for s in seeds}, {s: draw.gauss(-3, 0.5) for s in seeds}
    judged = judge(_claim(expr="deviation(a['m']) - deviation(b['m'])"), _spec(seeds=seeds), _values(wide, narrow))
    # SciPy's statistic is the square of the t of unpaired deviations; its means are ours.
    first, second = (np.abs(np.array(list(v.values())) - np.median(list(v.values()))) for v in (wide, narrow))
    expected = ttest_1samp(first - second, 0.0).confidence_interval(0.95)
    assert judged["evidence"]["interval"] == pytest.approx([expected.low, expected.high], rel=1e-9)
    assert ttest_ind(first, second).statistic ** 2 == pytest.approx(
        levene(list(wide.values()), list(narrow.values()), center="median").statistic
    )
    assert judged["verdict"] == "reproduced"


def test_no_values_at_all_is_not_tested() -> None:
    judged: dict[str, Any] = judge(_claim(), _spec(), {})
    assert judged["verdict"] == "not_tested"
    assert "interval" not in judged["evidence"]
