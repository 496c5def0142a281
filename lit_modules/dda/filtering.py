"""The filter of DDA: variations that stay near their source in an embedding space are kept.

M_k = cos(G_k, F) for the embedding F of an image and G_k of its k-th variation; kept iff M_k ≥ ω.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_scores(source: Tensor, variations: Tensor, mean: Tensor | None = None) -> Tensor:
    """Score each variation against its own source, and against no other image.

    Pooled features are not negative, so that any two of them point into similar directions; without their mean, pairs
    that have nothing in common score about 0.

    Args:
        source: (B, D) embeddings F of images.
        variations: (B, K, D) embeddings G_k of their variations.
        mean: (D,) taken from all of them first; None takes nothing.

    Returns:
        (B, K) float32 in [-1, 1]; 1 for an embedding that is that of its source, even if it is 0.
    """
    source, variations = source.double()[:, None], variations.double()
    same = (source == variations).all(-1)
    if mean is not None:
        source, variations = source - mean.double(), variations - mean.double()
    cosine = F.cosine_similarity(source, variations, dim=-1, eps=1e-12).clamp(-1, 1)
    return cosine.masked_fill(same, 1.0).float()


def keep_above(scores: Tensor, omega: float) -> Tensor:
    """Which variations score at least ω; scores: of any shape. bool of that shape."""
    return scores >= omega


def keep_top(scores: Tensor, fraction: float) -> Tensor:
    """Which variations are the best `fraction` of all; equal scores in the order of their positions.

    Args:
        scores: of any shape.
        fraction: in [0, 1], of all scores together; their number is rounded.

    Returns:
        bool of that shape.
    """
    best = scores.flatten().argsort(descending=True, stable=True)[: round(fraction * scores.numel())]
    kept = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    return kept.index_fill_(0, best, True).view(scores.shape)
