"""What a judge learns from: the cross entropy of the tokens of its answers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import IGNORED


def token_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of the cross entropies of the tokens that are learned, and the sum of their weights.

    Args:
        logits: (N, K, V), of the last K positions of sequences that have one more token before the first one learned;
            position t predicts the token at t + 1.
        labels: (N, L) int64, L ≥ K, the token at each position, `IGNORED` where none is learned.
        weights: (N, L) of the tokens.
    """
    target, weight = (x[:, labels.shape[1] - logits.shape[1] + 1 :] for x in (labels, weights))
    weight = weight * (target != IGNORED)
    # Of what is not learned it is 0; to take the rest out first would make the host wait for the labels.
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target.flatten(), reduction="none")
    return (each * weight.flatten()).sum(), weight.sum()
