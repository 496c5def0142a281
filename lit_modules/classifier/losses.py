"""Losses of classifiers, with and without weights of the items."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, label: Tensor, weight: Tensor | None = None, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy; with weights ``sum(w * CE) / sum(w)``.

    Args:
        logits: (N, K).
        label: (N,) int64, or (N, K) soft.
        weight: (N,) float of the items; None: all alike.
        label_smoothing: share of the label spread over all classes, in [0, 1).
    """
    if weight is None:
        return F.cross_entropy(logits, label, label_smoothing=label_smoothing)
    return _weighted_mean(F.cross_entropy(logits, label, reduction="none", label_smoothing=label_smoothing), weight)


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    return (weight * values).sum() / weight.sum()


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, weight: Tensor | None = None
) -> Tensor:
    """Knowledge distillation (Hinton et al. 2015): ``T² KL(softmax(teacher / T) || softmax(student / T))``.

    Mean over items, weighted where they have weights. The factor T² keeps the gradient's size independent of the
    temperature.

    Args:
        student: (N, K) logits.
        teacher: (N, K) logits.
        temperature: T, positive; 4 by habit of the field.
        weight: (N,) float of the items; None: all alike.
    """
    ours, target = F.log_softmax(student / temperature, dim=1), F.log_softmax(teacher / temperature, dim=1)
    if weight is None:
        return temperature**2 * F.kl_div(ours, target, reduction="batchmean", log_target=True)
    return temperature**2 * _weighted_mean(F.kl_div(ours, target, reduction="none", log_target=True).sum(1), weight)


def class_index(label: Tensor) -> Tensor:
    """(N,) int64 labels as they are; (N, K) soft labels as their most likely class."""
    return label if label.ndim == 1 else label.argmax(1)
