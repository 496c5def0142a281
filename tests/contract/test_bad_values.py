"""Every argument of every class that a config can name refuses a wrong type and a number out of range, in one line."""

import inspect
import math
import pkgutil
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import lightning.pytorch as pl
import pytest
import yaml
from torch import Tensor
from torchmetrics import Metric

import lit_modules
from leanlight.configs_path import config_names, find_config
from leanlight.contracts import UserError
from leanlight.contracts.ranges import Range
from leanlight.parser import LeanlightParser, restrict

PACKAGES = [
    "callbacks",
    "datamodules",
    *(f"lit_modules.{package.name}" for package in pkgutil.iter_modules(lit_modules.__path__) if package.ispkg),
]
# Classes that take facts of the data; and an argument whose numbers the data limit: names, or positions among them.
MADE_BY_CODE = ("EmotionNetwork", "Facts")
FREE = ("given.classes",)


@cache
def named_in_configs():
    """Every class that a config of the suite names."""
    found = set()

    def walk(value):
        if isinstance(value, dict):
            found.add(value.get("class_path"))
            value = list(value.values())
        for item in value if isinstance(value, list) else ():
            walk(item)

    for name in config_names():
        walk(yaml.safe_load(find_config(name).read_text()))
    return {path for path in found if isinstance(path, str)}


def classes(package):
    """Classes of `package` that a config names or could name: what the package exports."""
    names = {f"{package}.{name}" for name in getattr(import_module(package), "__all__", [])}
    names |= {path for path in named_in_configs() if path.startswith(f"{package}.")}
    found = [getattr(import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in sorted(names)]
    return list(dict.fromkeys(each for each in found if inspect.isclass(each) and can_be_named(each)))


def can_be_named(kind):
    """Whether a config can give all that a class takes: not a protocol, a record of the catalogue or a metric."""
    made_by_code = getattr(kind, "_is_protocol", False) or issubclass(kind, Metric) or kind.__name__.endswith("Info")
    return not made_by_code and kind.__name__ not in MADE_BY_CODE


def leaves(hint):
    """The types at the ends of a nested type."""
    inner = [each for each in get_args(hint) if each is not Ellipsis]
    return [leaf for each in inner for leaf in leaves(each)] if inner and get_origin(hint) is not Literal else [hint]


def wrong_type(hint):
    """A value that `hint` does not admit."""
    return "text" if any((get_origin(each) or each) is dict for each in alternatives(hint)) else {"not": "this"}


def alternatives(hint):
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def wrap(hint, value):
    """`value` in place of each item of a sequence, where `hint` is one."""
    kinds = [each for each in alternatives(hint) if each is not NoneType]
    origin, inner = get_origin(kinds[0]), get_args(kinds[0])
    if len(kinds) > 1 or not inner or origin is Literal:
        return value
    if origin is dict or origin is Mapping:
        return {"any": value}
    items = [wrap(each, value) for each in inner if each is not Ellipsis]
    return items if origin is tuple and Ellipsis not in inner else items[:1]


def out_of_range(hint):
    """Numbers that lie outside of every range in `hint`."""
    ranges = [leaf for leaf in leaves(hint) if isinstance(leaf, type) and issubclass(leaf, Range)]
    if not ranges:
        return
    tried = {
        each for kind in ranges for each in (kind.low - 1, *kind.opens, kind.high + 1, 2**63) if math.isfinite(each)
    }
    for number in [*sorted(tried), math.nan, math.inf]:
        given = int(number) if all(kind.base is int for kind in ranges) and math.isfinite(number) else float(number)
        if not any(holds(kind, given) for kind in ranges):
            yield wrap(hint, given)


def holds(kind, number):
    try:
        kind.read(number)
    except ValueError:
        return False
    return True


def refusal(parser, key, value):
    """The line with which `parser` refuses a value; empty when it takes it."""
    group, name = key.split(".", 1)
    try:
        parser.parse_object({group: {name: value}})
    except UserError as error:
        # A required argument that is not there says that this one was taken.
        return "" if "required, but not given" in str(error) else str(error)
    return ""


def faults(parser, arguments):
    """How many wrong values were tried; (key, value, line) of each that is taken, or refused without help."""
    tried, wrong = 0, []
    for key, hint in arguments:
        for value in (wrong_type(hint), *out_of_range(hint)):
            tried += 1
            line = refusal(parser, key, value)
            if not line.startswith(key) or "\n" in line or len(line) > 250 or "Union subtypes" in line:
                wrong.append((key, value, line))
    return tried, wrong


def arguments_of(parser, group):
    """(key, type) of every argument that is not of any type."""
    return [
        (action.dest, action._typehint)
        for action in parser._actions
        if action.dest.startswith(f"{group}.") and not action.dest.endswith(".help")
        if getattr(action, "_typehint", None) is not None
        if Any not in leaves(action._typehint) and object not in leaves(action._typehint)
    ]


def parser_of(kind):
    parser = LeanlightParser()
    parser.add_class_arguments(kind, "given", fail_untyped=False)
    return parser


@pytest.mark.parametrize("package", PACKAGES)
def test_every_argument_of_a_class_refuses_a_wrong_type_and_a_number_out_of_range(package):
    tried, wrong, bare = 0, [], []
    for kind in classes(package):
        parser = parser_of(kind)
        arguments = arguments_of(parser, "given")
        if any(Tensor in leaves(hint) for _, hint in arguments):
            continue  # what the suite's own code makes, not a config
        count, found = faults(parser, arguments)
        tried, wrong = tried + count, wrong + [(kind.__name__, *fault) for fault in found]
        bare += [(kind.__name__, key) for key, hint in arguments if has_bare_number(parser, key, hint)]
    assert tried >= 30
    assert wrong == []
    assert [each for each in bare if each[1] not in FREE] == [], "give them a range"


def has_bare_number(parser, key, hint):
    """Whether a config may give a number without a range; what has no default is given by code."""
    action = next(action for action in parser._actions if action.dest == key)
    return not action.required and any(leaf in (int, float) for leaf in leaves(hint))


def test_every_number_of_the_trainer_and_the_seed_have_a_range():
    parser = LeanlightParser()
    parser.add_lightning_class_args(pl.Trainer, "trainer")
    restrict(parser)
    numbers = [(key, hint) for key, hint in arguments_of(parser, "trainer") if list(out_of_range(hint))]
    tried, wrong = faults(parser, numbers)
    assert tried > 40
    assert wrong == []
