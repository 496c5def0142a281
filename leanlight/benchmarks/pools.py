"""Memory of a process that reads pools of images: a file of its own, since Lightning alone would take twice as much."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from leanlight.benchmarks.core import peak_memory_mb, private_memory_mb
from lit_modules.dda.bank import ImagePool


def read_pools(states: list[dict[str, Any]]) -> list[dict[str, float | None]]:
    """Read every image of pools, in batches and in random order, one pool after the other.

    Args:
        states: of the pools, by `ImagePool.state_dict`.

    Returns:
        of each pool the largest ``private`` memory while it was read, and the ``peak`` of resident memory so far, MB.
    """
    found: list[dict[str, float | None]] = []
    for state in states:
        pool, private = ImagePool.of_state(state), []
        for index in torch.randperm(len(pool), generator=torch.Generator().manual_seed(0)).split(128):
            pool.read(index)
            private.append(private_memory_mb())
        largest = None if None in private else max(each for each in private if each is not None)
        found.append({"private": largest, "peak": peak_memory_mb()})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(read_pools(json.loads(sys.argv[1]))))
