"""Clipping of a gradient by the moving average of its own norm (Feng et al. 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_modules.at_bptt.inner import times_each


def clip_by_average(
    gradient: Tensor, norm: Tensor, average: Tensor, times: float, decay: float
) -> tuple[Tensor, Tensor]:
    """Shorten a gradient to `times` the moving average of its norm; return it and the new average.

    Args:
        gradient: of any shape; or several, (S, …), each with its own norm and average (S,).
        norm: its Euclidean norm, a scalar tensor.
        average: of the norms of earlier gradients, NaN before the first.
        times: how many averages long the gradient may be.
        decay: share of the old average in the new one, which contains the present norm.
    """
    average = torch.where(average.isnan(), norm, torch.lerp(norm, average, decay))
    return times_each(gradient, (times * average / norm.clamp(min=1e-30)).clamp(max=1)), average
