"""What the README and the pages beside it show runs, exists, and is what the registry says."""

import re
from pathlib import Path

import pytest
from run_example import run_example

from leanlight.configs_path import find_config
from leanlight.registry import METHODS, commands

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_a_python_example_trains_and_tests(code, tmp_path):
    assert "test/accuracy" in run_example(code, tmp_path)


def test_every_config_it_names_exists():
    names = re.findall(r"(?:--config|reproduce|run) ([a-z_]+/[\w/]+)", README)
    assert {name.split("/")[0] for name in names} >= {*METHODS}
    for name in names:
        assert find_config(name).is_file(), name


def test_every_command_it_shows_exists():
    shown = {*re.findall(r"^leanlight (\w+)", README, re.MULTILINE)}
    assert {*commands()} - shown <= {"validate", "predict", "benchmark"}
    assert shown <= {*commands()}


def test_its_table_of_methods_is_the_registry():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]*) \|", section("Methods"), re.MULTILINE)
    papers = {info.name: info.citation.arxiv if info.citation else "" for info in METHODS.values()}
    assert [name for name, _, _ in rows] == list(METHODS)
    for name, title, paper in rows:
        assert title.strip() == METHODS[name].title
        assert papers[name] in paper


def test_five_files_are_named_to_read_first():
    files = re.findall(r"^\d\. \[`([^`]+)`\]\(([^)]+)\)", section("Five files to read first"), re.MULTILINE)
    assert len(files) == 5
    for name, target in files:
        assert name == target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_a_page_points_to_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = {page.parent / target.split("#")[0] for target in re.findall(r"\]\(([^):]+)\)", text)}
    tops = "leanlight|lit_modules|datamodules|callbacks|configs|scripts|tests|docs"
    links |= {ROOT / path for path in re.findall(rf"`((?:{tops})/[\w./-]*\w/?)`", text)}
    assert [str(path) for path in links if not path.exists()] == []
