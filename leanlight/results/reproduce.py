"""Run what a result table lacks and write its figures and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from leanlight.contracts.errors import UserError, nearest
from leanlight.results.cells import Cell, make_cells, read_cell
from leanlight.results.display import CellProgress, print_document, print_plan
from leanlight.results.document import build_document, published_entries, write_document
from leanlight.results.launch import Job, run_jobs, why_failed
from leanlight.results.state import Decision
from leanlight.results.table_spec import TableSpec


@dataclass
class Options:
    """What `leanlight reproduce` was asked for. only, seeds: empty for all. output: None for docs/results."""

    jobs: int = 1
    devices: Sequence[str] = ()
    only: Sequence[str] = ()
    seeds: Sequence[int] = ()
    fresh: bool = False
    rerun_stale: bool = False
    dry_run: bool = False
    runs_root: Path = Path("runs")
    output: Path | None = None


@dataclass
class Outcome:
    """How every cell of the table stands, by row name and seed."""

    entries: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)
    failures: dict[tuple[str, int], str] = field(default_factory=dict)
    reused: int = 0
    ran: int = 0


def reproduce(spec: TableSpec, options: Options) -> int:
    """Bring a table up to date; 0 when every asked cell has a result, 1 when one has none."""
    _check(spec, options)
    output = options.output or Path("docs/results") / spec.method / f"{spec.stem}.json"
    with CellProgress(0) as progress:
        progress.say(f"{spec.title}: {len(spec.rows)} rows x {len(spec.seeds)} seeds; reading their configs")
    cells = make_cells(spec, options.runs_root)
    published = published_entries(output, cells)  # also finds an unreadable file before anything runs
    asked = [cell for cell in cells if _is_asked(cell, options)]
    plan = {cell.key: cell.decide(fresh=options.fresh, rerun_stale=options.rerun_stale) for cell in asked}
    if options.dry_run:
        print_plan([(c.key, plan[c.key].action, plan[c.key].why, str(c.run_dir)) for c in asked])
        return 0
    outcome = Outcome()
    _run(asked, plan, options, outcome, spec)
    _gather(spec, cells, asked, published, outcome)
    document = build_document(spec, outcome.entries, outcome.failures)
    write_document(output, document)
    print_document(document)
    _say_end(spec, outcome, output)
    return int(bool(outcome.failures))


def _check(spec: TableSpec, options: Options) -> None:
    names = [row.name for row in spec.rows]
    for name in options.only:
        if name not in names:
            raise UserError(f"--only: no row {name!r}{nearest(name, names)}; rows: {', '.join(names)}")
    for seed in options.seeds:
        if seed not in spec.seeds:
            raise UserError(f"--seed: {seed} is not one of this table's seeds {list(spec.seeds)}")
    if options.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {options.jobs}")
    if options.output is not None and options.output.suffix != ".json":
        raise UserError(f"--output: expected a .json file, got {options.output}")


def _is_asked(cell: Cell, options: Options) -> bool:
    return (not options.only or cell.row.name in options.only) and (not options.seeds or cell.seed in options.seeds)


def _run(asked: list[Cell], plan: dict[str, Decision], options: Options, outcome: Outcome, spec: TableSpec) -> None:
    """Run the cells that need it, several at once, and note what failed."""
    todo = {cell.key: cell for cell in asked if plan[cell.key].action in ("start", "resume")}
    outcome.reused = len(asked) - len(todo)
    logs = options.runs_root / "reproduce" / spec.stem
    with CellProgress(len(todo)) as progress:
        for cell in asked:
            decision = plan[cell.key]
            if decision.action == "diverged":
                outcome.failures[cell.row.name, cell.seed] = "diverged"
                progress.say(f"{cell.key}: diverged before, not repeated: {decision.why}")
            elif decision.stale:
                progress.say(f"{cell.key}: stale, the code has changed since it ran (--rerun-stale repeats it)")
            elif decision.action == "resume":
                progress.say(f"{cell.key}: goes on ({decision.why})")

        def ended(job: Job, code: int) -> None:
            cell = todo[job.key]
            progress.ended(job, "finished" if code == 0 else "FAILED")
            if code:
                why = why_failed(job, code)
                outcome.failures[cell.row.name, cell.seed] = why.splitlines()[0]
                progress.say(f"{why}\nlog: {job.log}")
            else:
                outcome.ran += 1

        flags = {"fresh": options.fresh, "rerun_stale": options.rerun_stale}
        jobs = [
            Job(key, cell.run_id, cell.runs_root, logs / f"{cell.run_id}.log", partial(cell.prepare, **flags))
            for key, cell in todo.items()
        ]
        try:
            run_jobs(jobs, options.jobs, options.devices, started=progress.started, ended=ended)
        except KeyboardInterrupt:
            progress.say(
                "interrupted; finished cells are kept and running ones left a checkpoint: the same command goes on"
            )
            raise


def _gather(
    spec: TableSpec,
    cells: list[Cell],
    asked: list[Cell],
    published: dict[tuple[str, int], dict[str, Any]],
    outcome: Outcome,
) -> None:
    """Read the result of every cell: from its run, or for cells that were not asked for from the published file."""
    optional = [name for name, metric in spec.metrics.items() if metric.optional]
    for cell in cells:
        key = (cell.row.name, cell.seed)
        if key in outcome.failures:
            continue
        decision = cell.decide(fresh=False, rerun_stale=False)
        if decision.action == "reuse":
            try:
                outcome.entries[key] = read_cell(cell, list(spec.metrics), optional, stale=decision.stale)
            except UserError as error:
                outcome.failures[key] = "a metric is missing or not finite"
                CellProgress(0).say(str(error))
        elif cell not in asked and key in published:
            outcome.entries[key] = published[key]
        elif cell in asked:
            outcome.failures[key] = f"ended without a finished summary ({decision.why})"


def _say_end(spec: TableSpec, outcome: Outcome, output: Path) -> None:
    stale = sum(entry["stale"] for entry in outcome.entries.values())
    total = len(spec.rows) * len(spec.seeds)
    parts = [f"{outcome.ran} run", f"{outcome.reused} reused", f"{len(outcome.entries)} of {total} cells have a result"]
    if stale:
        parts.append(f"{stale} stale (--rerun-stale repeats them)")
    if outcome.failures:
        parts.append(
            f"{len(outcome.failures)} FAILED: " + ", ".join(f"{row} s{seed}" for row, seed in outcome.failures)
        )
    CellProgress(0).say("; ".join(parts))
    CellProgress(0).say(f"results: {output}")
