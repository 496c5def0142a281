"""`leanlight benchmark`: measure speed and memory of a method, or compare two measurements."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

from rich.console import Console

from leanlight.cli.arguments import Parser, output_file, output_folder
from leanlight.contracts.errors import UserError
from leanlight.contracts.files import atomic_write
from leanlight.registry import method, methods
from leanlight.runs import results_folder


def main(argv: list[str]) -> int:
    """Measure, show and write; 0 when every target is met and every check passes, else 1."""
    parser = Parser(prog="leanlight benchmark", description=__doc__)
    parser.add_argument("method", nargs="?", help="method; default: every one that has a benchmark")
    parser.add_argument("--output", type=output_file, help="default: RUNS_ROOT/results/METHOD/benchmark.json")
    parser.add_argument("--publish", action="store_true", help="write to docs/results/METHOD/benchmark.json instead")
    parser.add_argument(
        "--runs-root", type=output_folder, default=Path("runs"), help="folder of all runs (default: runs)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; not written by default")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="show two files side by side"
    )
    args = parser.parse_args(argv)
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    if args.compare:
        from leanlight.benchmarks.core import print_comparison, read

        print_comparison(read(args.compare[0]), read(args.compare[1]), console)
        return 0
    names = [name for name, info in methods().items() if info.benchmark]
    if args.method:
        names = [method(args.method).name]
    if args.output and len(names) > 1:
        raise UserError("--output: names one file, but there are several benchmarks; name a method, too")
    if args.output and args.output.suffix != ".json":
        raise UserError(f"--output: expected a .json file, got {args.output}")
    if args.output and args.publish:
        raise UserError("--publish: writes to docs/results, --output somewhere else; give one of them")
    folder = None if args.quick and not args.publish else results_folder(args.runs_root, args.publish)
    return max(
        _measure(name, args.output or (folder and folder / name / "benchmark.json"), args.quick, console)
        for name in names
    )


def _measure(name: str, output: Path | None, quick: bool, console: Console) -> int:
    """Run one benchmark and show it; write it to `output`, if given, and a page beside it."""
    entry = method(name).benchmark
    if not entry:
        others = ", ".join(info.name for info in methods().values() if info.benchmark)
        raise UserError(f"method {name!r}: has no benchmark; these have: {others}")
    from leanlight.allocator import keep_freed_memory
    from leanlight.benchmarks.core import document, markdown, print_document

    keep_freed_memory()  # as `leanlight fit` does
    module, function = entry.split(":")
    console.print(f"benchmark of {name}: a few minutes; other work on this machine disturbs it", highlight=False)
    content = document(name, getattr(import_module(module), function)(quick), quick)
    print_document(content, console)
    if output is not None:
        atomic_write(output, json.dumps(content, indent=2) + "\n")
        atomic_write(output.with_suffix(".md"), markdown(content))
        console.print(f"written: {output} and {output.with_suffix('.md').name}", highlight=False)
    return int(not all(target["met"] for target in content["targets"]) or not all(content["checks"].values()))
