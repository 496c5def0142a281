"""`leanlight report`: turn results into Markdown, figures and one HTML page."""

from __future__ import annotations

from pathlib import Path

from leanlight.cli.arguments import Parser
from leanlight.contracts.errors import UserError


def main(argv: list[str]) -> int:
    """Write the report and say where it is."""
    parser = Parser(prog="leanlight report", description=__doc__)
    parser.add_argument("tables", nargs="*", type=Path, metavar="TABLE_JSON", help="files that `reproduce` wrote")
    parser.add_argument("--all", action="store_true", help="every table in docs/results")
    parser.add_argument("--output", type=Path, help="folder of index.html (default: RUNS_ROOT/report)")
    parser.add_argument("--readme", action="store_true", help="also rewrite the result tables in the README files")
    parser.add_argument("--runs-root", type=Path, default=Path("runs"), help="where run folders are (default: runs)")
    args = parser.parse_args(argv)
    if bool(args.tables) == args.all:
        raise UserError("report: expected either result files or --all, e.g. leanlight report --all --output report")

    from leanlight.results.report import find_documents, write_benchmarks, write_readmes, write_report

    paths = find_documents() if args.all else args.tables
    page = write_report(paths, args.output or args.runs_root / "report", args.runs_root)
    for path in [*(path.with_suffix(".md") for path in paths), *(write_benchmarks() if args.all else [])]:
        print(path)
    if args.readme:
        for path in write_readmes(Path()):
            print(path)
    print(page)
    return 0
