"""`leanlight report`: turn results into Markdown, figures and a site, or one page of the tables given."""

from __future__ import annotations

from pathlib import Path

from leanlight.cli.arguments import Parser, output_folder
from leanlight.contracts.errors import UserError


def main(argv: list[str]) -> int:
    """Write the report and say where it is."""
    parser = Parser(prog="leanlight report", description=__doc__)
    parser.add_argument("tables", nargs="*", type=Path, metavar="TABLE_JSON", help="files that `reproduce` wrote")
    parser.add_argument(
        "--all", action="store_true", help="a site of every table in RUNS_ROOT/results and docs/results"
    )
    parser.add_argument("--output", type=output_folder, help="folder of index.html (default: RUNS_ROOT/report)")
    parser.add_argument("--readme", action="store_true", help="also rewrite the README files from docs/results")
    parser.add_argument(
        "--runs-root", type=output_folder, default=Path("runs"), help="where run folders are (default: runs)"
    )
    args = parser.parse_args(argv)
    if bool(args.tables) == args.all:
        raise UserError("report: expected either result files or --all, e.g. leanlight report --all --output report")

    from leanlight.benchmarks.core import write_pages
    from leanlight.benchmarks.overview import write_performance
    from leanlight.results.report import find_documents, write_readmes, write_report
    from leanlight.runs import results_folder

    published, local = (results_folder(args.runs_root, publish) for publish in (True, False))
    # For README files what is published counts, on a page for oneself what this machine has measured.
    folders = [published] if args.readme else [published, local]
    paths = find_documents(*folders) if args.all else args.tables
    page = write_report(paths, args.output or args.runs_root / "report", args.runs_root, site=args.all)
    measured = [*write_pages(*folders), *write_performance(*folders)] if args.all else []
    for path in [*(path.with_suffix(".md") for path in paths), *measured]:
        print(path)
    if args.readme:
        for path in write_readmes(Path(), published):
            print(path)
    print(page)
    return 0
