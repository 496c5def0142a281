"""The parser of experiments: LightningCLI's, with errors of one line and help that can be read."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from leanlight.contracts import UserError
from leanlight.contracts.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    PositiveShare,
    Range,
    Seed,
    UnitInterval,
)
from leanlight.messages import one_line
from lit_modules.admission import register_range

# jsonargparse lists every subclass that happens to be imported, of torch's modules several hundred.
_SUBCLASSES = re.compile(r",\s+known\s+subclasses:\s+[\w.,\s]+(?=\))")


class OrUnlimited(Range):
    """A count of the Trainer's, where -1 stands for no limit."""

    base, low, expected = int, -1, "an integer of at least 0, or -1 for no limit"


class Duration(Range):
    """A time as the Trainer reads it."""

    expected = "days:hours:minutes:seconds"

    @classmethod
    def read(cls, value: Any) -> Any:
        if isinstance(value, str) and re.fullmatch(r"\d+(:\d\d){3}", value):
            return value
        raise ValueError(f"expected {cls.expected}, got {value!r}")


register_range(OrUnlimited)
register_range(Duration)

# Lightning checks some of these when it builds the Trainer, others by a division by zero in the first epoch.
_RANGES: dict[str, Any] = {
    "seed_everything": bool | Seed,
    "trainer.num_nodes": PositiveInt,
    "trainer.fast_dev_run": bool | NonNegativeInt,
    "trainer.max_epochs": OrUnlimited | None,
    "trainer.min_epochs": NonNegativeInt | None,
    "trainer.max_steps": OrUnlimited,
    "trainer.min_steps": NonNegativeInt | None,
    # A union is tried in its order: 2 is a number of batches, 1.0 the share.
    **{f"trainer.limit_{split}_batches": NonNegativeInt | UnitInterval | None for split in ("train", "val", "test")},
    "trainer.limit_predict_batches": NonNegativeInt | UnitInterval | None,
    "trainer.overfit_batches": NonNegativeInt | UnitInterval,
    "trainer.val_check_interval": PositiveInt | PositiveShare | Duration | dict[str, int] | None,
    "trainer.check_val_every_n_epoch": PositiveInt | None,
    "trainer.num_sanity_val_steps": OrUnlimited | None,
    "trainer.log_every_n_steps": NonNegativeInt | None,
    "trainer.accumulate_grad_batches": PositiveInt,
    "trainer.gradient_clip_val": NonNegativeInt | NonNegativeFloat | None,
    "trainer.reload_dataloaders_every_n_epochs": NonNegativeInt,
}


def _in_yaml(word: str) -> str:
    """An option for the parser of an inner class, to which jsonargparse hands on what it has read, as Python shows it.

    Null would be the text None.
    """
    key, equals, value = word.partition("=")
    try:
        read = ast.literal_eval(value)
        return f"{key}{equals}{json.dumps(read)}" if read is None or isinstance(read, (dict, list)) else word
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):  # text
        return word


def restrict(parser: LightningArgumentParser) -> None:
    """Give the numbers of the Trainer's arguments their ranges."""
    for action in parser._actions:
        if action.dest in _RANGES:
            action._typehint = _RANGES[action.dest]  # type: ignore[attr-defined]


class LeanlightParser(LightningArgumentParser):
    """Parser whose errors are UserErrors of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:  # inner parsers try alternatives of a type: their errors are not final
            return super().error(message, ex)
        raise UserError(one_line(message, self)) from ex

    def parse_args(self, args: Any = None, *others: Any, **options: Any) -> Any:
        """As jsonargparse does it, but for what an inner parser is given."""
        if not self.exit_on_error and args is not None:
            args = [_in_yaml(word) for word in args]
        return super().parse_args(args, *others, **options)

    def validate(self, namespace: Any, *args: Any, **options: Any) -> None:
        """As jsonargparse does it, which lets null pass for a value of any type."""
        super().validate(namespace, *args, **options)
        for action in self._actions:
            if action.default is not None and namespace.get(action.dest, ...) is None:
                self._check_value_key(action, None, action.dest, namespace)

    def format_help(self, formatter: Any = None) -> str:
        """Help without lists of subclasses."""
        return _SUBCLASSES.sub("", super().format_help(formatter))
