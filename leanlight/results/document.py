"""The published JSON of a table: rows with their runs, aggregates, verdicts. Written by commands, never by hand."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from leanlight.contracts.errors import UserError
from leanlight.contracts.files import atomic_write
from leanlight.results.cells import Cell, row_arguments
from leanlight.results.claims import judge, mean_std
from leanlight.results.table_spec import Row, TableSpec

FORMAT = 1
# What every part of a document has, so that a file of other making is one line and no traceback.
_KEYS = {
    "table": "method dataset table stem scale title note command commit commits dirty date machine complete stale "
    "seeds checkpoint_rule metrics rows claims",
    "row": "name label method setting config stage overrides command seeds metrics paper wall_s peak_rss_mb "
    "peak_cuda_mb samples_seen stale data failed runs",
    "claim": "text scope expr margin min_seeds verdict counts_for_paper evidence",
}
Entry = dict[str, Any]  # what `read_cell` returns


def read_document(path: Path) -> dict[str, Any]:
    """Read a results JSON; UserError when it is not one."""
    try:
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `leanlight reproduce TABLE` writes it") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    anew = "write it anew with `leanlight reproduce TABLE`"
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UserError(f"{path}: not a result table of format {FORMAT}; {anew}")
    parts = [("table", document)]
    parts += [(kind, item) for kind in ("row", "claim") for item in document.get(f"{kind}s", [])]
    for kind, part in parts:
        missing = set(_KEYS[kind].split()) - set(part)
        if missing:
            raise UserError(f"{path}: a {kind} has no {min(missing)!r}; {anew}")
    return document


def published_entries(path: Path, cells: Sequence[Cell]) -> dict[tuple[str, int], Entry]:
    """Entries of an earlier document that still are what the table asks for, by row and seed."""
    if not path.is_file():
        return {}
    document = read_document(path)
    wanted = {(cell.row.name, cell.seed): cell.identity for cell in cells}
    found = {}
    for row in document["rows"]:
        for run in row["runs"]:
            key = (row["name"], run["seed"])
            if wanted.get(key) == run["config_hash"]:
                found[key] = {"machine": document["machine"], **run}
    return found


def build_document(
    spec: TableSpec, entries: Mapping[tuple[str, int], Entry], failures: Mapping[tuple[str, int], str]
) -> dict[str, Any]:
    """Assemble the document. entries and failures: by row name and seed."""
    ordered = [entries[row.name, seed] for row in spec.rows for seed in spec.seeds if (row.name, seed) in entries]
    newest = max(ordered, key=lambda entry: str(entry["date"]), default={})
    machine = _most_common([entry["machine"] for entry in ordered])
    values = {
        (row.name, metric): {
            seed: entries[row.name, seed]["metrics"][metric]
            for seed in spec.seeds
            if metric in entries.get((row.name, seed), {}).get("metrics", {})
        }
        for row in spec.rows
        for metric in spec.metrics
    }
    stale_rows = {row for (row, _), entry in entries.items() if entry["stale"]}
    return {
        "format": FORMAT,
        "method": spec.method,
        "dataset": spec.dataset,
        "table": spec.name,
        "stem": spec.stem,
        "scale": spec.scale,
        "title": spec.title,
        "note": spec.note,
        "command": f"leanlight reproduce {shlex.quote(spec.name)}",
        "commit": newest.get("commit"),
        "commits": sorted({str(entry["commit"]) for entry in ordered}),
        "dirty": any(entry["dirty"] for entry in ordered),
        "date": newest.get("date"),
        "machine": machine,
        "complete": len(ordered) == len(spec.rows) * len(spec.seeds),
        "stale": bool(stale_rows),
        "seeds": list(spec.seeds),
        "checkpoint_rule": spec.checkpoint,
        "metrics": {name: asdict(metric) for name, metric in spec.metrics.items()},
        "rows": [_row(spec, row, entries, failures, values, machine) for row in spec.rows],
        "claims": [
            judge(claim, spec, values, stale=any(row in stale_rows for row, _ in claim.expr.references))
            for claim in spec.claims
        ],
        "profile": asdict(spec.profile) if spec.profile else None,
    }


def _row(
    spec: TableSpec,
    row: Row,
    entries: Mapping[tuple[str, int], Entry],
    failures: Mapping[tuple[str, int], str],
    values: Mapping[tuple[str, str], Mapping[int, float]],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    runs = [entries[row.name, seed] for seed in spec.seeds if (row.name, seed) in entries]
    metrics = {}
    for name, metric in spec.metrics.items():
        by_seed = values[row.name, name]
        if by_seed:
            mean, std = mean_std(list(by_seed.values()))
            shown = {str(seed): value for seed, value in by_seed.items()}
            better = metric.higher_is_better
            metrics[name] = {"mean": mean, "std": std, "n": len(by_seed), "by_seed": shown, "higher_is_better": better}
    data: list[Any] = []
    for run in runs:
        if run["data"] and run["data"] not in data:
            data.append(run["data"])
    return {
        "name": row.name,
        "label": row.label,
        "method": row.method,
        "setting": row.setting,
        "config": row.config,
        "stage": row.stage,
        "overrides": row.overrides,
        "command": shlex.join(["leanlight", *row_arguments(spec, row, spec.seeds[0])]),
        "checkpoint_rule": spec.checkpoint,
        "seeds": [run["seed"] for run in runs],
        "metrics": metrics,
        "paper": {name: asdict(figure) for name, figure in row.paper.items()},
        "wall_s": _mean(runs, "wall_s"),
        "peak_rss_mb": _max(runs, "peak_rss_mb"),
        "peak_cuda_mb": _max(runs, "peak_cuda_mb"),
        "samples_seen": _mean(runs, "samples_seen"),
        "stale": any(run["stale"] for run in runs),
        "data": data,
        "failed": {str(seed): failures[row.name, seed] for seed in spec.seeds if (row.name, seed) in failures},
        "runs": [_without_repeats(run, machine) for run in runs],
    }


def _without_repeats(run: Entry, machine: Mapping[str, Any]) -> Entry:
    """A run's own machine is written only where it is not the table's."""
    return {key: value for key, value in run.items() if not (key == "machine" and value == machine)}


def _most_common(machines: list[dict[str, Any]]) -> dict[str, Any]:
    """The machine most runs ran on; empty for none."""
    if not machines:
        return {}
    texts = [json.dumps(machine, sort_keys=True) for machine in machines]
    most = Counter(texts).most_common(1)[0][0]
    return machines[texts.index(most)]


def _mean(runs: list[Entry], key: str) -> float | None:
    values = [run[key] for run in runs if run[key] is not None]
    return round(mean_std(values)[0], 3) if values else None


def _max(runs: list[Entry], key: str) -> float | None:
    values = [run[key] for run in runs if run[key] is not None]
    return max(values) if values else None


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Write atomically, as JSON any reader accepts (no NaN)."""
    atomic_write(path, json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
