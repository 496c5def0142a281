"""Losses of classifiers. Cross entropy with integer or soft labels is ``torch.nn.functional.cross_entropy``."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Knowledge distillation (Hinton et al. 2015): ``T² KL(softmax(teacher / T) || softmax(student / T))``.

    Mean over items. The factor T² keeps the gradient's size independent of the temperature.

    Args:
        student: (N, K) logits.
        teacher: (N, K) logits.
        temperature: T, positive; 4 by habit of the field.
    """
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, dim=1),
        F.log_softmax(teacher / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def class_index(label: Tensor) -> Tensor:
    """(N,) int64 labels as they are; (N, K) soft labels as their most likely class."""
    return label if label.ndim == 1 else label.argmax(1)
