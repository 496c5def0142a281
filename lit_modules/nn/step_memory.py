"""Memory of sequences over time, (T, N, ...), whose steps follow one another without gaps."""

from __future__ import annotations

import torch
from torch import Tensor


def like_steps(current: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for as many steps as `current` has, each laid out like its first (which may be one view for all steps)."""
    step = torch.empty_like(current[0])
    return torch.empty_strided(
        current.shape, (step.numel(), *step.stride()), dtype=dtype or current.dtype, device=current.device
    )


def dense(current: Tensor) -> Tensor:
    """The same currents, each step of them without gaps in memory, in whatever order of dimensions."""
    step = current[0]
    return current if step.stride() == torch.empty_like(step).stride() else current.contiguous()
