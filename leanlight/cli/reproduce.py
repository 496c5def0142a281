"""`leanlight reproduce`: run what a result table lacks; write its figures and verdicts."""

from __future__ import annotations

import re
from pathlib import Path

from leanlight.cli.arguments import Parser, number, output_file, output_folder
from leanlight.contracts.errors import UserError
from leanlight.contracts.ranges import PositiveInt, Seed


def main(argv: list[str]) -> int:
    """Bring a table up to date; 0 when every cell has a result, 1 when one failed."""
    parser = Parser(prog="leanlight reproduce", description=__doc__)
    parser.add_argument("table", help="YAML file, or a config's name: METHOD/tables/NAME")
    parser.add_argument(
        "--jobs", type=number(PositiveInt), help="processes side by side (default: one for each device, else 1)"
    )
    parser.add_argument(
        "--devices", default="", help="GPUs by index or UUID, e.g. 0,1; each process gets one (default: all there are)"
    )
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="only this row; may be repeated")
    parser.add_argument(
        "--seed", action="append", default=[], type=number(Seed), help="only this seed; may be repeated"
    )
    parser.add_argument("--fresh", action="store_true", help="repeat the cells asked for even if they have finished")
    parser.add_argument("--rerun-stale", action="store_true", help="repeat cells whose code has changed since they ran")
    parser.add_argument(
        "--runs-root", type=output_folder, default=Path("runs"), help="folder of all runs (default: runs)"
    )
    parser.add_argument("--output", type=output_file, help="default: RUNS_ROOT/results/METHOD/TABLE.json")
    parser.add_argument("--publish", action="store_true", help="write to docs/results/METHOD/TABLE.json instead")
    parser.add_argument("--dry-run", action="store_true", help="only show what would run")
    args = parser.parse_args(argv)

    from leanlight.results.launch import terminations_interrupt
    from leanlight.results.reproduce import Options, reproduce
    from leanlight.results.table_spec import load_table

    devices = [device.strip() for device in args.devices.split(",") if device.strip()]
    if strange := [device for device in devices if not re.fullmatch(r"\d+|(GPU|MIG)-[\w/-]+", device)]:
        raise UserError(f"--devices: expected GPUs by index or UUID, e.g. 0,1, got {strange[0]!r}")
    options = Options(
        jobs=args.jobs if args.jobs is not None else max(1, len(devices)),
        devices=devices,
        only=args.only,
        seeds=args.seed,
        fresh=args.fresh,
        rerun_stale=args.rerun_stale,
        dry_run=args.dry_run,
        runs_root=args.runs_root,
        output=args.output,
        publish=args.publish,
    )
    with terminations_interrupt():
        return reproduce(load_table(args.table), options)
