"""A result table: its cells (a row at a seed), their runs, and the JSON that they add up to.

Cells share a run whose replicas they are.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from leanlight.contracts.errors import UserError
from leanlight.contracts.files import atomic_write
from leanlight.invocation import option
from leanlight.results.claims import judge, mean_std
from leanlight.results.launch import command
from leanlight.results.pipeline import PipelineRunner, Resolved, pipeline_identity
from leanlight.results.pipeline_spec import PipelineSpec
from leanlight.results.state import Decision, clear, decide, resume_words
from leanlight.results.table_spec import REPLICAS, Row, TableSpec
from leanlight.runs import config_hash, folder_name, read_summary

FORMAT = 1
# What every part of a document has, so that a file of other making is one line and no traceback.
_KEYS = {
    "table": "method dataset table stem scale title note command commit commits dirty date machine complete stale "
    "seeds checkpoint_rule metrics rows claims",
    "row": "name label method setting config stage overrides command seeds metrics paper wall_s peak_rss_mb "
    "peak_cuda_mb samples_seen stale data failed runs",
    "claim": "text scope expr margin min_seeds verdict counts_for_paper evidence",
}
_COPIED = ("code_hash", "commit", "dirty", "date", "data", "machine", "samples_seen")  # from a run's summary
_SHARED = ("wall_s", "train_wall_s", "samples_seen")  # by the replicas of a run
Entry = dict[str, Any]  # what a finished cell contributes to the document


@dataclass(eq=False)
class Cell:
    """A row at a seed.

    Args:
        row: of the table.
        seed: of the table.
        identity: hash of its configuration.
        run_id: name of its run folder.
        run_dir: the run folder, or for a pipeline the folder of its summary.
        runs_root: folder of all runs.
        arguments: of `leanlight`, without the place of the run folder.
        seeds: of the run, one a replica; the cell's own is among them.
        entry: its contribution to the results, once it has one.
        failure: why it has none, if it was asked for one.
    """

    row: Row
    seed: int
    identity: str
    run_id: str
    run_dir: Path
    runs_root: Path
    arguments: tuple[str, ...]
    seeds: tuple[int, ...]
    entry: Entry | None = None
    failure: str = ""

    @property
    def key(self) -> str:
        """How it is called on screen."""
        return f"{self.row.name} s{self.seed}"

    @property
    def run_key(self) -> str:
        """How its run is called on screen."""
        last = f"-{self.seeds[-1]}" if len(self.seeds) > 1 else ""
        return f"{self.row.name} s{self.seeds[0]}{last}"

    def decide(self, *, fresh: bool = False, rerun_stale: bool = False) -> Decision:
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
            return command(*resume_words(self.run_dir))
        clear(self.run_dir, self.runs_root)
        place = ("--runs-root" if self.row.pipeline else "--trainer.default_root_dir", str(self.runs_root))
        name = ("--id" if self.row.pipeline else "--run.id", self.run_id)
        repeat = ["--fresh"] * fresh + ["--rerun-stale"] * rerun_stale if self.row.pipeline else []
        return command(*self.arguments, *place, *name, *repeat)

    def read(self, spec: TableSpec, *, stale: bool) -> Entry:
        """What its finished run contributes to the results, from summary.json alone.

        A metric of the table is a logged name, or ``summary/<key>`` for a number of the summary itself, e.g.
        ``summary/train_wall_s``. ``stages/<stage>/<name>`` is either of another stage of the row's pipeline, e.g.
        ``stages/select/wall_s`` or ``stages/scorer/val/accuracy``. Raises UserError when one is missing or not finite.

        Of a run with replicas every cell has its own values and its share of the time. The summary's numbers are one
        measurement, so that the first cell alone has them.
        """
        summaries, counted = self._summaries()
        own, share = self.seeds.index(self.seed), len(self.seeds)
        measured = {f"summary/{key}": value for key, value in _numbers(counted, share).items()} if own == 0 else {}
        if share == 1:
            measured |= counted.get("metrics") or {}
        else:
            measured |= {name: values[own] for name, values in (counted.get("replicas") or {}).items()}
        for summary in summaries if self.row.pipeline else ():
            named = _numbers(summary) | (summary.get("metrics") or {})
            measured |= {f"stages/{summary['_stage']}/{key}": value for key, value in named.items()}
        values = {}
        for name, metric in spec.metrics.items():
            value = measured.get(name)
            if value is None and (metric.optional or (own and name.startswith("summary/"))):
                continue
            if value is None:
                has = ", ".join(sorted(measured)) or "none"
                raise UserError(f"{self.key}: its summary has no {name!r}; it has: {has}")
            if not math.isfinite(value):
                raise UserError(f"{self.key}: {name} is {value}")
            values[name] = value
        entry: Entry = {"seed": self.seed, "run": counted["_folder"], "config_hash": self.identity}
        entry |= {key: counted.get(key) for key in _COPIED}
        entry["data"] = _without_folders(entry["data"])
        if share > 1:
            entry |= {"replicas": share, "samples_seen": _numbers(counted, share).get("samples_seen")}
        entry |= {
            "stale": stale,
            "metrics": values,
            "wall_s": round(math.fsum(summary.get("wall_s") or 0.0 for summary in summaries) / share, 3),
            "peak_rss_mb": _largest(summaries, "peak_rss_mb"),
            "peak_cuda_mb": _largest(summaries, "peak_cuda_mb"),
        }
        if self.row.pipeline is not None:
            entry["stages"] = {summary["_stage"]: summary.get("config_hash") for summary in summaries}
        return entry

    def _summaries(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Summaries of all its run folders, and the one that counts; each says where it lies under the runs root."""
        if self.row.pipeline is None:
            places = {"": self.run_dir}
        else:
            outer = read_summary(self.run_dir) or {}
            places = {stage["name"]: self.runs_root / stage["run_dir"] for stage in outer.get("stages", [])}
        summaries = {}
        for name, place in places.items():
            summary = read_summary(place)
            if summary is None:
                raise UserError(f"{self.key}: no summary.json in {place}")
            summaries[name] = {**summary, "_stage": name, "_folder": place.relative_to(self.runs_root).as_posix()}
        if self.row.stage not in summaries:
            raise UserError(f"{self.key}: the pipeline's summary has no stage {self.row.stage!r}")
        return list(summaries.values()), summaries[self.row.stage]


# -- from a table to its cells


def make_cells(spec: TableSpec, runs_root: Path) -> list[Cell]:
    """Every cell of the table, seed by seed. UserError names the row whose config, or a stage of it, does not parse."""
    cells = []
    parsed: Resolved = {}
    made: dict[tuple[str, tuple[int, ...]], Cell] = {}
    for seed in spec.seeds:
        for row in (row for row in spec.rows if seed in row.seeds):
            seeds = next(run for run in row.runs() if seed in run)
            try:
                if (row.name, seeds) not in made:
                    made[row.name, seeds] = _make_cell(spec, row, seeds, runs_root, parsed)
            except UserError as error:
                raise UserError(f"row {row.name}: {error}") from None
            cells.append(replace(made[row.name, seeds], seed=seed))
    return cells


def _make_cell(spec: TableSpec, row: Row, seeds: tuple[int, ...], runs_root: Path, parsed: Resolved) -> Cell:
    """The cell of the first seed of a run."""
    arguments, seed = row_arguments(spec, row, seeds), seeds[0]
    if row.pipeline is None:
        from leanlight.experiment import resolve  # loads torch and lightning

        arguments += (option("run.method", row.method), option("run.dataset", spec.dataset))
        resolved = resolve("fit", list(arguments[1:]))
        identity = config_hash(resolved, (resolved.get("run") or {}).get("inputs"))
        folder = Path(row.method) / spec.dataset
    else:
        pipeline = row.pipeline.with_overrides(_pipeline_overrides(spec, row, row.pipeline), "overrides")
        pipeline = pipeline.with_seed(seed)
        if seed == row.seeds[0]:  # the others differ in nothing that could be wrong
            PipelineRunner(pipeline, runs_root, resolved=parsed).check()
        identity, folder = pipeline_identity(pipeline), Path("pipelines")
    run_id = folder_name(f"{spec.stem}-{row.name}-s{seed}-{identity[:8]}", "name of its runs")
    return Cell(row, seed, identity, run_id, runs_root / folder / run_id, runs_root, arguments, seeds)


def row_arguments(spec: TableSpec, row: Row, seeds: tuple[int, ...]) -> tuple[str, ...]:
    """Arguments of `leanlight` that run a row at a seed, or at several as replicas, as a reader would type them."""
    if row.pipeline is None:
        overrides = [option(key, value) for key, value in row.overrides.items()]
        fixed = {"seed_everything": seeds[0], "run.test": spec.checkpoint}
        if row.replicas > 1:
            fixed[REPLICAS] = len(seeds)
        return ("fit", "--config", row.config, *overrides, *(option(key, value) for key, value in fixed.items()))
    sets = [f"{key}={json.dumps(value)}" for key, value in _pipeline_overrides(spec, row, row.pipeline).items()]
    return ("run", row.config, *(word for pair in sets for word in ("--set", pair)), "--seed", str(seeds[0]))


def _pipeline_overrides(spec: TableSpec, row: Row, pipeline: PipelineSpec) -> dict[str, Any]:
    """A row's overrides, and the table's checkpoint rule for the stage that counts."""
    counted = next(stage for stage in pipeline.stages if stage.name == row.stage)
    rule = {f"{row.stage}.run.test": spec.checkpoint} if counted.command == "fit" else {}
    return {**row.overrides, **rule}


# -- from cells to a document


def build_document(spec: TableSpec, cells: Sequence[Cell]) -> dict[str, Any]:
    """Assemble the document from the entries and failures of all cells."""
    by_row = {row.name: [cell for cell in cells if cell.row.name == row.name] for row in spec.rows}
    entries = [cell.entry for row in by_row.values() for cell in row if cell.entry]
    newest = max(entries, key=lambda entry: str(entry["date"]), default={})
    machine = _most_common([entry["machine"] for entry in entries])
    values = {
        (name, metric): {
            cell.seed: cell.entry["metrics"][metric] for cell in row if cell.entry and metric in cell.entry["metrics"]
        }
        for name, row in by_row.items()
        for metric in spec.metrics
    }
    stale_rows = {cell.row.name for cell in cells if cell.entry and cell.entry["stale"]}
    return {
        "format": FORMAT,
        "method": spec.method,
        "dataset": spec.dataset,
        "table": spec.name,
        "stem": spec.stem,
        "scale": spec.scale,
        "title": spec.title,
        "note": spec.note,
        "headline": asdict(spec.headline) if spec.headline else None,
        "command": f"leanlight reproduce {shlex.quote(spec.name)}",
        "commit": newest.get("commit"),
        "commits": sorted({str(entry["commit"]) for entry in entries}),
        "dirty": any(entry["dirty"] for entry in entries),
        "date": newest.get("date"),
        "machine": machine,
        "complete": len(entries) == len(cells),
        "stale": bool(stale_rows),
        "seeds": list(spec.seeds),
        "checkpoint_rule": spec.checkpoint,
        "metrics": {name: asdict(metric) for name, metric in spec.metrics.items()},
        "rows": [_row(spec, row, by_row[row.name], machine) for row in spec.rows],
        "claims": [
            judge(claim, spec, values, stale=any(row in stale_rows for row, _ in claim.expr.references))
            for claim in spec.claims
        ],
        "profile": asdict(spec.profile) if spec.profile else None,
        "curves": [asdict(curve) for curve in spec.curves],
    }


def _without_folders(data: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """A data set's description whose source names file and folder, not where on this machine the folder lies."""
    if data is None:
        return None
    return {**data, "source": re.sub(r"(?<!\S)/(?:[^/\s]+/)*(?=[^/\s]+/[^/\s]+)", "", data.get("source") or "")}


def _row(spec: TableSpec, row: Row, cells: Sequence[Cell], machine: Mapping[str, Any]) -> dict[str, Any]:
    entries = [cell.entry for cell in cells if cell.entry]
    data: list[Any] = []
    for entry in entries:
        if entry["data"] and entry["data"] not in data:
            data.append(entry["data"])
    return {
        "name": row.name,
        "label": row.label,
        "method": row.method,
        "setting": row.setting,
        "config": row.config,
        "stage": row.stage,
        "overrides": row.overrides,
        "command": shlex.join(["leanlight", *row_arguments(spec, row, row.runs()[0])]),
        "checkpoint_rule": spec.checkpoint,
        "seeds": [entry["seed"] for entry in entries],
        "metrics": _measured(spec, entries),
        "paper": {name: asdict(figure) for name, figure in row.paper.items()},
        "wall_s": _mean(entries, "wall_s"),
        "peak_rss_mb": _largest(entries, "peak_rss_mb"),
        "peak_cuda_mb": _largest(entries, "peak_cuda_mb"),
        "samples_seen": _mean(entries, "samples_seen"),
        "stale": any(entry["stale"] for entry in entries),
        "data": data,
        "failed": {str(cell.seed): cell.failure for cell in cells if cell.failure},
        # A run's own machine is written only where it is not the table's.
        "runs": [{k: v for k, v in entry.items() if not (k == "machine" and v == machine)} for entry in entries],
    }


def _measured(spec: TableSpec, entries: Sequence[Entry]) -> dict[str, Any]:
    """Mean, deviation and values of every metric that a row has."""
    measured = {}
    for name, metric in spec.metrics.items():
        by_seed = {str(entry["seed"]): entry["metrics"][name] for entry in entries if name in entry["metrics"]}
        if by_seed:
            mean, std = mean_std(list(by_seed.values()))
            better = metric.higher_is_better
            measured[name] = {"mean": mean, "std": std, "n": len(by_seed), "by_seed": by_seed}
            measured[name]["higher_is_better"] = better
    return measured


def _most_common(machines: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine most runs ran on; empty for none."""
    if not machines:
        return {}
    texts = [json.dumps(machine, sort_keys=True) for machine in machines]
    most = Counter(texts).most_common(1)[0][0]
    return machines[texts.index(most)]


def _mean(parts: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [part[key] for part in parts if part[key] is not None]
    return round(mean_std(values)[0], 3) if values else None


def _numbers(summary: Mapping[str, Any], share: int = 1) -> dict[str, Any]:
    """What a summary itself counts: seconds, memory, samples; of one of so many replicas its share."""
    numbers = {key: value for key, value in summary.items() if isinstance(value, (int, float))}
    return {key: value / share if share > 1 and key in _SHARED else value for key, value in numbers.items()}


def _largest(parts: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return max((part[key] for part in parts if part.get(key) is not None), default=None)


# -- the file


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write atomically, as JSON any reader accepts (no NaN)."""
    atomic_write(path, json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_document(path: Path) -> dict[str, Any]:
    """Read a results JSON; UserError when it is not one."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `leanlight reproduce TABLE` writes it") from None
    except IsADirectoryError:
        raise UserError(f"{path}: expected a JSON file of results, got a folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: expected a JSON file of results, got what is no JSON ({error})") from None
    anew = "write it anew with `leanlight reproduce TABLE`"
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path}: not a result table of format {FORMAT}; {anew}")
    parts = [("table", document)]
    parts += [(kind, item) for kind in ("row", "claim") for item in document.get(f"{kind}s") or []]
    for kind, part in parts:
        missing = set(_KEYS[kind].split()) - set(part if isinstance(part, dict) else ())
        if missing:
            raise UserError(f"{path}: a {kind} has no {min(missing)!r}; {anew}")
    if curve := document.pop("curve", None):  # what tables wrote that could have one over a setting alone
        document["curves"] = [{"title": document["metrics"][curve["metric"]]["label"], "at": {}, **curve}]
    return document


def earlier_entries(paths: Iterable[Path], cells: Sequence[Cell]) -> dict[str, Entry]:
    """Entries of earlier documents that still are what the table asks for, by cell; the last document stands above."""
    wanted = {(cell.row.name, cell.seed): cell for cell in cells}
    entries = {}
    for path in paths:
        document = read_document(path) if path.is_file() else {"rows": []}
        for row in document["rows"]:
            for run in row["runs"]:
                cell = wanted.get((row["name"], run["seed"]))
                if cell is not None and cell.identity == run["config_hash"]:
                    entries[cell.key] = {"machine": document["machine"], **run}
    return entries
