"""Capture and restore every random state of a process."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def run_seed(seed: int | None = None) -> int:
    """`seed`, or without one that of Lightning's ``seed_everything``, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed


def derived_seed(*parts: object) -> int:
    """A seed that is a function of `parts` alone, such as (seed, purpose, round, client): below 2**56.

    What is drawn from it depends on nothing that was drawn before, so there is no state to restore.
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def capture_rng() -> dict[str, Any]:
    """Return the states of python, numpy (if loaded), torch and this process's CUDA device.

    Only tensors, numbers, strings and containers: a checkpoint that holds it loads with ``weights_only=True``.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, position, has_gauss, gauss = numpy.random.get_state()
        state["numpy"] = (kind, torch.from_numpy(keys.astype("int64")), int(position), int(has_gauss), float(gauss))
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Put back what `capture_rng` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        import numpy

        kind, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((kind, keys.cpu().numpy().astype("uint32"), position, has_gauss, cached))  # noqa: NPY002
    if "cuda" in state and torch.cuda.is_available():
        saved = state["cuda"]
        if isinstance(saved, list):  # of every GPU that was visible, as checkpoints of 0.1 have it
            saved = saved[torch.cuda.current_device() % len(saved)]
        torch.cuda.set_rng_state(saved.cpu())


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Leave all random states as they were before the block; inside, seed them with `seed` if given.

    A GPU that was not in use before the block is left alone.
    """
    before = capture_rng()
    try:
        if seed is not None:
            random.seed(seed)
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond to look for accelerators
            if torch.cuda.is_initialized():
                torch.cuda.manual_seed(seed)
            if (numpy := sys.modules.get("numpy")) is not None:
                numpy.random.seed(seed % 2**32)
        yield
    finally:
        restore_rng(before)
