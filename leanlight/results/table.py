"""The cells of a table: one row at one seed, its command, its identity, its run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanlight.contracts.errors import UserError
from leanlight.results.launch import command, option
from leanlight.results.pipeline import pipeline_identity
from leanlight.results.state import Decision, decide
from leanlight.results.table_spec import Row, TableSpec
from leanlight.runs import config_hash, read_summary


@dataclass(frozen=True)
class Cell:
    """A row at a seed. run_dir: the run folder, or for a pipeline the folder of its summary."""

    row: Row
    seed: int
    identity: str
    run_id: str
    run_dir: Path
    runs_root: Path
    arguments: tuple[str, ...]

    @property
    def key(self) -> str:
        """How it is called on screen."""
        return f"{self.row.name} s{self.seed}"

    def decide(self, *, fresh: bool, rerun_stale: bool) -> Decision:
        """What to do about it."""
        return decide(self.run_dir, self.identity, fresh=fresh, rerun_stale=rerun_stale)

    def prepare(self, *, fresh: bool, rerun_stale: bool) -> list[str] | None:
        """The command that runs or resumes it; None when another process has finished it meanwhile.

        A start first removes what it would find in its way.
        """
        decision = self.decide(fresh=fresh, rerun_stale=rerun_stale)
        if decision.action == "reuse":
            return None
        if decision.action == "resume":
            return command("fit", "--resume", str(self.run_dir))
        shutil.rmtree(self.run_dir, ignore_errors=True)
        place = ("--runs-root" if self.row.pipeline else "--trainer.default_root_dir", str(self.runs_root))
        name = ("--id" if self.row.pipeline else "--run.id", self.run_id)
        repeat = ["--fresh"] * fresh + ["--rerun-stale"] * rerun_stale if self.row.pipeline else []
        return command(*self.arguments, *place, *name, *repeat)


def make_cells(spec: TableSpec, runs_root: Path) -> list[Cell]:
    """Every cell of the table, seed by seed. UserError names the row whose config does not parse."""
    return [_make_cell(spec, row, seed, runs_root) for seed in spec.seeds for row in spec.rows]


def row_arguments(spec: TableSpec, row: Row, seed: int) -> tuple[str, ...]:
    """Arguments of `leanlight` that run a row at a seed, as a reader would type them."""
    if row.pipeline is None:
        overrides = [option(key, value) for key, value in row.overrides.items()]
        fixed = {"seed_everything": seed, "run.test": spec.checkpoint}
        return ("fit", "--config", row.config, *overrides, *(option(key, value) for key, value in fixed.items()))
    sets = [f"{key}={json.dumps(value)}" for key, value in _pipeline_overrides(spec, row).items()]
    return ("run", row.config, *(word for pair in sets for word in ("--set", pair)), "--seed", str(seed))


def _pipeline_overrides(spec: TableSpec, row: Row) -> dict[str, Any]:
    """A row's overrides, and the table's checkpoint rule for the stage that counts."""
    assert row.pipeline is not None
    counted = next(stage for stage in row.pipeline.stages if stage.name == row.stage)
    rule = {f"{row.stage}.run.test": spec.checkpoint} if counted.command == "fit" else {}
    return {**row.overrides, **rule}


def _make_cell(spec: TableSpec, row: Row, seed: int, runs_root: Path) -> Cell:
    arguments = row_arguments(spec, row, seed)
    if row.pipeline is None:
        from leanlight.experiment import resolve  # loads torch and lightning

        arguments += (option("run.method", row.method), option("run.dataset", spec.dataset))
        try:
            resolved = resolve("fit", list(arguments[1:]))
            identity = config_hash(resolved, (resolved.get("run") or {}).get("inputs"))
        except UserError as error:
            raise UserError(f"row {row.name}: {error}") from None
    else:
        overrides = _pipeline_overrides(spec, row)
        identity = pipeline_identity(row.pipeline.with_overrides(overrides, f"row {row.name}").with_seed(seed))
    run_id = f"{spec.stem}-{row.name}-s{seed}-{identity[:8]}"
    folder = Path("pipelines") if row.pipeline else Path(row.method) / spec.dataset
    return Cell(row, seed, identity, run_id, runs_root / folder / run_id, runs_root, arguments)


def read_cell(cell: Cell, metrics: Sequence[str], optional: Sequence[str], *, stale: bool) -> dict[str, Any]:
    """What a finished cell contributes to the results, from its summary.json alone.

    metrics: logged names, and ``summary/<key>`` for a number of the summary itself, e.g. ``summary/train_wall_s``.
    Raises UserError when a metric is missing or not finite.
    """
    summaries, counted = _summaries(cell)
    numbers = {f"summary/{key}": value for key, value in counted.items() if isinstance(value, (int, float))}
    measured = numbers | (counted.get("metrics") or {})
    values = {}
    for name in metrics:
        value = measured.get(name)
        if value is None and name in optional:
            continue
        if value is None:
            raise UserError(f"{cell.key}: its summary has no {name!r}; it has: {', '.join(sorted(measured)) or 'none'}")
        if not math.isfinite(value):
            raise UserError(f"{cell.key}: {name} is {value}")
        values[name] = value
    entry: dict[str, Any] = {
        "seed": cell.seed,
        "run": counted["_folder"],
        "config_hash": cell.identity,
        **{
            key: counted.get(key) for key in ("code_hash", "commit", "dirty", "date", "data", "machine", "samples_seen")
        },
        "stale": stale,
        "metrics": values,
        "wall_s": round(math.fsum(summary.get("wall_s") or 0.0 for summary in summaries), 3),
        "peak_rss_mb": _largest(summaries, "peak_rss_mb"),
        "peak_cuda_mb": _largest(summaries, "peak_cuda_mb"),
    }
    if cell.row.pipeline is not None:
        entry["stages"] = {summary["_stage"]: summary.get("config_hash") for summary in summaries}
    return entry


def _summaries(cell: Cell) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Summaries of all run folders of a cell, and the one that counts; each says where it lies under the runs root."""
    if cell.row.pipeline is None:
        places = {"": cell.run_dir}
    else:
        outer = read_summary(cell.run_dir) or {}
        places = {stage["name"]: cell.runs_root / stage["run_dir"] for stage in outer.get("stages", [])}
    found = {}
    for name, place in places.items():
        summary = read_summary(place)
        if summary is None:
            raise UserError(f"{cell.key}: no summary.json in {place}")
        found[name] = {**summary, "_stage": name, "_folder": place.relative_to(cell.runs_root).as_posix()}
    if cell.row.stage not in found:
        raise UserError(f"{cell.key}: the pipeline's summary has no stage {cell.row.stage!r}")
    return list(found.values()), found[cell.row.stage]


def _largest(summaries: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [summary[key] for summary in summaries if summary.get(key) is not None]
    return max(values) if values else None
