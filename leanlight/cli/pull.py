"""`leanlight pull`: fetch what `leanlight push` has shared from the Hugging Face hub."""

from __future__ import annotations

import argparse
import re

from leanlight.cli.arguments import Parser, output_folder


def main(argv: list[str]) -> int:
    """Download an export and print its folder, which `leanlight.load` reads."""
    parser = Parser(prog="leanlight pull", description=__doc__)
    parser.add_argument("repo", help="USER/NAME")
    parser.add_argument("--type", choices=("model", "dataset"), help="of the repository; by default either")
    parser.add_argument("--revision", type=_revision, metavar="R", help="branch, tag or commit (default: the newest)")
    parser.add_argument(
        "--output", type=output_folder, metavar="DIR", help="folder to write (default: in the cache of the hub)"
    )
    args = parser.parse_args(argv)
    from leanlight.sharing import hub

    print(hub.pull(args.repo, args.revision, args.output, args.type))
    return 0


def _revision(text: str) -> str:
    if not re.fullmatch(r"[\w][\w./-]*", text) or ".." in text:
        raise argparse.ArgumentTypeError(f"expected a branch, a tag or a commit, got {text!r}")
    return text
