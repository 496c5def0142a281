"""What a program asked of the device, and from which line."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[3]
_OWN = str(ROOT / "tests")
_LIBRARIES = ("lightning", "torchmetrics", "spikingjelly", "torch/optim")


@dataclass
class Counts:
    """Counters since `take` was last called; lines are those of the suite that caused it, else of a library.

    Args:
        kernels: operations launched.
        copies: blocking copies from host to device, by line.
        async_copies: copies from host to device that do not block.
        waits: where the host waited for the device (``.item()``, ``nonzero``, copies to the host, …), by line.
    """

    kernels: int = 0
    copies: Counter[str] = field(default_factory=Counter)
    async_copies: int = 0
    waits: Counter[str] = field(default_factory=Counter)

    def take(self) -> Counts:
        """The counts so far; they begin again at zero."""
        taken = Counts(self.kernels, self.copies, self.async_copies, self.waits)
        self.__init__()  # type: ignore[misc]
        return taken

    def plain(self) -> dict[str, Any]:
        """For a JSON file."""
        return vars(self) | {"copies": dict(self.copies), "waits": dict(self.waits)}

    def copied_in(self, blocking: bool) -> None:
        if blocking:
            self.copies[_line()] += 1
        else:
            self.async_copies += 1

    def waited(self) -> None:
        self.waits[_line()] += 1


COUNTS = Counts()


def _line() -> str:
    """The innermost line of the suite on the stack; without one, that of a library which acts for it."""
    frame: FrameType | None = sys._getframe(1)
    library = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(ROOT)) and "site-packages" not in file and not file.startswith(_OWN):
            return f"{Path(file).relative_to(ROOT)}:{frame.f_lineno}"
        _, _, inside = file.rpartition("site-packages/")
        if not library and inside.startswith(_LIBRARIES):
            library = f"{inside}:{frame.f_lineno}"
        frame = frame.f_back
    return library or "?"
