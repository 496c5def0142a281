"""Numbers with a range, as types of arguments: a config with a number outside is refused before anything is built.

To a type checker and in Python they are ``int`` and ``float``; nothing is checked there. What a config or the command
line gives is read by `Range.read`, with which `lit_modules.admission` makes them known to jsonargparse, and stays a
plain number.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar


class Range:
    """Base of all types of numbers with a range.

    Attributes: ``base``, int or float; ``low`` and ``high``, the smallest and the largest; ``opens``, those of the two
    that are themselves outside; ``expected``, in words.
    """

    base: ClassVar[type[int] | type[float]] = float
    low: ClassVar[float] = -math.inf
    high: ClassVar[float] = math.inf
    opens: ClassVar[tuple[float, ...]] = ()
    expected: ClassVar[str]

    @classmethod
    def read(cls, value: Any) -> int | float:
        """The plain number that a value or a text stands for.

        Raises:
            ValueError: it is none, not finite, or outside of the range.
        """
        expected = cls.expected
        kinds = (int, str) if cls.base is int else (int, float, str)
        try:
            if isinstance(value, bool) or not isinstance(value, kinds):
                raise ValueError
            number = cls.base(value)
            if isinstance(number, int) and abs(number) >= 2**63:  # as long as tensors count
                expected += " that 64 bits can hold"
                raise ValueError
            if not math.isfinite(number) or not cls.low <= number <= cls.high or number in cls.opens:
                raise ValueError
        except (ValueError, OverflowError):
            raise ValueError(f"expected {expected}, got {value!r}") from None
        return number


if TYPE_CHECKING:
    PositiveInt = int
    NonNegativeInt = int
    TimeSteps = int
    Seed = int
    FiniteFloat = float
    PositiveFloat = float
    NonNegativeFloat = float
    UnitInterval = float
    OpenUnitInterval = float
    PositiveShare = float
    Share = float
else:

    class PositiveInt(Range):
        base, low, expected = int, 1, "an integer of at least 1"

    class NonNegativeInt(Range):
        base, low, expected = int, 0, "an integer of at least 0"

    class TimeSteps(Range):  # of a simulation: above, it would run for ever before memory ends
        base, low, high, expected = int, 1, 100_000, "an integer from 1 to 100000"

    class Seed(Range):  # what the generators of numpy and torch both take
        base, low, high, expected = int, 0, 2**32 - 1, f"an integer from 0 to {2**32 - 1}"

    class FiniteFloat(Range):
        expected = "a finite number"

    class PositiveFloat(Range):
        low, opens, expected = 0.0, (0.0,), "a finite number above 0"

    class NonNegativeFloat(Range):
        low, expected = 0.0, "a finite number of at least 0"

    class UnitInterval(Range):
        low, high, expected = 0.0, 1.0, "a number in [0, 1]"

    class OpenUnitInterval(Range):
        low, high, opens, expected = 0.0, 1.0, (0.0, 1.0), "a number in (0, 1)"

    class PositiveShare(Range):
        low, high, opens, expected = 0.0, 1.0, (0.0,), "a number in (0, 1]"

    class Share(Range):
        low, high, opens, expected = 0.0, 1.0, (1.0,), "a number in [0, 1)"
