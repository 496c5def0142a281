"""Errors that are the user's to mend. The command line shows each as one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave is wrong or missing.

    The message is one line: it names the key or path, says what was expected and what came, and where there is one, the
    nearest valid name or the command that helps.
    """


class DivergedError(UserError):
    """Training produced NaN or infinity; the message names step, term and the last good checkpoint."""


class MissingExtraError(UserError):
    """An optional package is absent."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"package {package!r} is not installed; it comes with: pip install 'leanlight[{extra}]'")


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of `valid`, or an empty string when nothing is close."""
    match = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""
