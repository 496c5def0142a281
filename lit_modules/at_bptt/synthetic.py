"""The synthetic set before the first outer step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lit_modules.selection import herding_subset, random_subset

Start = Literal["noise", "random", "herding"]


def noise_images(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Gaussian images (count, C, H, W), each divided by its own Euclidean norm."""
    images = torch.randn(count, *shape, generator=generator)
    return images / images.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def real_images(
    start: Start,
    images: Tensor,
    labels: Tensor,
    num_classes: int,
    ipc: int,
    prepare: Callable[[Tensor], Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Preprocessed real images (num_classes * ipc, C, H, W), class by class.

    Args:
        start: ``random``, or ``herding`` by distances of preprocessed pixels.
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        num_classes: number of classes.
        ipc: images per class.
        prepare: brings images into the space of the set.
        generator: of the random choice.
    """
    if start == "random":
        index = random_subset(labels, num_classes, ipc, generator)
    else:
        index = herding_subset(prepare(images).flatten(1), labels, num_classes, ipc)
    return prepare(images[index])


def one_hot_labels(num_classes: int, ipc: int) -> Tensor:
    """(num_classes * ipc, num_classes) float32, class by class."""
    return torch.eye(num_classes).repeat_interleave(ipc, 0)
