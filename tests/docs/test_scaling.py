"""The table of what runs on GPUs says what the declarations of the methods say, and calls measured what was."""

import copy
import re
from functools import cache
from pathlib import Path

import pytest

from leanlight.checks import check_config
from leanlight.contracts import UserError
from leanlight.experiment import resolve
from leanlight.registry import METHODS

ROOT = Path(__file__).parents[2]
WORDS = {"runs", "on CPUs", "unproven", "refused"}
SETTINGS = {
    "`gpu`": {},
    "`gpus`, `ddp`": {"strategy": "ddp"},
    "`slurm`": {"strategy": "ddp"},
    "`bf16`": {"precision": "bf16-mixed"},
    "`precision: 16-mixed`": {"precision": "16-mixed"},
    "`fsdp`": {"strategy": "fsdp"},
}


def rows():
    text = (ROOT / "docs/scaling.md").read_text().split("## What runs, what is refused, what is unproven")[1]
    lines = [line for line in text.split("\n\n")[2].splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


@cache
def resolved_of(name):
    return resolve("fit", ["--config", METHODS[name].smallest])


def is_refused(name, setting):
    config = copy.deepcopy(resolved_of(name))
    config["trainer"] |= setting
    try:
        check_config(config)
    except UserError:
        return True
    return False


def test_the_table_has_every_method_and_says_runs_only_of_what_was_measured():
    table = rows()
    assert table.keys() == METHODS.keys()
    for name, cells in table.items():
        assert cells.keys() == SETTINGS.keys()
        assert {*cells.values()} <= WORDS
        assert "runs" not in cells.values() or (ROOT / "docs/results" / name / "gpu.json").is_file()


@pytest.mark.parametrize("name", METHODS)
def test_a_cell_says_refused_exactly_where_the_method_refuses(name):
    for column, cell in rows()[name].items():
        assert (cell == "refused") == is_refused(name, SETTINGS[column]), column


def test_every_overlay_of_the_trainer_is_named():
    named = set(re.findall(r"`trainer/(\w+)`", (ROOT / "docs/scaling.md").read_text()))
    assert named == {path.stem for path in (ROOT / "configs/trainer").glob("*.yaml")}
