"""The list of selection rules against the classes that it names."""

import dataclasses
import importlib

import pytest

from leanlight.contracts import UserError
from leanlight.selection_rules import RULES, rule
from lit_modules.selection import FIELDS, Rule


@pytest.mark.parametrize("info", RULES.values(), ids=RULES.keys())
def test_a_rule_is_a_class_that_needs_what_the_list_says(info):
    package, name = info.target.rsplit(".", 1)
    made = getattr(importlib.import_module(package), name)()
    assert isinstance(made, Rule)
    assert dataclasses.is_dataclass(made)
    assert made.needs == info.needs
    assert set(info.needs) <= set(FIELDS)


def test_an_unknown_rule_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"rule: 'hearding' is none.*herding"):
        rule("hearding")
