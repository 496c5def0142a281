"""Logged values as a number and its unit."""

from __future__ import annotations

import math
from collections.abc import Mapping

import yaml

from leanlight.registry import methods

_PREFIXES = ("p", "n", "µ", "m", "", "k", "M", "G", "T")  # of 1000⁻⁴ to 1000⁴


def units_of(method: str, dataset: str) -> dict[str, tuple[str, float, int]]:
    """How a method's tables, that of the data first, show its metrics: name without split → unit, factor, decimals."""
    units: dict[str, tuple[str, float, int]] = {}
    folder = methods()[method].folder / "tables" if method in methods() else None
    tables = sorted(folder.glob("*.yaml")) if folder is not None else []
    for path in sorted(tables, key=lambda path: path.stem.rpartition("_")[0] != dataset):
        try:
            for name, shown in yaml.safe_load(path.read_text(encoding="utf-8"))["metrics"].items():
                fact = str(shown.get("unit", "")), float(shown.get("scale", 1.0)), int(shown.get("digits", 3))
                units.setdefault(name.rsplit("/", 1)[-1], fact)  # also of stages/NAME/SPLIT/METRIC
        except (yaml.YAMLError, OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # a bad table of a package: `reproduce` says what is wrong with it
    return units


def show_value(name: str, value: float, units: Mapping[str, tuple[str, float, int]]) -> tuple[str, str]:
    """A logged value as number and unit.

    Args:
        name: as it is logged, ``<split>/<metric>``.
        value: as it is logged.
        units: what `units_of` gives; for other metrics the name tells.
    """
    metric = name.split("/", 1)[-1]
    if not math.isfinite(value):
        return f"{value:g}", ""
    if metric in units:
        unit, scale, digits = units[metric]
        return f"{value * scale:,.{digits}f}", unit
    if metric.startswith("energy_pj"):
        return _with_prefix(value * 1e-12, "J")
    if metric.startswith(("macs", "acs")):
        return _with_prefix(value, "")
    if "accuracy" in metric or "agreement" in metric:
        return f"{value * 100:.1f}", "%"
    return (f"{value:,.0f}" if value == int(value) and abs(value) > 1 else f"{value:.4g}"), ""


def _with_prefix(value: float, unit: str) -> tuple[str, str]:
    """``(544.8, nJ)``: four figures and a prefix of the SI."""
    if not value:
        return "0", unit
    power = max(-4, min(4, math.floor(math.log10(abs(value)) / 3)))
    return f"{value / 1000**power:.4g}", f"{_PREFIXES[power + 4]}{unit}"
