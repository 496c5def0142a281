"""What `DecomConv` computes, as the published code does it: for equality tests and the benchmark."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def chunk_by_chunk(x: Tensor, basis: Tensor, factor: Tensor, stride: int = 1, inner: nn.Module | None = None) -> Tensor:
    """One convolution a group of channels, their outputs concatenated, then the factor.

    Args:
        x: (N, g·a1, H, W).
        basis: (a2, a1, k, k).
        factor: (D, g·a2, 1, 1).
        stride: of the basis.
        inner: a non-linearity between the two.
    """
    padding = basis.shape[-1] // 2
    chunks = [F.conv2d(chunk, basis, stride=stride, padding=padding) for chunk in x.split(basis.shape[1], dim=1)]
    responses = torch.cat(chunks, dim=1)
    return F.conv2d(responses if inner is None else inner(responses), factor)
