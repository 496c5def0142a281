"""What all processes have, seen by each, with gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def everyone(rows: Tensor) -> Tensor:
    """`rows` (N, ...) of all processes one after the other; their own where there is one process.

    A gradient finds its way back to each process' own: where all have the same loss of everyone's rows, the mean of
    their gradients, which DDP takes, is that of one process with all rows. Numbers of rows must be equal.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    from torch.distributed.nn.functional import all_gather

    if rows.is_floating_point():
        return torch.cat(all_gather(rows))
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
