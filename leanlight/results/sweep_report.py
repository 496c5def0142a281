"""What came out of a sweep: a table, files, and a figure of its history and of each parameter."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from leanlight.contracts.files import atomic_write
from leanlight.results.figures import LIGHT, PALETTE, calm, plain, png
from leanlight.results.sweep_spec import SweepSpec

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

_STATES = {"COMPLETE": "finished", "PRUNED": "stopped", "FAIL": "failed", "RUNNING": "unfinished", "WAITING": "waiting"}
_SHOWN = 20  # rows of the table on the terminal
_PANELS = 8  # parameters in the figure


def show(trial: FrozenTrial, spec: SweepSpec) -> str:
    """A trial in one line."""
    entry = _entry(trial, spec)
    value = "" if entry["value"] is None else f" {spec.metric} {entry['value']:.4g}"
    return f"{entry['state']}{value}  {_settings(entry['parameters'])}"


def _settings(parameters: Mapping[str, Any]) -> str:
    return " ".join(f"{key.rpartition('.')[2]}={_text(value)}" for key, value in parameters.items())


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _entry(trial: FrozenTrial, spec: SweepSpec) -> dict[str, Any]:
    finished = trial.state.name in ("COMPLETE", "PRUNED")
    varied = [p for p in spec.parameters if p.key in trial.params]
    return {
        "number": trial.number,
        "state": _STATES[trial.state.name],
        "value": trial.value if finished else None,
        "parameters": {p.key: p.value(trial.params[p.key]) for p in varied},
        **{key: trial.user_attrs.get(key) for key in ("last", "wall_s", "run", "command")},
        "why": None if finished else trial.user_attrs.get("why"),
    }


def _ranked(entries: Sequence[dict[str, Any]], spec: SweepSpec) -> list[dict[str, Any]]:
    """Those that finished first, the best of them first."""
    sign = -1 if spec.goal == "maximize" else 1
    return sorted(entries, key=lambda e: (e["state"] != "finished", e["value"] is None, sign * (e["value"] or 0.0)))


def write_report(study: Study, spec: SweepSpec, folder: Path) -> list[dict[str, Any]]:
    """Write ``sweep.json``, ``sweep.csv`` and ``sweep.png``; return the trials, the best first."""
    entries = [_entry(trial, spec) for trial in study.trials]
    ranked = _ranked(entries, spec)
    document = {
        "name": spec.name,
        "method": spec.method,
        "metric": spec.metric,
        "goal": spec.goal,
        "note": "A trial's value is its best validation; trials were chosen on validation data, with one run each.",
        "best": next((entry for entry in ranked if entry["state"] == "finished"), None),
        "trials": entries,
    }
    atomic_write(folder / "sweep.json", json.dumps(document, indent=2, default=str) + "\n")
    table = io.StringIO(newline="")
    columns = ["number", "state", spec.metric, "last", *(p.key for p in spec.parameters), "wall_s", "run", "why"]
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**entry, **entry["parameters"], spec.metric: entry["value"]} for entry in entries)
    atomic_write(folder / "sweep.csv", table.getvalue())
    if any(entry["value"] is not None for entry in entries):
        atomic_write(folder / "sweep.png", _draw(entries, spec))
    return ranked


def say_end(ranked: Sequence[dict[str, Any]], spec: SweepSpec, folder: Path, root: Path) -> None:
    """Show the trials of `write_report`, how to run the best again, and what the choice was made on."""
    console = Console()
    table = Table(title=Text(f"{spec.name}: {len(ranked)} trials by {spec.metric} ({spec.goal})"), title_justify="left")
    for name in ("trial", "state", spec.metric, *(p.key.rpartition(".")[2] for p in spec.parameters)):
        table.add_column(Text(name), justify="right")
    for entry in ranked[:_SHOWN]:
        value = "" if entry["value"] is None else f"{entry['value']:.4f}"
        settings = [_text(entry["parameters"].get(p.key, "")) for p in spec.parameters]
        table.add_row(str(entry["number"]), entry["state"], value, *map(Text, settings))
    console.print(table)
    if (best := ranked[0])["state"] == "finished":
        lines = [
            f"best: trial {best['number']}, {root / best['run']}",
            f"again: {best['command']}",
            "The choice was made on validation data: compare it with its rivals over several seeds, on test data, in a "
            "table of its own (leanlight reproduce).",
        ]
        console.print(Text("\n".join(lines)), soft_wrap=True)
    console.print(Text(f"sweep: {folder / 'sweep.json'}"), soft_wrap=True)


def _draw(entries: Sequence[dict[str, Any]], spec: SweepSpec) -> bytes:
    """PNG: values in order of the trials with the best so far, then over each parameter that varies."""
    measured = [entry for entry in entries if entry["value"] is not None and math.isfinite(entry["value"])]
    varied = [p for p in spec.parameters if len(p.choices) != 1][:_PANELS]
    columns = min(3, len(varied) + 1)
    rows = math.ceil((len(varied) + 1) / columns)
    figure = Figure(figsize=(3.3 * columns, 2.5 * rows), facecolor=LIGHT.ground, dpi=144)
    for place, parameter in enumerate([None, *varied]):
        axes = figure.add_subplot(rows, columns, place + 1)
        if parameter is None:
            places: list[Any] = [entry["number"] for entry in measured]
            finished = [entry for entry in measured if entry["state"] == "finished"]
            best = max if spec.goal == "maximize" else min
            so_far = [best(entry["value"] for entry in finished[: i + 1]) for i in range(len(finished))]
            axes.step([e["number"] for e in finished], so_far, where="post", color=PALETTE[1], linewidth=1.3)
            axes.set_xlabel("trial", color=LIGHT.text, fontsize=8.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_title(plain(f"{spec.metric}, and the best so far"), loc="left", color=LIGHT.text, fontsize=9.5)
        else:
            places = [entry["parameters"][parameter.key] for entry in measured]
            axes.set_xlabel(plain(parameter.key.rpartition(".")[2], 40), color=LIGHT.text, fontsize=8.5)
            if parameter.choices:
                values = list(parameter.choices.values())
                places = [values.index(value) for value in places]
                axes.set_xticks(range(len(values)), [plain(text, 10) for text in parameter.choices])
            elif parameter.log:
                axes.set_xscale("log")
        _scatter(axes, places, measured)
        calm(axes, LIGHT)
    return png(figure)


def _scatter(axes: Axes, places: Sequence[Any], measured: Sequence[Mapping[str, Any]]) -> None:
    """A dot a trial, hollow where it was stopped."""
    inside = [PALETTE[0] if entry["state"] == "finished" else LIGHT.ground for entry in measured]
    axes.scatter(places, [entry["value"] for entry in measured], s=16, c=inside, edgecolors=PALETTE[0], linewidths=0.9)
