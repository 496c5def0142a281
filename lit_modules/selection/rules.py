"""Subsets with the same number of items of each class, chosen at random or by herding."""

from __future__ import annotations

import torch
from torch import Tensor

from leanlight.contracts import UserError


def random_subset(labels: Tensor, num_classes: int, per_class: int, generator: torch.Generator) -> Tensor:
    """Choose items of each class at random: positions (num_classes * per_class,), class by class.

    Args:
        labels: (N,) int64 classes, on the CPU.
        num_classes: number of classes K.
        per_class: items of each class.
        generator: on the CPU; the choice is a function of its state.

    Raises:
        UserError: a class has fewer items.
    """
    chosen = []
    for label in range(num_classes):
        members = _members(labels, label, per_class)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(chosen)


def herding_subset(features: Tensor, labels: Tensor, num_classes: int, per_class: int) -> Tensor:
    """Choose items by herding (Welling 2009): positions (num_classes * per_class,), class by class.

    Each next item brings the mean of those chosen so far nearest to the mean of its class; of equals the first is
    taken.

    Args:
        features: (N, D) float, whatever distances shall be taken in; on the CPU.
        labels: (N,) int64 classes, on the CPU.
        num_classes: number of classes K.
        per_class: items of each class.

    Raises:
        UserError: a class has fewer items.
    """
    chosen = []
    for label in range(num_classes):
        members = _members(labels, label, per_class)
        candidates = features[members].double()
        mean, total = candidates.mean(0), torch.zeros(candidates.shape[1], dtype=torch.float64)
        free = torch.ones(len(members), dtype=torch.bool)
        for count in range(1, per_class + 1):
            distance = (mean - (total + candidates) / count).square().sum(1).masked_fill(~free, torch.inf)
            best = int(distance.argmin())
            free[best] = False
            total += candidates[best]
            chosen.append(members[best])
    return torch.stack(chosen)


def _members(labels: Tensor, label: int, per_class: int) -> Tensor:
    """Positions of the items of a class, ascending."""
    members = (labels == label).nonzero().squeeze(1)
    if not 1 <= per_class <= len(members):
        raise UserError(f"per_class: expected 1 to {len(members)}, the items of class {label}; got {per_class}")
    return members
