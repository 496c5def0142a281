"""Standard output and error that outlive their readers, and take any text."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class EnduringStream:
    """A text stream whose other end may go away, or be full: what is written from then on is lost, and nothing else.

    ``leanlight fit … | head`` closes the pipe and a log may fill its disk, while training has work to do.

    Args:
        stream: what is written to as long as it can be.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or lose, `text`."""
        try:
            return int(self._stream.write(text))
        except OSError:
            self._lead_nowhere()
            return len(text)

    def flush(self) -> None:
        """Hand on what is written."""
        try:
            self._stream.flush()
        except OSError:
            self._lead_nowhere()

    def _lead_nowhere(self) -> None:
        """Of the descriptor, since what the stream has not handed on yet goes there when the process ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def enduring_output() -> Iterator[None]:
    """Inside the block ``sys.stdout`` and ``sys.stderr`` endure, also when they were closed from the start.

    A character that their encoding lacks is written as an escape.
    """
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 -- lives as long as the process
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, EnduringStream(stream))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
