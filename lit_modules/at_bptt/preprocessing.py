"""The space in which a synthetic set lives: whitened, or standardised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.ops.whitening import apply_zca, fit_zca

Preprocess = Literal["zca", "standardize"]


class Preprocessing(nn.Module):
    """Bring images (N, C, H, W), uint8 or float in [0, 1], into the space of the set; same shape, float.

    Its buffers belong to the set: neither can be used without the other.

    Args:
        kind: ``zca``: subtract an image's mean, divide by its norm, whiten; ``standardize``: (x - mean) / std.
        image_shape: (C, H, W).
        strength: of the whitening's regularisation, a share of the mean eigenvalue.
        mean: of ``standardize``, one number or one a channel.
        std: of ``standardize``, one number or one a channel.
    """

    whitening: Tensor
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        kind: Preprocess,
        image_shape: tuple[int, ...],
        strength: float,
        mean: float | Sequence[float],
        std: float | Sequence[float],
    ) -> None:
        super().__init__()
        self.kind, self.strength = kind, strength
        size = math.prod(image_shape) if kind == "zca" else 0
        self.register_buffer("whitening", torch.zeros(size, size))
        for name, value in (("mean", mean), ("std", std)):
            channels = torch.as_tensor(value).float().reshape(-1, 1, 1).expand(image_shape[0], 1, 1)
            self.register_buffer(name, channels.clone())

    def fit(self, images: Tensor) -> None:
        """Fit the whitening on training images, on any device; ``standardize`` has nothing to fit."""
        if self.kind == "zca":
            device = self.whitening.device if self.whitening.is_cuda else None  # others may lack float64
            self.whitening.copy_(fit_zca(images, self.strength, device=device))

    def forward(self, image: Tensor) -> Tensor:
        image = image.float() / 255 if image.dtype == torch.uint8 else image
        if self.kind == "zca":
            return apply_zca(image, self.whitening)
        return (image - self.mean) / self.std

    def take(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Become the space whose `tensors` are given; UserError that names `origin` when it is of another kind."""
        shapes = [{name: tuple(value.shape) for name, value in each.items()} for each in (self.tensors(), tensors)]
        if shapes[0] != shapes[1]:
            raise UserError(f"preprocess: {self.kind} needs tensors {shapes[0]}; {origin} has {shapes[1]}")
        for name, value in self.tensors().items():
            value.copy_(tensors[name])

    def tensors(self) -> dict[str, Tensor]:
        """What the space is made of, for a file: the whitening matrix (D, D), or mean and std (C, 1, 1)."""
        return {"whitening": self.whitening} if self.kind == "zca" else {"mean": self.mean, "std": self.std}
