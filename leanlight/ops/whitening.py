"""ZCA whitening as the dataset-distillation literature fits it: a matrix saved with what was distilled under it."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize_images(image: Tensor) -> Tensor:
    """Subtract each image's mean and divide by its Euclidean norm: (N, C, H, W) → (N, D), D = C·H·W. Blank: 0."""
    flat = image.flatten(1)
    flat = flat - flat.mean(1, keepdim=True)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-8)


def fit_zca(image: Tensor, strength: float = 0.1, chunk: int = 4096, device: torch.device | None = None) -> Tensor:
    """Return the whitening matrix (D, D) float32 of images.

    W = V diag((E + strength · mean(E))^-1/2) Vᵀ with the eigenpairs (E, V) of the second moment of `normalize_images`,
    in float64.

    Args:
        image: (N, C, H, W) uint8 or float.
        strength: of the regularisation, as a share of the mean eigenvalue.
        chunk: images at a time, to bound memory.
        device: where to compute, with float64; that of the images by default.
    """
    size, device = image[0].numel(), device or image.device
    moment = torch.zeros(size, size, dtype=torch.float64, device=device)
    for piece in image.split(chunk):
        flat = normalize_images(piece.to(device).double())
        moment += flat.T @ flat
    values, vectors = torch.linalg.eigh(moment / len(image))
    values = values.clamp(min=0)
    return ((vectors * (values + strength * values.mean()).rsqrt()) @ vectors.T).float()


def apply_zca(image: Tensor, matrix: Tensor) -> Tensor:
    """Normalise and whiten images (N, C, H, W), float; same shape."""
    return (normalize_images(image) @ matrix).view_as(image)
