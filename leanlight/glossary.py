"""What logged names mean: unit and words of ``docs/metrics.yaml``, which comes with the package."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import yaml

from leanlight.registry import config_root


@cache
def glossary() -> dict[str, Any]:
    """Groups of logged names with unit and meaning, and what a <place> in a name allows."""
    root = config_root().parent
    beside = root / "metrics.yaml"  # of an installed package
    path = beside if beside.is_file() else root / "docs" / "metrics.yaml"
    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))


@cache
def _patterns() -> list[tuple[re.Pattern[str], tuple[str, str]]]:
    places = glossary()["places"]
    found = []
    for group in glossary()["groups"].values():
        for name, (unit, what) in group.items():
            parts = re.findall(r"<\w+>|[^<]+", name)
            text = "".join(f"(?:{places[part[1:-1]]})" if part[0] == "<" else re.escape(part) for part in parts)
            found.append((re.compile(text), (unit, what)))
    return found


def meaning(name: str) -> tuple[str, str] | None:
    """Unit of a logged name and what it is; None where the glossary has it not."""
    return next((told for pattern, told in _patterns() if pattern.fullmatch(name)), None)
