"""From a class that a config or a command line names to an object of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jsonargparse
import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from leanlight.contracts import UserError
from lit_modules.admission import only_admitted


def admitted_object(
    kind: type, key: str, named: Mapping[str, Any], trust: Iterable[str], make: Callable[[Any], Any] | None = None
) -> Any:
    """An object of the `kind` that ``{class_path, init_args}`` names; its package must be admitted.

    Args:
        kind: base class.
        key: how messages call it.
        named: class_path, and init_args where they are not the defaults; values must have the types of the arguments.
        trust: packages outside the suite that it may name.
        make: makes the object of the parsed ``{class_path, init_args}``; by default the parser does.

    Raises:
        jsonargparse.ArgumentError: and ValueError, TypeError, ImportError; `leanlight.messages.one_line` reads them.
    """
    jsonargparse.set_parsing_settings(subclasses_enabled=[kind])  # of a dataclass it would take no heirs
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, key, fail_untyped=False)
    wanted = {"class_path": named["class_path"], "init_args": named.get("init_args") or {}}
    with only_admitted(trust):
        config = parser.parse_object({key: wanted})
        return make(config[key]) if make else parser.instantiate_classes(config)[key]


def check_optimizers(named: Any, where: str) -> None:
    """Try what a configuration gives to optimisers and schedules, which otherwise refuse it when training begins.

    Args:
        named: nested values with ``{class_path, init_args}``; the parser has imported the classes.
        where: its dotted key.

    Raises:
        UserError: a class takes no such value.
    """
    if not isinstance(named, Mapping):
        return
    for key, value in named.items():
        check_optimizers(value, f"{where}.{key}")
    package, _, name = str(named.get("class_path")).rpartition(".")
    found, given = getattr(sys.modules.get(package), name, None), named.get("init_args") or {}
    if not isinstance(found, type) or any(isinstance(value, Mapping) or callable(value) for value in given.values()):
        return
    parameters = [torch.nn.Parameter(torch.zeros(1, 1))]
    try:
        if issubclass(found, Optimizer):
            found(parameters, **given)
        elif issubclass(found, LRScheduler):
            scheduler = found(optimizer := SGD(parameters, lr=0.1, momentum=0.9), **given)
            if not isinstance(scheduler, ReduceLROnPlateau):  # some divide by what they are given at their first step
                optimizer.step()
                scheduler.step()
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{where}: {name}: {error}") from error
