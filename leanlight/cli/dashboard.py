"""`leanlight dashboard`: make a method's dashboard at W&B, from what one of its runs has logged."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from leanlight.cli.arguments import Parser
from leanlight.contracts.errors import MissingExtraError, UserError


def main(argv: list[str]) -> int:
    """Print a dashboard, or save it as a view of a project; 0 when it is there."""
    parser = Parser(prog="leanlight dashboard", description=__doc__)
    parser.add_argument("source", metavar="METHOD", help="method with a run in RUNS_ROOT, or a run folder")
    parser.add_argument("--entity", default="", help="user or team at W&B (default: your own)")
    parser.add_argument("--project", default="leanlight", help="project at W&B (default: %(default)s)")
    parser.add_argument("--print", action="store_true", dest="shown", help="only print what it would show, as JSON")
    parser.add_argument("--runs-root", type=Path, default=Path("runs"), help="folder of all runs (default: runs)")
    args = parser.parse_args(argv)

    from leanlight.results.dashboard import describe, find_run, workspace
    from leanlight.tracking import is_offline

    dashboard = describe(find_run(args.source, args.runs_root))
    if args.shown:
        print(json.dumps(asdict(dashboard), indent=2, ensure_ascii=False))
        return 0
    if find_spec("wandb_workspaces") is None:
        raise MissingExtraError("wandb-workspaces", "tracking")
    if is_offline("auto"):
        raise UserError("W&B: no key, so nothing can be saved there; `wandb login` first, or --print the dashboard")
    import wandb

    try:
        entity = args.entity or str(wandb.Api().default_entity)
        view = workspace(dashboard, entity, args.project)
        view.save()
    except Exception as error:  # of W&B or the network
        first = str(error).strip().splitlines()[:1]
        raise UserError(": ".join(["W&B: the dashboard is not saved", type(error).__name__, *first])) from error
    print(f"dashboard: {view.url}")
    return 0
