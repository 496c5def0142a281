"""Hyper-parameters that a checkpoint can hold and rebuild, for modules made by a config and for modules made in Python.

LightningCLI saves the arguments of a module as its config: classes as ``{class_path, init_args}``. A module made in
Python has live objects instead (``functools.partial(ConvNet, width=16)``), which ``torch.load(weights_only=True)``
refuses. `save_hparams` writes them in LightningCLI's form, so that there is one form of checkpoint and one way back.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import instantiate_module
from lightning.pytorch.core import saving

from leanlight.contracts import UserError
from lit_modules.admission import named_packages, only_admitted

_REBUILD = "lit_modules.hparams.rebuild"
_TESTED = "2.6.6"

# Lightning has no public name for either. `_given_hyperparameters_context` makes `save_hyperparameters` write what it
# is given instead of live arguments; the other is the list of functions that a checkpoint may name to rebuild its
# module.
try:
    from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context

    saving._ALLOWED_INSTANTIATORS.add(_REBUILD)
except (ImportError, AttributeError) as error:
    raise UserError(
        f"lightning: {lightning.__version__} lacks what checkpoints are rebuilt with ({error}); tested is {_TESTED}: "
        f"pip install lightning=={_TESTED}"
    ) from error


def save_hparams(module: LightningModule) -> None:
    """Save a module's arguments in LightningCLI's form; call it in ``__init__`` instead of ``save_hyperparameters()``.

    ``load_from_checkpoint(weights_only=True)`` then rebuilds the module, and so does a checkpoint of the rebuilt
    module.

    Args:
        module: the module under construction.

    Raises:
        UserError: an argument cannot be written down; the message names it.
    """
    frame = inspect.currentframe()
    assert frame is not None
    module.save_hyperparameters(frame=frame.f_back, logger=False)
    if "_instantiator" not in module.hparams:  # made in Python: the arguments are live objects
        known = _arguments(type(module), module.hparams)
        config = {name: encode(value, name) for name, value in known.items()}
        with _given_hyperparameters_context({**config, "_class_path": _import_path(type(module), "module")}, _REBUILD):
            module.save_hyperparameters(logger=False)
        for name in set(module.hparams) - set(known):
            if not name.startswith("_"):
                del module.hparams[name]
    module.hparams["_instantiator"] = _REBUILD


def rebuild(module_class: type[LightningModule], config: dict[str, Any]) -> LightningModule:
    """Make a module from the hyper-parameters in its checkpoint; ``load_from_checkpoint`` calls it.

    Lightning's own function would leave live objects in the hyper-parameters of the module it makes, and import
    whatever a checkpoint names. Here that is what `only_admitted` allows, and what the caller holds already: the class,
    and live objects that replace arguments.

    Args:
        module_class: the class whose ``load_from_checkpoint`` was called.
        config: its arguments as the checkpoint has them, with those that the caller replaces.
    """
    path = _import_path(module_class, "module")
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    config = {name: encode(value, name) for name, value in given.items()}
    live = [config[name] for name, value in given.items() if not isinstance(value, (str, Mapping, list, tuple))]
    as_saved = _given_hyperparameters_context({**config, "_class_path": path}, _REBUILD)
    with only_admitted(named_packages([path, live])), as_saved:
        return instantiate_module(module_class, config)


def _arguments(module_class: type[LightningModule], saved: Mapping[str, Any]) -> dict[str, Any]:
    """What `module_class` itself takes; Lightning also finds what its ``__init__`` handed on to a base class."""
    parameters = inspect.signature(module_class.__init__).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(saved)
    return {name: value for name, value in saved.items() if name in parameters}


def encode(value: Any, name: str) -> Any:
    """Return `value` in plain containers, numbers and strings, as a config would give it.

    Classes and module-level functions become import paths; ``functools.partial`` of a class and dataclass instances
    become ``{class_path, init_args}``, nested ones too.

    Args:
        value: of an argument.
        name: of the argument, for errors.

    Raises:
        UserError: a value of any other kind.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): encode(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item, f"{name}.{i}") for i, item in enumerate(value)]
    if isinstance(value, type):
        return {"class_path": _import_path(value, name)}
    if isinstance(value, functools.partial):
        arguments = _named_arguments(value, name)
        return {"class_path": _import_path(value.func, name), "init_args": encode(arguments, name)}
    if is_dataclass(value):
        arguments = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        return {"class_path": _import_path(type(value), name), "init_args": encode(arguments, name)}
    if inspect.isfunction(value):
        return _import_path(value, name)
    raise UserError(
        f"{name}: expected a number, string, class, functools.partial(Class, ...) or dataclass, so that a checkpoint "
        f"can rebuild it; got an object of {type(value).__name__}"
    )


def _named_arguments(value: functools.partial[Any], name: str) -> dict[str, Any]:
    """Arguments of a partial by name."""
    if not value.args:
        return value.keywords
    bound = inspect.signature(value.func).bind_partial(*value.args, **value.keywords)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL and parameter.name in bound.arguments:
            raise UserError(f"{name}: expected functools.partial with named arguments, got unnamed ones: {value.args}")
    return dict(bound.arguments)


def _import_path(thing: Any, name: str) -> str:
    """Dotted path of a class or function; UserError for what no import can reach."""
    path = getattr(thing, "__qualname__", "")
    if not path or "<" in path:
        raise UserError(
            f"{name}: expected functools.partial(Class, ...), a class or a module-level function, so that a checkpoint "
            f"can rebuild it; got {path or type(thing).__name__}, which cannot be imported"
        )
    return f"{thing.__module__}.{path}"
