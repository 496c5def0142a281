"""Batch augmentation as pure functions of (images, generator): on the device, no per-sample loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator | None], Tensor]


def random_flip(image: Tensor, generator: torch.Generator | None = None, p: float = 0.5) -> Tensor:
    """Mirror images left-right.

    Args:
        image: (N, C, H, W).
        generator: on the images' device; torch's own state by default.
        p: probability for each image.
    """
    flip = torch.rand(len(image), 1, 1, 1, device=image.device, generator=generator) < p
    return torch.where(flip, image.flip(-1), image)


def random_crop(image: Tensor, generator: torch.Generator | None = None, padding: int = 4) -> Tensor:
    """Pad each side with zeros and cut a random window of the old size.

    Args:
        image: (N, C, H, W).
        generator: on the images' device; torch's own state by default.
        padding: zeros on each side, pixels.
    """
    n, _, h, w = image.shape
    padded = F.pad(image, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, n), device=image.device, generator=generator)
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # a view (N, C, tops, lefts, H, W)
    return windows[torch.arange(n, device=image.device), :, top, left]


def random_shift(image: Tensor, generator: torch.Generator | None = None, padding: int = 2) -> Tensor:
    """Random crop with a small border: for digits and clothes, where mirroring would change the class.

    Args:
        image: (N, C, H, W).
        generator: on the images' device; torch's own state by default.
        padding: zeros on each side, pixels.
    """
    return random_crop(image, generator, padding)


def flip_and_crop(image: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mirror, then crop from a border of 4: the standard recipe for CIFAR."""
    return random_crop(random_flip(image, generator), generator)


AUGMENTATIONS: dict[str, Augmentation] = {
    "flip": random_flip,
    "crop": random_crop,
    "shift": random_shift,
    "flip_crop": flip_and_crop,
}
