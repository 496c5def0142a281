"""The registry says what is there: papers as they are cited, commands that import, extras that exist."""

import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from leanlight.registry import METHODS, Citation, commands

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
JOURNAL = Citation(
    ("Ada A. Ng", "Bo Li"), "Less-is More: a Study", "A Journal", 2024, "2401.00001", "10.1/x", journal=True
)


@pytest.mark.parametrize("info", METHODS.values(), ids=lambda info: info.name)
def test_an_entry_names_what_exists(info):
    assert info.extra == "" or info.extra in EXTRAS
    assert info.smallest in info.configs
    package, _, name = info.module.rpartition(".")
    assert hasattr(import_module(package), name)
    if info.benchmark:
        package, _, name = info.benchmark.partition(":")
        assert callable(getattr(import_module(package), name))


@pytest.mark.parametrize("command", commands().values(), ids=lambda command: command.name)
def test_a_command_has_a_module_that_runs_it(command):
    assert callable(import_module(command.module).main)
    assert command.help


def test_stages_without_training_check_their_options_before_they_run():
    stages = [command for command in commands().values() if command.stage]
    assert [command.name for command in stages] == ["export", "select"]
    for command in stages:
        module = import_module(command.module)
        assert "--output" in module.parser().format_usage()
        assert callable(module.arguments)


def test_a_citation_is_one_line_and_a_bibtex_entry():
    assert JOURNAL.text == "Ada A. Ng, Bo Li. Less-is More: a Study. A Journal 2024, arXiv:2401.00001, doi:10.1/x"
    assert JOURNAL.bibtex == (
        "@article{ng2024less,\n  author = {Ada A. Ng and Bo Li},\n  title = {{Less-is More: a Study}},\n"
        "  journal = {A Journal},\n  year = {2024},\n  eprint = {2401.00001},\n  archivePrefix = {arXiv},\n"
        "  doi = {10.1/x},\n}"
    )


def test_a_citation_whose_year_at_the_venue_is_unknown_is_that_of_the_preprint():
    entry = Citation(("Bo Li",), "More", "A Journal", arxiv="2301.1", journal=True).bibtex
    assert entry.startswith("@misc{li2023more,")
    assert "year = {2023}" in entry
    assert "note = {A Journal}" in entry
    assert "journal =" not in entry


def test_a_plain_paper_of_a_conference_needs_no_arxiv_identifier():
    paper = Citation(("Bo Li",), "More", "A Conference", 2025)
    assert paper.text == "Bo Li. More. A Conference 2025"
    assert paper.bibtex.startswith("@inproceedings{li2025more,")
