"""`leanlight benchmark`: measure speed and memory of a method or of all, compare two measurements or two commits."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console

from leanlight.cli.arguments import Parser, number, output_file, output_folder
from leanlight.contracts.errors import UserError
from leanlight.contracts.files import atomic_write
from leanlight.contracts.ranges import PositiveInt
from leanlight.registry import METHODS, method, methods
from leanlight.runs import results_folder

_ROUNDS = 3


def main(argv: list[str]) -> int:
    """Measure, show and write; 0 when nothing failed, every target is met and every check passes, else 1."""
    args = _parser().parse_args(argv)
    _check(args)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    if args.compare:
        from leanlight.benchmarks.core import print_comparison, read

        print_comparison(read(args.compare[0]), read(args.compare[1]), console)
        return 0
    if args.commits:
        from leanlight.benchmarks.commits import compare_commits

        compare_commits(method(args.method).name, args.commits, args.rounds or _ROUNDS, args.quick, console)
        return 0
    folder = None if args.quick and not args.publish else results_folder(args.runs_root, args.publish)
    if args.all:
        return _measure_all(folder, args.quick, args.again, console)
    return _measure(method(args.method).name, args.output, folder, args.quick, console)


def _parser() -> Parser:
    parser = Parser(prog="leanlight benchmark", description=__doc__)
    parser.add_argument("method", nargs="?", help="method to measure")
    parser.add_argument("--all", action="store_true", help="every method that has a benchmark, and a table of all")
    parser.add_argument("--again", action="store_true", help="with --all: also what was measured on the present code")
    parser.add_argument("--output", type=output_file, help="default: RUNS_ROOT/results/METHOD/benchmark.json")
    parser.add_argument("--publish", action="store_true", help="write to docs/results/METHOD/benchmark.json instead")
    parser.add_argument(
        "--runs-root", type=output_folder, default=Path("runs"), help="folder of all runs (default: runs)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; not written by default")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="show two files side by side"
    )
    parser.add_argument(
        "--commits", nargs=2, metavar=("A", "B"), help="measure two commits of this checkout in turn, side by side"
    )
    parser.add_argument(
        "--rounds", type=number(PositiveInt), help=f"with --commits: measurements of each (default: {_ROUNDS})"
    )
    return parser


def _check(args: argparse.Namespace) -> None:
    """UserError for options that do not go together."""
    if bool(args.method) + args.all + bool(args.compare) != 1:
        raise UserError("benchmark: expected one of METHOD, --all and --compare, e.g. leanlight benchmark classifier")
    for option, needs in (("again", "all"), ("rounds", "commits")):
        if getattr(args, option) and not getattr(args, needs):
            raise UserError(f"--{option}: goes with --{needs}")
    if args.commits and not args.method:
        raise UserError("--commits: goes with a method, e.g. leanlight benchmark classifier --commits HEAD~1 HEAD")
    if args.commits and (args.output or args.publish):
        raise UserError("--commits: writes no file, so neither --output nor --publish goes with it")
    if args.output and args.all:
        raise UserError("--output: names one file, but there are several benchmarks; name a method, too")
    if args.output and args.output.suffix != ".json":
        raise UserError(f"--output: expected a .json file, got {args.output}")
    if args.output and args.publish:
        raise UserError("--publish: writes to docs/results, --output somewhere else; give one of them")


def _measure(name: str, output: Path | None, folder: Path | None, quick: bool, console: Console) -> int:
    """Run one benchmark and show it; write it to `output`, or to its place in a folder of results, if there is one."""
    entry = method(name).benchmark
    if not entry:
        others = ", ".join(info.name for info in methods().values() if info.benchmark)
        raise UserError(f"method {name!r}: has no benchmark; these have: {others}")
    from leanlight.allocator import keep_freed_memory
    from leanlight.benchmarks.core import document, passed, print_document

    keep_freed_memory()  # as `leanlight fit` does
    module, function = entry.split(":")
    console.print(f"benchmark of {name}: a few minutes; other work on this machine disturbs it", highlight=False)
    content = document(name, getattr(import_module(module), function)(quick), quick)
    print_document(content, console)
    if output is not None:
        _write(content, output, console)
    elif folder is not None:
        _write(content, folder / name / "benchmark.json", console)
        _write_overview(folder, console)
    return int(not passed(content))


def _measure_all(folder: Path | None, quick: bool, again: bool, console: Console) -> int:
    """Measure every method in a process of its own, but what is there already; show and write one table."""
    from leanlight.benchmarks.children import measure_in_child
    from leanlight.benchmarks.core import is_current, passed, read
    from leanlight.benchmarks.overview import print_overview, row_of

    documents, failed = [], {}
    for name in (name for name, info in methods().items() if info.benchmark):
        path = folder and folder / name / "benchmark.json"
        # The code of a package that adds a method is not in the hash.
        known = path and path.is_file() and not again and name in METHODS
        try:
            if path and known and is_current(content := read(path)):
                console.print(f"{name}: measured on this code, {content['date'][:10]}; --again repeats it")
            else:
                content = measure_in_child(name, quick)
                if path:
                    _write(content, path, console)
            documents.append(content)
        except UserError as error:
            failed[name] = str(error)
            console.print(f"failed: {name}: {error}", highlight=False, markup=False)
    print_overview([row_of(content) for content in documents], failed, console)
    if folder:
        _write_overview(folder, console)
    return int(bool(failed) or not all(map(passed, documents)))


def _write(content: dict[str, Any], path: Path, console: Console) -> None:
    from leanlight.benchmarks.core import markdown

    atomic_write(path, json.dumps(content, indent=2) + "\n")
    atomic_write(path.with_suffix(".md"), markdown(content))
    console.print(f"written: {path} and {path.with_suffix('.md').name}", highlight=False)


def _write_overview(folder: Path, console: Console) -> None:
    from leanlight.benchmarks.overview import write_performance

    for page in write_performance(folder):
        console.print(f"written: {page}", highlight=False)
