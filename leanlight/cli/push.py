"""`leanlight push`: a run's export, with its card, into a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from leanlight import runs
from leanlight.cli.arguments import Parser, add_trust
from leanlight.contracts.errors import UserError

#: Where a run keeps what may be shared, in the order in which it is looked for.
_SHARED = ("export", "select", "bank")


def main(argv: list[str]) -> int:
    """Export if nothing is exported yet, write the card where it lacks, upload."""
    parser = Parser(prog="leanlight push", description=__doc__)
    parser.add_argument(
        "source", type=Path, help="folder of a finished run, or one of its artefacts, e.g. RUN/artifacts/selection/..."
    )
    parser.add_argument("repo", help="USER/NAME; made if it is not there")
    parser.add_argument("--type", choices=("model", "dataset"), help="of the repository; by default what the source is")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", default="An export of Leanlight", help="of the commit (default: %(default)s)")
    add_trust(parser)
    args = parser.parse_args(argv)
    if not args.message.strip():
        raise UserError("--message: expected words, got none")
    run = _finished_run(args.source)

    from leanlight.sharing import hub
    from leanlight.sharing.card import Origin, is_current, write_card
    from leanlight.sharing.kinds import kind_of

    hub.check_push(args.repo)
    folder = _shared(args.source, run, args.trust)
    if not is_current(folder):
        write_card(folder, Origin.of(folder))
    repo_type = args.type or kind_of(folder).repo_type
    print(hub.push(folder, args.repo, repo_type, args.message, args.private))
    return 0


def _finished_run(source: Path) -> Path:
    """The run that a folder is, or belongs to."""
    run = runs.run_of(source)
    summary = runs.read_summary(run) if source.is_dir() else None
    if summary is None:
        raise UserError(f"source: expected the folder of a run, or one of its artefacts, got {source}")
    if summary.get("status") != "finished":
        raise UserError(f"source: {run} has not finished (it is {summary.get('status')}); --resume it first")
    return run


def _shared(source: Path, run: Path, trust: list[str]) -> Path:
    """The folder to upload; exported now where there is none."""
    if source != run:
        return source
    for name in _SHARED:
        folder = run / "artifacts" / name
        if folder.is_dir() and any(folder.iterdir()):
            return folder
    from leanlight.cli import export

    export.main([str(run), *(f"--trust={package}" for package in trust)])
    return run / "artifacts" / "export"
