"""The parser of experiments: LightningCLI's, with errors of one line and help that can be read."""

from __future__ import annotations

import re
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from leanlight.contracts import UserError
from leanlight.messages import one_line

# jsonargparse lists every subclass that happens to be imported, of torch's modules several hundred.
_SUBCLASSES = re.compile(r",\s+known\s+subclasses:\s+[\w.,\s]+(?=\))")


class LeanlightParser(LightningArgumentParser):
    """Parser whose errors are UserErrors of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:  # inner parsers try alternatives of a type: their errors are not final
            return super().error(message, ex)
        raise UserError(one_line(message, self)) from ex

    def format_help(self, formatter: Any = None) -> str:
        """Help without lists of subclasses."""
        return _SUBCLASSES.sub("", super().format_help(formatter))
