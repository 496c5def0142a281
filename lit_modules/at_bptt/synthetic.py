"""The synthetic set: how it starts, and real subsets as baselines."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from leanlight.contracts import UserError

Start = Literal["noise", "random", "herding"]


def noise_images(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gaussian images (count, C, H, W), each divided by its own Euclidean norm."""
    images = torch.randn(count, *shape, generator=generator)
    return images / images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def one_hot_labels(num_classes: int, ipc: int) -> Tensor:
    """(num_classes * ipc, num_classes) float32, class by class."""
    return torch.eye(num_classes).repeat_interleave(ipc, 0)


def random_subset(labels: Tensor, num_classes: int, ipc: int, generator: torch.Generator) -> Tensor:
    """Positions (num_classes * ipc,) of `ipc` random items of each class, class by class. labels: (N,) int64, CPU."""
    return torch.cat(
        [
            (members := _members(labels, c, ipc))[torch.randperm(len(members), generator=generator)[:ipc]]
            for c in range(num_classes)
        ]
    )


def herding_subset(features: Tensor, labels: Tensor, num_classes: int, ipc: int) -> Tensor:
    """Positions (num_classes * ipc,) by herding (Welling 2009): each next item brings the mean of those chosen nearest
    to the mean of its class. features: (N, D) float."""
    chosen = []
    for c in range(num_classes):
        members = _members(labels, c, ipc)
        own = features[members].double()
        mean, total = own.mean(0), torch.zeros(own.shape[1], dtype=torch.float64)
        free = torch.ones(len(members), dtype=torch.bool)
        for k in range(1, ipc + 1):
            distance = (mean - (total + own) / k).square().sum(1).masked_fill(~free, torch.inf)
            best = int(distance.argmin())
            free[best] = False
            total += own[best]
            chosen.append(members[best])
    return torch.stack(chosen)


def _members(labels: Tensor, label: int, ipc: int) -> Tensor:
    members = (labels == label).nonzero().squeeze(1)
    if len(members) < ipc:
        raise UserError(
            f"model.init_args.ipc: class {label} has {len(members)} training images, fewer than ipc = {ipc}"
        )
    return members
