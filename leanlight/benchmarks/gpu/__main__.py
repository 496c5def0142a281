"""What the suite promises on a GPU, checked on this machine's: `make gpu`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from leanlight.benchmarks.gpu.checks import facts, show, show_figures
from leanlight.benchmarks.gpu.launch import Documents, Worker, run
from leanlight.benchmarks.overview import write_performance
from leanlight.registry import METHODS

_NAMES = ("nn", *METHODS)  # nn: what methods share
_LIMIT = 540.0
_COLOURS = {"passed": "green", "failed": "red", "not_run": "yellow"}


def main(argv: list[str]) -> int:
    """Check, show and write; 0 when nothing has failed, 1 when something has, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m leanlight.benchmarks.gpu", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=_NAMES, default=_NAMES, help="methods, and nn: what they share")
    parser.add_argument("--check", nargs="+", default=[], help="names of checks, or a first part such as speed")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder (default: docs/results)")
    parser.add_argument("--limit", type=float, default=_LIMIT, help=f"seconds for all (default: {_LIMIT:.0f})")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    if problem := no_gpu():
        print(f"gpu: {problem}", file=sys.stderr)
        return 2
    groups = list(dict.fromkeys(args.only))
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 140)
    console.print(f"gpu: {', '.join(groups)}; at most {args.limit:.0f} s", highlight=False)

    def told(group: str, line: dict[str, Any]) -> None:
        colour, seconds = _COLOURS[line["verdict"]], f"{line['seconds']:5.1f} s"
        verdict = f"[{colour}]{line['verdict'].replace('_', ' '):8}[/]"
        console.print(f"{time.monotonic() - begin:6.1f} {verdict} {seconds}  {group}/{line['name']}", highlight=False)

    documents = Documents(args.output, facts, merge=bool(args.check), told=told)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="leanlight-gpu-") as place:
        beside = [Worker([group], Path(place), max(1, cores // len(groups)), args.check) for group in groups]
        alone = Worker(groups, Path(place), cores, args.check, alone=True)
        run(beside, alone, documents, begin + args.limit)
    summarise(documents.lines, console)
    write_performance(args.output)
    console.print(f"{time.monotonic() - begin:.0f} s; written: {args.output}/*/gpu.json", highlight=False)
    return int(any(line["verdict"] == "failed" for lines in documents.lines.values() for line in lines))


def no_gpu() -> str:
    """One line when there is no GPU to check, else nothing."""
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch; the checks need 2.11 or newer"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU here: nothing to check"
    return ""


def summarise(lines: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """A table of all checks, then why some failed or were not run."""
    table = Table("check", "verdict", "value", "expected", "tolerance", "figures", title="On this GPU")
    reasons = []
    for group, listed in lines.items():
        for line in listed:
            cells = [show(line[key]) for key in ("value", "expected", "tolerance")]
            name = f"{group}/{line['name']}"
            verdict = line["verdict"].replace("_", " ")
            table.add_row(name, verdict, *cells, show_figures(line["figures"]), style=_COLOURS[line["verdict"]])
            if line["why"] and line["verdict"] != "passed":
                reasons.append(f"{verdict} {name}: {line['why']}")
    console.print(table)
    for reason in reasons:
        console.print(reason, highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
