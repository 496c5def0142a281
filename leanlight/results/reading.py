"""Read YAML files of tables and pipelines so that every mistake is one line that says where it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from leanlight.configs_path import find_configs
from leanlight.contracts.errors import UserError, nearest
from leanlight.invocation import check_size
from leanlight.runs import folder_name
from leanlight.yaml_files import load_yaml


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the YAML mapping in `path`; UserError with file, line and reason when there is none."""
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path.name}{line}: {error.problem or 'not valid YAML'}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path.name}: not valid YAML: {str(error).splitlines()[0]}") from None
    check_size(content, path.name)
    if not isinstance(content, dict):
        raise UserError(f"{path.name}: expected keys and values, got {type(content).__name__}")
    return content


class Reader:
    """Takes typed values out of one mapping and knows where it stands.

    Args:
        content: the mapping.
        where: its place, for messages.
        known: every key it may have, separated by spaces.
    """

    def __init__(self, content: Any, where: str, known: str) -> None:
        if not isinstance(content, Mapping):
            raise UserError(f"{where}: expected keys and values, got {content!r}")
        for key in content:
            if key not in known.split():
                raise UserError(f"{where}: key {key!r} is unknown{nearest(str(key), known.split())}")
        self.content, self.where = content, where

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """Return a value of `kind`; without a default the key must be there."""
        value = self.content.get(key)
        if value is None:
            if default is ...:
                raise UserError(f"{self.where}: key {key!r} is missing")
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(each.__name__ for each in kinds)
            raise UserError(f"{self.where}: {key} must be {expected}, got {value!r}")
        return value

    def number(self, key: str, default: Any = ...) -> float:
        """Return a finite number."""
        value = float(self.get(key, (int, float), default))
        if value - value != 0:
            raise UserError(f"{self.where}: {key} must be finite, got {value}")
        return value

    def ranged(self, key: str, kind: Any) -> Any:
        """Return a number of `kind`, a type of `leanlight.contracts.ranges`, or None."""
        value = self.content.get(key)
        try:
            return None if value is None else kind.read(value)
        except ValueError as error:
            raise UserError(f"{self.where}: {key}: {error}") from None

    def choice(self, key: str, allowed: Collection[str], default: Any = ...) -> str:
        """Return one of `allowed`."""
        value: str = self.get(key, str, default)
        if value not in allowed:
            raise UserError(f"{self.where}: {key} must be one of {', '.join(allowed)}, got {value!r}")
        return value

    def name(self, key: str = "name") -> str:
        """Return a name that is usable in expressions, references and folder names."""
        value: str = self.get(key, str)
        if not (value.isascii() and value.isidentifier()):
            raise UserError(f"{self.where}: {key} {value!r} must be letters, digits and '_', not starting with a digit")
        return value

    def folder(self, key: str, default: Any = ...) -> str:
        """Return a text that can name a folder."""
        return folder_name(self.get(key, str, default), f"{self.where}: {key}")

    def config(self, key: str = "config") -> str:
        """Return the name of a config that exists."""
        value: str = self.get(key, str)
        try:
            find_configs(value)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from None
        return value


def unique(names: list[str], where: str, what: str = "name") -> None:
    """Raise UserError when a name stands twice."""
    for position, name in enumerate(names):
        if name in names[:position]:
            raise UserError(f"{where}: {what} {name!r} stands twice")
