"""A dashboard of a method at W&B, derived from what one of its runs has logged; no list of panels is written."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanlight.contracts.errors import UserError
from leanlight.glossary import meaning
from leanlight.registry import methods
from leanlight.runs import find_runs, read_summary

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace


@dataclass(frozen=True)
class Panel:
    """One chart. kind: ``line``, ``bar`` or ``media``. metrics: logged names. unit: of all of them, where known."""

    kind: str
    title: str
    metrics: tuple[str, ...]
    unit: str = ""


@dataclass(frozen=True)
class Dashboard:
    """What a method's dashboard shows.

    Args:
        method: runs of W&B's group of this name are shown.
        title: heading.
        x: logged name of the method's own progress, over which lines are drawn.
        sections: heading → charts.
    """

    method: str
    title: str
    x: str
    sections: Mapping[str, Sequence[Panel]]


def find_run(source: str, runs_root: Path) -> Path:
    """The run folder `source`, or the newest run of the method `source` that has logged something.

    Raises:
        UserError: there is none.
    """
    if (Path(source) / "metrics.csv").is_file():
        return Path(source)
    found = [run for run in find_runs(runs_root) if run.parts[-3] == source and (run / "metrics.csv").is_file()]
    if found:
        return max(found, key=lambda run: (run / "metrics.csv").stat().st_mtime)
    known = methods().get(source)
    help_ = f"leanlight fit --config {known.smallest}" if known else "leanlight methods"
    raise UserError(f"source {source!r}: neither a run folder nor a method with a run in {runs_root}; try: {help_}")


def describe(run: Path) -> Dashboard:
    """The dashboard of a run's method: the metric it is judged by, losses, other metrics, test, pictures, speed."""
    with open(run / "metrics.csv", newline="") as file:
        columns = next(csv.reader(file), [])
    summary = read_summary(run) or {}
    method = str(summary.get("method") or run.parts[-3])
    judged = (summary.get("primary_metric") or {}).get("name")
    quantities: dict[str, list[str]] = {}  # loss → train/loss, val/loss: one chart
    for name in columns:
        split, _, quantity = name.partition("/")
        if split in ("train", "val") and name != judged:
            quantities.setdefault(quantity.partition("/")[0], []).append(name)
    curves = {quantity: _panel("line", names) for quantity, names in quantities.items()}
    pictures = [path for path in run.glob("artifacts/media/*/*.*") if path.suffix in (".png", ".gif")]
    drawn = sorted({f"{path.parent.name}/{path.stem}" for path in pictures})
    speed = run / "throughput.json"
    timed = [name for name in (json.loads(speed.read_text()) if speed.is_file() else {}) if "/" in name]
    sections = {
        "Judged by": [_panel("line", [judged])] if judged in columns else [],
        "Losses": [panel for quantity, panel in curves.items() if "loss" in quantity],
        "Training and validation": [panel for quantity, panel in curves.items() if "loss" not in quantity],
        "Test": [_panel("bar", [name]) for name in columns if name.startswith("test/")],
        "Pictures": [Panel("media", name, (name,)) for name in drawn],
        "Speed": [_panel("line", [name]) for name in timed],
    }
    info = methods().get(method)
    x = next((name for name in columns if name.startswith("progress/")), "step")
    return Dashboard(method, info.title if info else method, x, {k: v for k, v in sections.items() if v})


def _panel(kind: str, names: Sequence[str]) -> Panel:
    units = {told[0] for name in names if (told := meaning(name))}
    title = names[0] if len(names) == 1 else names[0].partition("/")[2].partition("/")[0]
    return Panel(kind, title, tuple(names), units.pop() if len(units) == 1 else "")


def workspace(dashboard: Dashboard, entity: str, project: str) -> Workspace:
    """The same as a saved view of W&B; ``save()`` sends it there."""
    from wandb_workspaces import expr
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports.v2 import panels as charts

    def chart(panel: Panel) -> Any:
        if panel.kind == "line":
            x, y = dashboard.x, list[Any](panel.metrics)
            return charts.LinePlot(title=panel.title, x=x, y=y, title_x=x.partition("/")[2], title_y=panel.unit)
        if panel.kind == "bar":
            return charts.BarPlot(title=panel.title, metrics=list(panel.metrics), title_x=panel.unit)
        return charts.MediaBrowser(title=panel.title, media_keys=list(panel.metrics))

    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"{dashboard.method}: {dashboard.title}",
        sections=[
            ws.Section(name=name, panels=[chart(panel) for panel in panels], is_open=True)
            for name, panels in dashboard.sections.items()
        ],
        settings=ws.WorkspaceSettings(x_axis=dashboard.x),
        runset_settings=ws.RunsetSettings(filters=[expr.Metric("Group") == dashboard.method]),
    )
