"""`leanlight export`: write a trained model so that it works without this suite."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml

from leanlight.cli.arguments import Parser, add_trust, output_folder
from leanlight.contracts.errors import UserError

_MODEL = "--model.init_args."


def parser() -> Parser:
    """The command's options; a pipeline checks a stage's options with it."""
    parser = Parser(
        prog="leanlight export",
        description=__doc__,
        epilog=f"{_MODEL}KEY=VALUE: an argument of the model that differs, e.g. a file that has moved",
    )
    parser.add_argument("source", type=Path, help="run folder or checkpoint file")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which one of a run folder")
    parser.add_argument(
        "--output", type=output_folder, help="folder to write; by default artifacts/export in the run folder"
    )
    add_trust(parser)
    return parser


def arguments(argv: list[str]) -> argparse.Namespace:
    """The parsed options; what they change in the model is `overrides`."""
    changed = [word for word in argv if word.startswith(_MODEL) and "=" in word]
    args = parser().parse_args([word for word in argv if word not in changed])
    pairs = (word.removeprefix(_MODEL).split("=", 1) for word in changed)
    args.overrides = {key: yaml.safe_load(value) for key, value in pairs}
    return args


def main(argv: list[str]) -> int:
    """Export a run's last or best model, or one checkpoint."""
    args = arguments(argv)
    from leanlight.experiment import load
    from leanlight.locks import locked
    from leanlight.sharing.card import Origin, check_card, write_card

    module: Any = load(args.source, args.checkpoint, args.trust, args.overrides)
    if not hasattr(module, "export"):
        raise UserError(f"source: {args.source} holds a {type(module).__name__}, which exports nothing")
    folder = args.source / "artifacts" / "export" if args.source.is_dir() else args.source.with_suffix("")
    output = args.output or folder
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot write {output} ({error.strerror})") from error
    check_card(output)
    origin = Origin.of(args.source, args.checkpoint if args.source.is_dir() else args.source.stem)
    with locked(args.source) if output == folder and args.source.is_dir() else nullcontext():
        paths = [*module.export(output), write_card(output, origin)]
    print(*dict.fromkeys(map(str, paths)), sep="\n")
    return 0
