"""A table's YAML: what it means and how each mistake is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from leanlight.contracts import UserError
from leanlight.registry import METHODS
from leanlight.results.expression import parse_expression
from leanlight.results.table import make_cells
from leanlight.results.table_spec import load_table


def test_a_table_reads_as_written(suite: Any) -> None:
    spec = load_table(str(suite.table()))
    assert [row.name for row in spec.rows] == ["good", "bad"]
    assert spec.seeds == (0, 1, 2)
    assert spec.checkpoint == "last"
    assert spec.metrics["test/accuracy"].scale == 100
    assert spec.metrics["test/energy_pj"].optional
    assert spec.rows[0].method == "classifier"
    assert spec.claims[0].min_seeds == 3
    assert spec.claims[0].expr.references == (("good", "test/accuracy"), ("bad", "test/accuracy"))


def test_a_row_may_run_at_some_of_the_seeds(suite: Any, tmp_path: Path) -> None:
    path = suite.table()
    content = yaml.safe_load(path.read_text())
    content["rows"][1]["seeds"] = [1]
    path.write_text(yaml.safe_dump(content))
    cells = make_cells(load_table(str(path)), tmp_path)
    assert [(cell.seed, cell.row.name) for cell in cells] == [(0, "good"), (1, "good"), (1, "bad"), (2, "good")]


def test_replicas_are_neighbouring_seeds(suite: Any) -> None:
    spec = load_table(str(suite.table(seeds=[0, 1, 2, 5, 6, 9], replicas=2)))
    assert spec.rows[0].runs() == [(0, 1), (2,), (5, 6), (9,)]
    assert load_table(str(suite.table())).rows[0].runs() == [(0,), (1,), (2,)]


def test_a_curve_has_a_line_for_every_row_unless_it_names_some(suite: Any) -> None:
    curves = [NOISE, {**NOISE, "title": "Good", "rows": ["good"]}]
    every, some = load_table(str(suite.table(curves=curves))).curves
    assert every.groups == {"good": ("good",), "bad": ("bad",)}
    assert some.groups == {"good": ("good",)}
    assert every.at == {0: "test/accuracy"}


@pytest.mark.parametrize("name", [table for info in METHODS.values() for table in info.tables])
def test_every_table_of_the_suite_loads(name: str) -> None:
    spec = load_table(name)
    assert len(spec.seeds) >= 3
    assert spec.name == name


def _set(path: str, value: Any) -> Any:
    def change(content: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        place: Any = content
        for key in parents:
            place = place[int(key) if key.isdigit() else key]
        if value is None:
            del place[last]
        else:
            place[int(last) if last.isdigit() else last] = value

    return change


NOISE = {"title": "Noise", "x": "severity", "at": {0: "test/accuracy"}}
MISTAKES = [
    (_set("sedes", [0]), "two.yaml: key 'sedes' is unknown (did you mean 'seeds'?)"),
    (_set("title", None), "two.yaml: key 'title' is missing"),
    (
        _set("profile", {"metric": "test/acuracy", "groups": {"a": ["good"]}}),
        "two.yaml: profile: metric must be one of",
    ),
    (_set("profile", {"metric": "test/accuracy", "groups": {}}), "two.yaml: profile: groups is empty"),
    (
        _set("profile", {"metric": "test/accuracy", "groups": {"a": ["god"]}}),
        "two.yaml: profile: groups 'a': no row 'god' (did you mean 'good'?)",
    ),
    (
        _set("profile", {"metric": "test/accuracy", "groups": {"a": "good"}}),
        "two.yaml: profile: groups 'a' must be a list of rows, got 'good'",
    ),
    (
        _set("curves", [{"x": "width", "metric": "test/accuracy", "groups": {"a": ["god"]}}]),
        "two.yaml: curves[0]: groups 'a': no row 'god' (did you mean 'good'?)",
    ),
    (
        _set("curves", [{"x": "depth", "metric": "test/accuracy", "groups": {"a": ["good"]}}]),
        "two.yaml: curves[0]: setting 'depth' of row good must be a finite number, got None",
    ),
    (_set("curves", [{"x": "depth"}]), "two.yaml: curves[0]: expected either metric or at"),
    (
        _set("curves", [{**NOISE, "metric": "test/accuracy"}]),
        "two.yaml: curves[0]: expected either metric or at",
    ),
    (
        _set("curves", [{**NOISE, "rows": ["good"], "groups": {"a": ["good"]}}]),
        "two.yaml: curves[0]: expected groups or rows, not both",
    ),
    (_set("curves", [{**NOISE, "rows": ["god"]}]), "two.yaml: curves[0]: rows: no row 'god' (did you mean 'good'?)"),
    (_set("curves", [{**NOISE, "at": {}}]), "two.yaml: curves[0]: at is empty; name at least one number"),
    (
        _set("curves", [{**NOISE, "at": {"one": "test/accuracy"}}]),
        "two.yaml: curves[0]: at: expected finite numbers, got 'one'",
    ),
    (
        _set("curves", [{**NOISE, "at": {1: "test/acuracy"}}]),
        "two.yaml: curves[0]: at: 1 names no metric of this table: 'test/acuracy' (did you mean 'test/accuracy'?)",
    ),
    (
        _set("curves", [{**NOISE, "at": {0: "test/accuracy", 1: "test/energy_pj"}}]),
        "two.yaml: curves[0]: at: test/accuracy and test/energy_pj differ in unit or scale",
    ),
    (_set("curves", [NOISE, NOISE]), "two.yaml: curves: title 'Noise' stands twice"),
    (
        _set("metrics", {"test/accuracy": {"label": "A", "higher_is_better": True, "column": False}}),
        "two.yaml: metrics: at least one must have a column",
    ),
    (
        _set("headline", {"metric": "test/acuracy", "rows": ["good"]}),
        "two.yaml: headline: metric must be one of",
    ),
    (
        _set("headline", {"metric": "test/accuracy", "rows": ["god"]}),
        "two.yaml: headline: rows: no row 'god' (did you mean 'good'?)",
    ),
    (_set("scale", "tiny"), "two.yaml: scale must be one of small, paper, got 'tiny'"),
    (_set("method", "../x"), "two.yaml: method: '../x' is not a folder name"),
    (_set("seeds", [0, 0]), "names a seed twice"),
    (_set("seeds", []), "seeds must be a list of whole numbers"),
    (_set("seeds", [True]), "seeds must be a list of whole numbers"),
    (_set("seeds", [-1]), "seeds must be a list of whole numbers"),
    (_set("seeds", [10**14]), "seeds must be a list of whole numbers from 0 to 4294967295"),
    (_set("rows.0.seeds", [0, 7]), "rows[0] good: seeds must be some of the table's [0, 1, 2], got 7"),
    (_set("rows.0.seeds", [1, 1]), "rows[0] good: seeds [1, 1] names a seed twice"),
    (_set("rows.0.method", "../../x"), "rows[0] good: method: '../../x' is not a folder name"),
    (_set("rows.0.name", "two words"), "rows[0]: name 'two words' must be letters"),
    (
        _set("metrics.accuracy", {"label": "A", "higher_is_better": True}),
        "metrics accuracy: is not the name of a metric",
    ),
    (_set("metrics.test/an accuracy", {"label": "A"}), "metrics test/an accuracy: is not the name of a metric"),
    (_set("rows", []), "rows is empty"),
    (_set("rows.0.lable", "x"), "rows[0]: key 'lable' is unknown (did you mean 'label'?)"),
    (_set("rows.1.name", "good"), "rows: name 'good' stands twice"),
    (_set("rows.0.name", "a-b"), "rows[0]: name 'a-b' must be letters"),
    (_set("rows.0.config", "classifier/fashion_mnist_smal"), "rows[0] good: config 'classifier/fashion_mnist_smal'"),
    (_set("rows.0.config", None), "rows[0] good: expected either config or pipeline"),
    (_set("rows.0.stage", "x"), "stage belongs to a pipeline"),
    (_set("rows.0.overrides", {"seed_everything": 1}), "overrides: seed_everything is set by the table"),
    (_set("rows.0.paper", {"test/acuracy": {}}), "did you mean 'test/accuracy'?"),
    (_set("rows.0.paper", {"test/accuracy": {"value": "91", "source": "T"}}), "value must be int or float, got '91'"),
    (_set("metrics", {}), "metrics is empty"),
    (_set("metrics.test/accuracy.digits", 12), "digits must be 0 to 9, got 12"),
    (_set("metrics.test/accuracy.scale", float("nan")), "scale must be finite"),
    (_set("metrics.test/accuracy.higher_is_better", "yes"), "higher_is_better must be bool, got 'yes'"),
    (_set("claims.0.min_seeds", 1), "claims[0] better: min_seeds must be at least 2"),
    (_set("claims.0.margin", True), "margin must be int or float, got True"),
    (_set("claims.0.expr", "god['test/accuracy']"), "no row 'god' (did you mean 'good'?)"),
    (_set("claims.0.expr", "good['test/acc']"), "no metric 'test/acc'"),
    (_set("claims.0.expr", "1 + 1"), "reads no row"),
    (_set("claims.0.expr", "good['test/accuracy'] -"), "is not an arithmetic expression"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_line_that_says_where(suite: Any, change: Any, message: str) -> None:
    content = copy.deepcopy(yaml.safe_load(suite.table().read_text()))
    change(content)
    with pytest.raises(UserError) as error:
        load_table(str(suite.write("two.yaml", content)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_file_of_a_table_names_its_runs_so_its_name_is_checked(suite: Any) -> None:
    path = suite.table().rename(suite.folder / "two words.yaml")
    with pytest.raises(UserError, match=r"two words.yaml: file name: 'two words' is not a folder name"):
        load_table(str(path))


def test_a_key_written_twice_is_refused(suite: Any) -> None:
    path = suite.table()
    path.write_text(path.read_text() + "title: again\n")
    with pytest.raises(UserError, match=r"two.yaml line \d+: key 'title' stands twice"):
        load_table(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "good.test",
        "good['test/accuracy'].real",
        "good['test/accuracy'] ** 999999999",
        "(lambda: 1)()",
        "[1][0]",
        "open('x')",
        "good[0]",
        "max(good['test/accuracy'], key=abs)",
        "max(*good)",
        "good['test/accuracy'] if 1 else 2",
        "'a' * 9",
        "abs()",
        "log(1, good['test/accuracy'])",
        "-" * 2000 + "1",
        "-" * 900 + "good['test/accuracy']",
        "1 + " * 200 + "good['test/accuracy']",
        "good['test/accuracy'] + 1e400",
        "good['test/accuracy'] + " + "9" * 400,
    ],
)
def test_an_expression_admits_nothing_but_arithmetic(text: str) -> None:
    with pytest.raises(UserError):
        parse_expression(text, ["good"], ["test/accuracy"], "claim")


def test_an_expression_computes() -> None:
    text = "mean(a['m'], b['m'], 3) - -abs(min(a['m'], -1)) / (2 * max(1, 2)) + log(b['m'])"
    expression = parse_expression(text, ["a", "b"], ["m"], "claim")
    assert expression.evaluate({("a", "m"): 5.0, ("b", "m"): 1.0}) == pytest.approx(3 + 1 / 4 + 0)
