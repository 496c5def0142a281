"""Command line options whose errors are one line."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
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


def number(kind: Any) -> Callable[[str], Any]:
    """Type of an option that is a number of `kind`, a type of `leanlight.contracts.ranges`."""
    return partial(_number, kind)


def _number(kind: Any, text: str) -> Any:
    try:
        return kind.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output_folder(text: str) -> Path:
    """Type of an option that is a folder to write into; one that cannot be is found before the work, not after it."""
    _check_writable(Path(text))
    return Path(text)


def output_file(text: str) -> Path:
    """Type of an option that is a file to write, as `output_folder`."""
    path = Path(text)
    _check_writable(path.parent)
    if _exists(path) and path.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file to write, got the folder {path}")
    return path


def _check_writable(folder: Path) -> None:
    there = next(each for each in (folder, *folder.parents) if _exists(each))
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"cannot write {folder}: {there} is no folder")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot write {folder}: no permission to write in {there}")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:  # of a name that is too long, for one
        raise argparse.ArgumentTypeError(f"cannot write {str(path)[:80]} ({error.strerror})") from None


class Parser(argparse.ArgumentParser):
    """ArgumentParser that raises UserError, with the nearest option, instead of printing its usage."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            known = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"{match[1]}: not an option of `{self.prog}`{nearest(match[1].split('=')[0], known)}")
        help_ = f"`{self.prog} --help` shows the options"
        if match := re.match(r"argument ([^:]+): (.+)", message, re.DOTALL):
            raise UserError(f"{match[1]}: {match[2]}; {help_}")
        raise UserError(f"{self.prog}: {message}; {help_}")
