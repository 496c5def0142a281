"""Run compiled networks as they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_open = 0
_stance = ExitStack()


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside the block compiled networks run as they are written, so that hooks on the modules in them are called.

    Blocks may overlap in any order: the last one to end lets compiled code run again.
    """
    global _open
    if not _open:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _open += 1
    try:
        yield
    finally:
        _open -= 1
        if not _open:
            _stance.close()
