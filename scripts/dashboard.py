"""Watch all runs in the terminal: state, progress, newest metrics, speed. Reads only files that every run writes.

python scripts/dashboard.py             once
python scripts/dashboard.py --watch 5   again every 5 seconds, until Ctrl-C
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from leanlight.runs import find_runs, read_summary

COLOURS = {"running": "cyan", "finished": "green", "interrupted": "yellow", "failed": "red", "diverged": "red"}
METRICS = ("train/loss", "val/accuracy", "val/loss", "test/accuracy")


def newest_metrics(run: Path) -> dict[str, str]:
    """The last value of every column of metrics.csv that has one."""
    path = run / "metrics.csv"
    if not path.is_file():
        return {}
    newest: dict[str, str] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            newest |= {name: value for name, value in row.items() if name and value}
    return newest


def age(moment: float) -> str:
    """Time since `moment` (seconds since 1970), in the largest sensible unit."""
    seconds = time.time() - moment
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def cells(run: Path, summary: dict[str, Any], names: Sequence[str]) -> list[str]:
    """What the table shows of one run."""
    metrics = newest_metrics(run)
    speed = run / "throughput.json"
    samples = json.loads(speed.read_text())["train/samples_per_s"] if speed.is_file() else None
    progress = [f"{key.split('/')[1]} {value}" for key, value in metrics.items() if key.startswith("progress/")]
    files = [path for path in (run / "metrics.csv", run / "summary.json") if path.is_file()]
    return [
        "/".join(run.parts[-3:]),
        f"[{COLOURS.get(summary['status'], 'white')}]{summary['status']}",
        ", ".join(progress),
        *(f"{float(metrics[name]):.4f}" if name in metrics else "" for name in names),
        f"{samples:,.0f}" if samples else "",
        age(max(path.stat().st_mtime for path in files)),
    ]


def table(root: Path, names: Sequence[str], last: int) -> Table:
    """The newest `last` runs under `root`, newest first."""
    found = [(run, summary) for run in find_runs(root) if (summary := read_summary(run)) is not None]
    found.sort(key=lambda pair: pair[1]["date"], reverse=True)
    shown = Table(title=f"{len(found)} runs in {root}, {datetime.now():%H:%M:%S}", title_justify="left")
    for name in ("run", "state", "progress", *names, "samples/s", "changed"):
        shown.add_column(name, justify="left" if name in ("run", "state", "progress") else "right")
    for run, summary in found[:last]:
        shown.add_row(*cells(run, summary, names))
    return shown


def main() -> None:
    """Show the table once or until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path("runs"), help="runs root (default: runs)")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="show again at this interval")
    parser.add_argument("--last", type=int, default=20, help="how many runs (default: 20)")
    parser.add_argument("--metric", action="append", metavar="NAME", help=f"default: {', '.join(METRICS)}")
    args = parser.parse_args()
    console = Console()
    names = args.metric or METRICS
    if args.watch is None:
        console.print(table(args.root, names, args.last))
        return
    try:
        with Live(table(args.root, names, args.last), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(args.watch)
                live.update(table(args.root, names, args.last), refresh=True)
    except KeyboardInterrupt:
        console.print()


if __name__ == "__main__":
    main()
