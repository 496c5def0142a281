"""Losses of SFedHIFI's clients (`docs/methods/sfedhifi.md`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def tet_loss(outputs: Tensor, label: Tensor, weight: float = 1e-3, target: float = 1.0) -> Tensor:
    """Temporal efficient training (Deng et al., ICLR 2022): cross entropy at every step, and outputs pulled to a level.

    ``(1 - λ) mean_t CE(o[t], y) + λ mean((o - φ)²)``. For outputs in {0, 1} the first term is at least
    log(e + K - 1) - 1.

    Args:
        outputs: o, (T, N, K).
        label: y, (N,) int64.
        weight: λ in [0, 1]; 0.001 in the published code.
        target: φ.
    """
    each_step = F.cross_entropy(outputs.flatten(0, 1), label.repeat(len(outputs)))
    return (1 - weight) * each_step + weight * (outputs - target).square().mean()


def mean_output_loss(outputs: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of the time-averaged output. outputs: (T, N, K), label: (N,) int64 → scalar."""
    return F.cross_entropy(outputs.mean(0), label)


def mask_absent(outputs: Tensor, classes: Tensor) -> Tensor:
    """Outputs with those of classes that a client lacks set to 0, without gradient (HeteroFL, Diao et al., ICLR 2021).

    Args:
        outputs: (..., K).
        classes: (K,) bool, those that the client has.
    """
    return outputs.masked_fill(~classes, 0.0)


def orthogonality(bases: Iterable[Tensor]) -> Tensor:
    """``Σ_b mean((B_b B_bᵀ - I)²)``, B_b a basis (a2, a1, k, k) as a matrix (a2, a1·k²); 0 for orthonormal rows."""
    terms: list[Tensor] = []
    for basis in bases:
        rows = basis.flatten(1)
        identity = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
        terms.append((rows @ rows.T - identity).square().mean())
    return sum(terms[1:], terms[0]) if terms else torch.zeros(())
