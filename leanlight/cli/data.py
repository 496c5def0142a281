"""`leanlight data`: list the data sets, get one, check one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from datamodules.images.catalog import CATALOG, DatasetInfo, describe
from leanlight.cli.arguments import Parser

# Sets of many small picture files: `prepare` decodes them once into an npz that loads in seconds.
PICTURE_SETS = {"tiny_imagenet": "tiny_imagenet", "celeba": "celeba_64"}


def list_data(argv: list[str]) -> int:
    """Print the catalogue; imports no torch."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    Parser(prog="leanlight data list", description="list the data sets").parse_args(argv)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("what it is, and how to get it")
    for info in CATALOG.values():
        facts = ["x".join(map(str, info.shape))]
        if info.train:
            facts += [f"{info.num_classes} classes", f"{info.train:,} + {info.test:,} items"]
        facts.append(f"licence: {info.licence}")
        table.add_row(info.name, f"{info.title}\n{', '.join(facts)}\n[dim]{info.get}[/dim]")
    console = Console(highlight=False)
    console.print(table)
    console.print("Looked for in the folder LEANLIGHT_DATA, else ./data. Items: train + test.")
    return 0


def _arguments(command: str, argv: list[str]) -> tuple[argparse.Namespace, DatasetInfo]:
    parser = Parser(prog=f"leanlight data {command}")
    parser.add_argument("name", metavar="NAME", help="a name of `leanlight data list`")
    default = os.environ.get("LEANLIGHT_DATA") or "data"
    parser.add_argument("--root", default=default, metavar="DIR", help="folder of data sets (default: %(default)s)")
    parser.add_argument("--path", metavar="DIR", help="folder of image_folder, vtab or fgvc")
    if command == "check":
        parser.add_argument(
            "--variant", default="auto", choices=["auto", "full", "subset"], help="default: %(default)s"
        )
    arguments = parser.parse_args(argv)
    return arguments, describe(arguments.name)


def prepare(argv: list[str]) -> int:
    """Find or download a data set and say where it is."""
    from datamodules.images import formats, sources

    arguments, info = _arguments("prepare", argv)
    # The packaged subset is always there: whoever prepares Fashion-MNIST means the whole.
    variant: sources.Variant = "full" if info.name == "fashion_mnist" else "auto"
    raw = sources.load(info.name, arguments.root, variant, download=True, path=arguments.path)
    where = raw.source
    if info.name in PICTURE_SETS and ".npz" not in where:
        target = Path(arguments.root) / info.name / f"{PICTURE_SETS[info.name]}.npz"
        parts = {"train": raw.train, "test": raw.test} | ({"val": raw.val} if raw.val else {})
        formats.write_npz(target, parts, raw.classes)
        where = str(target)
    print(f"{info.name}: ready, {len(raw.train[0]):,} train and {len(raw.test[0]):,} test items in {where}")
    return 0


def check(argv: list[str]) -> int:
    """Load a data set without downloading and print what it holds."""
    from datamodules.images.module import ImageDataModule

    arguments, info = _arguments("check", argv)
    data = ImageDataModule(info.name, arguments.root, arguments.variant, path=arguments.path, download=False)
    data.setup()
    meta = data.meta
    counts = ", ".join(f"{count:,} {split}" for split, count in meta.counts.items())
    shown = ", ".join(meta.classes[:10]) + (", …" if len(meta.classes) > 10 else "")
    for label, value in (
        ("source", meta.source),
        ("items", counts),
        ("shape", "x".join(map(str, meta.shape))),
        ("classes", f"{meta.num_classes}: {shown}"),
        ("a class", f"{min(meta.class_counts):,} to {max(meta.class_counts):,} training items"),
        ("fingerprint", meta.fingerprint),
    ):
        print(f"{label:<12} {value}")
    return 0


COMMANDS = {"list": list_data, "prepare": prepare, "check": check}


def main(argv: list[str]) -> int:
    """Run ``list``, ``prepare NAME`` or ``check NAME``; UserError for what the user can mend."""
    parser = Parser(prog="leanlight data", description=__doc__)
    parser.add_argument("command", choices=COMMANDS, help="list all; prepare or check one (--root DIR, --path DIR)")
    return COMMANDS[parser.parse_args(argv[:1]).command](argv[1:])
