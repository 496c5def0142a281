"""Configs, tables, pipelines and expressions changed at random: taken, or refused in one line; nothing else is called.

Each file stands in a folder of a run, as one that came from elsewhere: what it names beside the suite is not trusted.
"""

import copy
import math
import signal
import string
import sys
from contextlib import contextmanager, suppress
from functools import cache

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leanlight.configs_path import config_names, config_root, find_config
from leanlight.contracts import UserError
from leanlight.experiment import resolve
from leanlight.invocation import read_config
from leanlight.results.expression import parse_expression
from leanlight.results.pipeline_spec import load_pipeline
from leanlight.results.reading import read_mapping
from leanlight.results.table_spec import load_table

pytestmark = pytest.mark.slow
SECONDS = 20  # of the processor, for one example, at the most
# What the folder holds is written anew for each example, and what a first example imports takes its time.
BOUNDED = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
FOREIGN = """
from pathlib import Path
Path({mark!r}).write_text("called")
def __getattr__(name):
    return lambda *a, **k: None
"""
CALLS = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "pathlib.Path.unlink",
    "foreign.Thing",
    "torch.load",
    "shutil.rmtree",
]
WORDS = [*CALLS, "${oc.env:HOME}", "${data}", "${", "${model.init_args}", "../../x", "!!python/object:os.system", "nan"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**63, 10**30]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(WORDS),
    st.sampled_from(CALLS).map(lambda name: {"class_path": name, "init_args": {"args": ["touch", "called"]}}),
)
KEYS = st.text(max_size=8) | st.integers() | st.booleans() | st.none()
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


@cache
def originals(kind):
    """Contents of the suite's own files: configs, tables or pipelines."""
    if kind == "configs":
        paths = [find_config(name) for name in config_names()]
    else:
        paths = sorted(config_root().glob(f"*/{kind}/*.yaml"))
    return [content for path in paths if isinstance(content := yaml.safe_load(path.read_text()), dict)]


def places(content):
    """(container, key) of everything that is nested in `content`."""
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        yield from places(content[key])


@st.composite
def mutated(draw, kind):
    """One of the suite's files with up to three changes."""
    content = copy.deepcopy(draw(st.sampled_from(originals(kind))))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(content))
        if not found:
            break
        container, key = draw(st.sampled_from(found))
        match draw(st.sampled_from(["delete", "retype", "swap", "insert", "rename"])):
            case "delete":
                del container[key]
            case "retype":
                container[key] = draw(VALUES)
            case "swap":
                other, place = draw(st.sampled_from(found))
                container[key], other[place] = copy.deepcopy((other[place], container[key]))
            case "insert" if isinstance(container, dict):
                container[draw(st.text(max_size=10) | st.sampled_from(["class_path", "init_args", "extends"]))] = draw(
                    VALUES
                )
            case "rename" if isinstance(container, dict):
                container[str(key) + draw(st.sampled_from("_.s"))] = container.pop(key)
            case _:
                container[key] = [copy.deepcopy(container[key])] * 2
    return content


@contextmanager
def limited():
    """Fails what takes longer than `SECONDS` of the processor, however loaded the machine is."""

    def stop(*_):
        raise AssertionError(f"takes longer than {SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def tried(function, *arguments):
    """(what a function returns, the text of its UserError), one of them empty."""
    try:
        return function(*arguments), ""
    except UserError as error:
        return None, str(error) or "empty\n"


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """Call something: it returns or raises a UserError of one line; nothing foreign is called, nothing written."""
    mark = tmp_path / "mark"
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (tmp_path / "foreign.py").write_text(FOREIGN.format(mark=str(mark)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("LEANLIGHT_TRUST", raising=False)

    def refuse(*_, **__):
        raise AssertionError("something foreign was called")

    for name in ("os.system", "subprocess.Popen", "shutil.rmtree", "torch.load"):
        monkeypatch.setattr(name, refuse)

    def call(function, content):
        path = folder / "config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else yaml.safe_dump(content).encode())
        before = sorted(tmp_path.rglob("*"))
        with limited():
            _, line = tried(function, path)
        assert "\n" not in line
        assert len(line) < 2000
        assert not mark.exists()
        assert [each for each in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(each)] == before

    yield call
    sys.modules.pop("foreign", None)


@settings(BOUNDED, max_examples=100)
@given(content=mutated("configs"))
def test_a_config_changed_at_random_is_taken_or_refused_in_a_line(outcome, content):
    outcome(lambda path: resolve("fit", ["--config", str(path)]), content)


@settings(BOUNDED, max_examples=150)
@given(content=mutated("tables"))
def test_a_table_changed_at_random_is_taken_or_refused_in_a_line(outcome, content):
    outcome(lambda path: load_table(str(path)), content)


@settings(BOUNDED, max_examples=40)
@given(content=mutated("pipelines"))
def test_a_pipeline_changed_at_random_is_taken_or_refused_in_a_line(outcome, content):
    outcome(lambda path: load_pipeline(str(path)), content)


YAML = st.lists(
    st.sampled_from(
        [
            "a",
            "b",
            ": ",
            "\n",
            "  ",
            "- ",
            "[",
            "]",
            "{",
            "}",
            "&x ",
            "*x",
            "<<: ",
            "!!python/object:os.system ",
            "'",
            '"',
            "? ",
            "#",
            "|",
            ">",
            "%",
            "0",
            ".nan",
            "2020-01-01",
            "\t",
        ]
    ),
    max_size=40,
).map(lambda parts: "".join(parts).encode())


@settings(BOUNDED, max_examples=1500)
@given(content=YAML | st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_yaml_or_refused_in_a_line(outcome, content):
    outcome(read_config, content)
    outcome(read_mapping, content)


TOKENS = [
    "a",
    "b",
    "['m']",
    "['n']",
    "(",
    ")",
    "+",
    "-",
    "*",
    "/",
    "**",
    "1",
    "0",
    "1e309",
    ",",
    " ",
    "mean",
    "log",
    "abs",
    "max",
    "deviation",
    "__import__",
    ".",
    ":=",
    "lambda",
    "if",
    "\n",
    "@",
]
EXPRESSIONS = st.lists(st.sampled_from(TOKENS), max_size=30).map("".join) | st.text(string.printable, max_size=40)
GROWN = st.recursive(
    st.sampled_from(["a['m']", "b['n']", "0", "2.5", "1e308"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({''.join(parts)})"),
        inner.map("-{}".format),
        st.tuples(st.sampled_from(["mean", "min", "max", "abs", "log", "deviation"]), inner).map(
            lambda p: f"{p[0]}({p[1]})"
        ),
    ),
    max_leaves=12,
)


@settings(BOUNDED, max_examples=2000)
@given(text=EXPRESSIONS | GROWN | st.integers(1, 3000).map(lambda n: "-" * n + "a['m']"))
def test_an_expression_has_a_finite_value_or_is_refused_in_a_line(text):
    with limited():
        expression, line = tried(parse_expression, text, ["a", "b"], ["m", "n"], "claim")
        assert "\n" not in line
        values = {(row, metric): 0.5 for row in "ab" for metric in "mn"}
        with suppress(ArithmeticError, ValueError):
            assert expression is None or math.isfinite(expression.evaluate(values, values))
