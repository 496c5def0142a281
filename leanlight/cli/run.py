"""`leanlight run`: run a pipeline of stages; finished stages are reused."""

from __future__ import annotations

from pathlib import Path

from leanlight.cli.arguments import Parser, number, output_folder
from leanlight.contracts.ranges import Seed


def main(argv: list[str]) -> int:
    """Run a pipeline; 0 when all stages have finished, 1 when one failed."""
    parser = Parser(prog="leanlight run", description=__doc__)
    parser.add_argument("pipeline", help="YAML file, or a config's name: METHOD/pipelines/NAME")
    parser.add_argument("--fresh", action="store_true", help="repeat every stage")
    parser.add_argument(
        "--from", dest="start_at", metavar="STAGE", default="", help="repeat this stage and those after it"
    )
    parser.add_argument(
        "--rerun-stale", action="store_true", help="repeat stages whose code has changed since they ran"
    )
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE", help="override a stage's key")
    parser.add_argument("--seed", type=number(Seed), help="seed of every stage that names none")
    parser.add_argument(
        "--runs-root", type=output_folder, default=Path("runs"), help="folder of all runs (default: runs)"
    )
    parser.add_argument("--id", default="", help="name of the summary under RUNS_ROOT/pipelines (default: file name)")
    args = parser.parse_args(argv)

    from leanlight.results.launch import terminations_interrupt
    from leanlight.results.pipeline import PipelineRunner, set_overrides
    from leanlight.results.pipeline_spec import load_pipeline

    spec = load_pipeline(args.pipeline).with_overrides(set_overrides(args.set), "--set")
    if args.seed is not None:
        spec = spec.with_seed(args.seed)
    runner = PipelineRunner(spec, args.runs_root, args.id)
    with terminations_interrupt():
        code = runner.run(fresh=args.fresh, start_at=args.start_at, rerun_stale=args.rerun_stale)
    if code == 0:
        print(f"pipeline: {runner.folder / 'summary.json'}")
    return int(code != 0)
