"""`leanlight sweep`: run a W&B sweep file on this machine; Optuna chooses the settings."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from leanlight.cli.arguments import Parser, number, output_folder
from leanlight.contracts.errors import MissingExtraError
from leanlight.contracts.ranges import PositiveInt


def main(argv: list[str]) -> int:
    """Run a sweep, or go on with it; 0 when every trial has ended, 1 when one failed."""
    parser = Parser(
        prog="leanlight sweep",
        description=__doc__,
        epilog="Any option of `leanlight fit` may follow, as --KEY=VALUE, for every trial.",
    )
    parser.add_argument("file", help="sweep file of W&B, or a config's name: sweeps/NAME")
    parser.add_argument("--trials", type=number(PositiveInt), help="how many in all (default: run_cap of the file)")
    parser.add_argument("--jobs", type=number(PositiveInt), default=1, help="processes side by side (default: 1)")
    parser.add_argument(
        "--runs-root", type=output_folder, default=Path("runs"), help="folder of all runs (default: runs)"
    )
    own = {option for action in parser._actions for option in action.option_strings}
    extra = [word for word in argv if word.startswith("--") and "=" in word and word.partition("=")[0] not in own]
    args = parser.parse_args([word for word in argv if word not in extra])

    from leanlight.results.sweep_spec import load_sweep

    spec = load_sweep(args.file, extra, args.trials)
    if find_spec("optuna") is None:
        raise MissingExtraError("optuna", "sweep")

    from leanlight.results.launch import terminations_interrupt
    from leanlight.results.sweep import Sweep

    with terminations_interrupt():
        return Sweep(spec, args.runs_root, args.jobs).run()
