"""Run what a result table lacks and write its figures and verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from leanlight.contracts.errors import UserError, nearest
from leanlight.results.display import CellProgress, print_document, print_plan
from leanlight.results.launch import Job, run_jobs, visible_gpus, why_failed
from leanlight.results.pictures import store_media
from leanlight.results.state import Decision
from leanlight.results.table import Cell, Entry, build_document, earlier_entries, make_cells, write_document
from leanlight.results.table_spec import TableSpec
from leanlight.runs import results_folder


@dataclass
class Options:
    """What `leanlight reproduce` was asked for.

    Args:
        jobs: processes side by side.
        devices: GPUs by index or UUID; each process gets one of them. None: those there are, for several jobs.
        only: names of rows; empty for all.
        seeds: empty for all of the table.
        fresh: repeat cells that have finished.
        rerun_stale: repeat cells whose code has changed since they ran.
        dry_run: only show what would run.
        runs_root: folder of all runs.
        output: the JSON to write; None for the table's place under the runs root.
        publish: write to docs/results, which is the project's own, instead.
    """

    jobs: int = 1
    devices: Sequence[str] = ()
    only: Sequence[str] = ()
    seeds: Sequence[int] = ()
    fresh: bool = False
    rerun_stale: bool = False
    dry_run: bool = False
    runs_root: Path = Path("runs")
    output: Path | None = None
    publish: bool = False


def reproduce(spec: TableSpec, options: Options) -> int:
    """Bring a table up to date; 0 when every asked cell has a result, 1 when one has none."""
    _check(spec, options)
    output, sources = _places(spec, options)
    with CellProgress(0) as progress:
        progress.say(
            f"{spec.title}: {len(spec.rows)} rows, {sum(len(row.seeds) for row in spec.rows)} cells; reading configs"
        )
    cells = make_cells(spec, options.runs_root)
    earlier = earlier_entries(sources, cells)  # also finds an unreadable file before anything runs
    asked = [cell for cell in cells if _is_asked(cell, options)]
    plan = {cell.key: cell.decide(fresh=options.fresh, rerun_stale=options.rerun_stale) for cell in asked}
    if options.dry_run:
        runs = [cells[0] for cells in _by_run(asked)]
        print_plan([(c.run_key, plan[c.key].action, plan[c.key].why, str(c.run_dir)) for c in runs])
        return 0
    ran, reused = _run(asked, plan, options, spec)
    for cell in cells:
        if not cell.failure:
            _read(cell, spec, None if cell in asked else earlier.get(cell.key), cell in asked)
    document = build_document(spec, cells)
    write_document(output, document)
    store_media(output, document, options.runs_root)
    print_document(document)
    _say_end(cells, ran, reused)
    hint = "" if options.output or options.publish else " (--publish writes docs/results)"
    CellProgress(0).say(f"results: {output}{hint}")
    return int(any(cell.failure for cell in cells))


def _places(spec: TableSpec, options: Options) -> tuple[Path, list[Path]]:
    """The JSON to write, and earlier ones with results of cells that are not asked for, the one that stands above last.

    Results of this machine begin with the published ones, so that one repeated cell stands among all the others.
    """
    published, local = (
        results_folder(options.runs_root, publish) / spec.method / f"{spec.stem}.json" for publish in (True, False)
    )
    if options.output:
        return options.output, [options.output]
    return (published, [published]) if options.publish else (local, [published, local])


def _check(spec: TableSpec, options: Options) -> None:
    names = [row.name for row in spec.rows]
    for name in options.only:
        if name not in names:
            raise UserError(f"--only: no row {name!r}{nearest(name, names)}; rows: {', '.join(names)}")
    for seed in options.seeds:
        if seed not in spec.seeds:
            raise UserError(f"--seed: {seed} is not one of this table's seeds {list(spec.seeds)}")
    if options.output is not None and options.publish:
        raise UserError("--publish: writes to docs/results, --output somewhere else; give one of them")
    if options.output is not None and options.output.suffix != ".json":
        raise UserError(f"--output: expected a .json file, got {options.output}")


def _is_asked(cell: Cell, options: Options) -> bool:
    return (not options.only or cell.row.name in options.only) and (not options.seeds or cell.seed in options.seeds)


def _run(asked: list[Cell], plan: dict[str, Decision], options: Options, spec: TableSpec) -> tuple[int, int]:
    """Run the cells that need it, several at once, and note what failed; return how many finished and were reused."""
    runs = _by_run(asked)
    todo = {cells[0].run_dir: cells for cells in runs if plan[cells[0].key].action in ("start", "resume")}
    logs, ran = options.runs_root / "reproduce" / spec.stem, 0
    with CellProgress(len(todo)) as progress:
        for cells in runs:
            _announce(cells, plan[cells[0].key], progress)

        def ended(job: Job, code: int) -> None:
            nonlocal ran
            progress.ended(job, "finished" if code == 0 else "FAILED")
            if code:
                why, cells = why_failed(job, code), todo[job.run_dir]
                diverged = cells[0].decide().action == "diverged"
                for cell in cells:
                    cell.failure = "diverged" if diverged else why.splitlines()[0]
                progress.say(f"{why}\nlog: {job.log}")
            else:
                ran += len(todo[job.run_dir])

        flags = {"fresh": options.fresh, "rerun_stale": options.rerun_stale}
        jobs = [
            Job(cell.run_key, cell.run_dir, logs / f"{cell.run_id}.log", partial(cell.prepare, **flags))
            for cell, *_ in todo.values()
        ]
        try:
            # One job alone may use several GPUs; several would all train on the first.
            devices = options.devices or (visible_gpus() if options.jobs > 1 else ())
            run_jobs(jobs, options.jobs, devices, started=progress.started, ended=ended)
        except KeyboardInterrupt:
            progress.say(
                "interrupted; finished cells are kept and running ones left a checkpoint: the same command goes on"
            )
            raise
    return ran, len(asked) - sum(map(len, todo.values()))


def _by_run(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that share a run together, in order of their first."""
    runs: dict[Path, list[Cell]] = {}
    for cell in cells:
        runs.setdefault(cell.run_dir, []).append(cell)
    return list(runs.values())


def _announce(cells: Sequence[Cell], decision: Decision, progress: CellProgress) -> None:
    """Say what is not plain about the cells of a run before any starts."""
    key = cells[0].run_key
    if decision.action == "diverged":
        for cell in cells:
            cell.failure = "diverged"
        progress.say(f"{key}: diverged before, not repeated: {decision.why}")
    elif decision.stale:
        progress.say(f"{key}: stale, the code has changed since it ran (--rerun-stale repeats it)")
    elif decision.action == "resume":
        progress.say(f"{key}: goes on ({decision.why})")


def _read(cell: Cell, spec: TableSpec, earlier: Entry | None, asked: bool) -> None:
    """Give a cell the result of its run, or where that is gone the one of an earlier document."""
    decision = cell.decide()
    if decision.action == "reuse":
        try:
            cell.entry = cell.read(spec, stale=decision.stale)
        except UserError as error:
            cell.failure = "a metric is missing or not finite"
            CellProgress(0).say(str(error))
    elif earlier is not None:
        cell.entry = earlier
    elif asked:
        cell.failure = f"ended without a finished summary ({decision.why})"


def _say_end(cells: Sequence[Cell], ran: int, reused: int) -> None:
    entries, failed = [cell.entry for cell in cells if cell.entry], [cell.key for cell in cells if cell.failure]
    stale = sum(entry["stale"] for entry in entries)
    parts = [f"{ran} run", f"{reused} reused", f"{len(entries)} of {len(cells)} cells have a result"]
    if stale:
        parts.append(f"{stale} stale (--rerun-stale repeats them)")
    if failed:
        parts.append(f"{len(failed)} FAILED: {', '.join(failed)}")
    CellProgress(0).say("; ".join(parts))
