"""Numbers and settings as text: one way for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leanlight.results.claims import smallest_difference
from leanlight.results.expression import metric_of

MISSING = "\N{EN DASH}"


def show_number(value: float | None, digits: int) -> str:
    """Fixed decimals; an en dash for no value."""
    return MISSING if value is None else f"{value:,.{digits}f}"


def show_measured(measured: Mapping[str, Any] | None, metric: Mapping[str, Any], *, unit: bool = True) -> str:
    """``91.2 ± 0.3 %``: mean and sample standard deviation in the metric's unit; an en dash for no value."""
    if measured is None:
        return MISSING
    text = show_number(measured["mean"] * metric["scale"], metric["digits"])
    if measured["std"] is not None:
        text += f" ± {show_number(measured['std'] * metric['scale'], metric['digits'])}"
    return f"{text} {metric['unit']}".rstrip() if unit else text


def show_metric(metric: Mapping[str, Any]) -> str:
    """``Accuracy (%) ↑``: label, unit, and which way is better; the arrow does not stand alone on a line."""
    unit = f" ({metric['unit']})" if metric["unit"] else ""
    return f"{metric['label']}{unit}\N{NO-BREAK SPACE}{'↑' if metric['higher_is_better'] else '↓'}"


def columns(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The metrics that have a column; others serve curves and claims."""
    return {name: metric for name, metric in document["metrics"].items() if metric.get("column", True)}


def show_setting(setting: Mapping[str, Any]) -> str:
    """``width=32, epochs=5``."""
    return ", ".join(f"{key}={value}" for key, value in setting.items())


def show_seconds(seconds: float | None) -> str:
    """``42 s``, ``3.5 min`` or ``2.1 h``."""
    if seconds is None:
        return MISSING
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def paper_delta(row: Mapping[str, Any], metric: str, shown: Mapping[str, Any]) -> float | None:
    """Measured minus the paper's figure in the shown unit, only where the settings are the same; else None."""
    figure, measured = row["paper"].get(metric), row["metrics"].get(metric)
    if figure is None or measured is None or not figure["setting"] or figure["setting"] != row["setting"]:
        return None
    return float(measured["mean"] * shown["scale"] - figure["value"])


def show_evidence(claim: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Why a claim has its verdict; of an inconclusive one also what its table could have seen, as `metrics` show it."""
    why, least = str(claim["evidence"]["why"]), smallest_difference(claim)
    if least is None:
        return why
    metric = metrics.get(metric_of(claim["expr"]) or "", {"scale": 1.0, "unit": ""})
    shown = f"{least * metric['scale']:.2g} {'points' if metric['unit'] == '%' else metric['unit']}".rstrip()
    return f"{why}; the smallest difference that {claim['evidence']['n']} seeds of this spread could show is {shown}"


SEEDS_STAY = "On another kind of processor the same seeds give other figures."


def show_machine(machine: Mapping[str, Any]) -> str:
    """One line: processor, cores, memory, GPUs, versions."""
    parts = [str(machine["cpu"])] if machine.get("cpu") else []
    parts += [f"{machine['cores']} cores"] if machine.get("cores") else []
    parts += [f"{machine['ram_gib']} GiB"] if machine.get("ram_gib") else []
    parts += list(machine.get("gpus") or ["no GPU"])
    parts += [f"{name} {machine[name]}" for name in ("python", "torch", "lightning") if machine.get(name)]
    return ", ".join(parts)
