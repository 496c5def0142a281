"""`leanlight select`: choose the items of a labelled set to keep, from what a selector says of them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from leanlight.cli.arguments import Parser, add_trust, number, output_folder
from leanlight.contracts.errors import UserError
from leanlight.contracts.ranges import PositiveShare, Seed
from leanlight.selection_rules import RULES
from leanlight.selection_rules import rule as rule_info


def parser() -> Parser:
    """The command's options; a pipeline checks a stage's options with it."""
    parser = Parser(prog="leanlight select", description=__doc__)
    parser.add_argument(
        "features", nargs="?", type=Path, help="run folder of `leanlight predict`, or one .safetensors file of features"
    )
    parser.add_argument("--list", action="store_true", help="say what each rule does and needs")
    parser.add_argument("--rule", help="a name of --list, or the import path of a Rule of your own")
    parser.add_argument(
        "--keep", type=number(PositiveShare), help="share of the items of each class to keep, in (0, 1]"
    )
    parser.add_argument("--seed", type=number(Seed), help="of whatever the rule draws (default: 0)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a switch of the rule, or JSON of several",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML with the keys rule, keep, seed and set")
    parser.add_argument(
        "--output", type=output_folder, help="folder to write (default: artifacts/selection/RULE_KEEP_sSEED of the run)"
    )
    parser.add_argument(
        "--images",
        type=output_folder,
        metavar="DIR",
        help="also write the chosen pictures there, in a folder for each class",
    )
    parser.add_argument(
        "--patches",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="leave out patches of those pictures: drop_ratio, patch, patch_select, reconstructor, steps",
    )
    parser.add_argument(
        "--wandb",
        choices=("auto", "offline", "online", "disabled"),
        default="disabled",
        help="log the selection as an artefact; as run.wandb, but disabled by default",
    )
    add_trust(parser)
    return parser


def arguments(argv: list[str]) -> argparse.Namespace:
    """Parsed and checked as far as can be without the features: rule, share, seed and switches."""
    args = parser().parse_args(argv)
    if args.list:
        return args
    args.settings = _settings(args.set, "--set")
    if args.config is not None:
        _add_config(args)
    args.seed = 0 if args.seed is None else args.seed
    if args.features is None:
        raise UserError("select: expected FEATURES, the run folder of `leanlight predict`")
    if args.rule is None:
        raise UserError("--rule: expected a rule; `leanlight select --list` names them")
    if "." not in args.rule:
        rule_info(args.rule)
    if args.keep is None:
        raise UserError("--keep: expected a share of the items in (0, 1], e.g. --keep 0.1")
    from leanlight.invocation import lies_in_a_run
    from leanlight.selection import build_patches, build_rule  # loads torch
    from lit_modules.admission import named_packages

    # What the user wrote is trusted, as everywhere; what a config in a run folder names is not.
    foreign = args.config is not None and lies_in_a_run(args.config)
    args.rule_object = build_rule(
        args.rule, args.settings, [*args.trust, *(() if foreign else named_packages(args.rule))]
    )
    args.patch_drop = build_patches(_settings(args.patches, "--patches")) if args.patches else None
    if args.patch_drop and args.images is None:
        raise UserError("--patches: goes with --images DIR, the pictures they are left out of")
    return args


def _settings(texts: list[str], option: str) -> dict[str, Any]:
    """Switches: ``key=value``, values as YAML, or mappings of several. option: whose they are, for the error."""
    settings: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            if text.lstrip().startswith("{"):
                settings |= json.loads(text)
            elif equals and key:
                settings[key] = yaml.safe_load(value)
            else:
                raise ValueError("neither KEY=VALUE nor a mapping")
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise UserError(f"{option}: expected KEY=VALUE or a JSON mapping, got {text!r} ({error})") from None
    return settings


def _add_config(args: argparse.Namespace) -> None:
    """Fill what the command line leaves open from a YAML file."""
    from leanlight.results.reading import Reader, read_mapping

    if not args.config.is_file():
        raise UserError(f"--config: nothing at {args.config}")
    reader = Reader(read_mapping(args.config), args.config.name, "rule keep seed set")
    args.rule = args.rule or reader.get("rule", str, None)
    args.keep = reader.ranged("keep", PositiveShare) if args.keep is None else args.keep
    args.seed = reader.ranged("seed", Seed) if args.seed is None else args.seed
    args.settings = {**reader.get("set", dict, {}), **args.settings}


def _list() -> str:
    width = max(map(len, RULES))
    lines = [
        f"{name:<{width}}  {info.help}; needs {', '.join(info.needs) or 'labels alone'}" for name, info in RULES.items()
    ]
    return "\n".join([*lines, "Needs are what `leanlight predict` writes of the training part for a selector."])


def _images(args: argparse.Namespace) -> Any:
    """What writes the pictures, if they are asked for."""
    if args.images is None:
        return None
    from leanlight.selection_images import PictureFolders  # loads lightning

    return PictureFolders(args.features, args.images, args.trust, args.patch_drop)


def main(argv: list[str]) -> int:
    """Select and say where the selection is."""
    args = arguments(argv)
    if args.list:
        print(_list())
        return 0
    from leanlight.selection import default_output, select

    place = (args.features, args.rule, args.keep, args.seed, args.settings)
    output = args.output or default_output(*place)
    images = _images(args)
    try:
        record = select(
            args.features,
            args.rule,
            args.rule_object,
            args.keep,
            args.seed,
            output,
            args.patch_drop,
            images.shown if images else None,
        )
    except KeyboardInterrupt:
        print("finished classes are kept; the same command goes on from there", file=sys.stderr)
        raise
    print(f"{record['kept']:,} of {record['items']:,} items: {output / 'selection.safetensors'}")
    if args.wandb != "disabled":
        from leanlight.tracking import log_selection

        log_selection(args.features, output, record, args.wandb)
    if images is not None:
        images.write(output, args.seed)
        print(f"pictures: {args.images}")
    return 0
