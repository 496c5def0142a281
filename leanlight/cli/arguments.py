"""Command line options whose errors are one line."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

from leanlight.contracts.errors import UserError, nearest


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The option that lets a run folder name classes outside of the suite."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="let the run name classes of this package of yours; may be repeated",
    )


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises UserError, with the nearest option, instead of printing its usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            known = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"{match[1]}: not an option of `{self.prog}`{nearest(match[1].split('=')[0], known)}")
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` shows the options")
