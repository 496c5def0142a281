"""The list of all checks, over the registry."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from leanlight.benchmarks.gpu.checks import Check
from leanlight.registry import METHODS

SHARED = "nn"  # what methods share has its document, too
GROUPS = (SHARED, *METHODS)


def checks(group: str, folder: Path, device: str = "cuda") -> Iterator[Check]:
    """All checks of a method, or of what methods share.

    Args:
        group: one of `GROUPS`.
        folder: for run folders.
        device: what is compared with the CPU.
    """
    from leanlight.benchmarks.gpu import neurons, speed, training

    if group == SHARED:
        yield from neurons.checks(device)
        return
    info = METHODS[group]
    yield from training.checks(info, folder, device)
    if info.benchmark:
        module = import_module(info.benchmark.partition(":")[0])
        yield from speed.checks(group, module, device)
        # What only this method promises, where its benchmark says so.
        yield from getattr(module, "gpu_checks", lambda *_: ())(folder, device)
