"""Files in which a distiller keeps what it learned from all real images, so that a run that goes on has it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from leanlight.contracts import atomic_path


def make_once(path: Path, facts: str, make: Callable[[], dict[str, Tensor]]) -> None:
    """Write tensors to a file, unless it is there and made of the same.

    Args:
        path: of a safetensors file.
        facts: all that decides the tensors.
        make: the tensors by name, on any device.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    made_of = {"made_of": hashlib.sha256(facts.encode()).hexdigest()}
    if path.is_file():
        with safe_open(path, "pt") as file:
            if file.metadata() == made_of:
                return
    tensors = {name: value.cpu().contiguous() for name, value in make().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as part:
        save_file(tensors, part, metadata=made_of)
