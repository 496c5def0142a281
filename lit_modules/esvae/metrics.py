"""What the ESVAE family is measured by: Fréchet distance, robustness of the decoder, information in firing rates."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Noise = Literal["flip", "replace"]
Gaussian = tuple[Tensor, Tensor]  # mean (d,) and covariance (d, d)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> Tensor:
    """Squared Fréchet distance of N(mean1, cov1) and N(mean2, cov2): ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``.

    The eigenvalues of C1 C2 are those of the symmetric ``C1^(1/2) C2 C1^(1/2)``, so the trace of the root is a sum of
    real roots; a matrix square root of C1 C2 itself is unstable for nearly singular covariances.

    Args:
        mean1: (d,).
        cov1: (d, d), symmetric and positive semi-definite.
        mean2: (d,).
        cov2: (d, d), symmetric and positive semi-definite.

    Returns:
        A scalar, float64.
    """
    mean1, cov1, mean2, cov2 = (x.double() for x in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross


class FeatureMoments:
    """Mean and covariance of feature vectors that come in batches; sums are kept in float64.

    Args:
        size: d, length of a feature vector.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.sum = torch.zeros(size, dtype=torch.float64)
        self.square = torch.zeros(size, size, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add a batch of feature vectors (N, d), on any device."""
        features = features.detach().cpu().double()
        self.count += len(features)
        self.sum += features.sum(0)
        self.square += features.T @ features

    def gaussian(self) -> Gaussian:
        """Mean (d,) and unbiased covariance (d, d): of full rank after more than d vectors, defined after two."""
        mean = self.sum / self.count
        return mean, (self.square - self.count * torch.outer(mean, mean)) / (self.count - 1)


def disturb(z: Tensor, strength: float, noise: Noise = "flip", generator: torch.Generator | None = None) -> Tensor:
    """Spikes with noise, of the same shape: each is hit independently.

    Args:
        z: spikes of any shape.
        strength: probability of a hit.
        noise: ``flip`` inverts a hit spike; ``replace`` draws it anew, 0 or 1 with equal chance (half as strong).
        generator: of the draws; by default the global one.
    """
    hit = torch.rand(z.shape, device=z.device, generator=generator) < strength
    if noise == "flip":
        return torch.where(hit, 1 - z, z)
    fresh = torch.rand(z.shape, device=z.device, generator=generator) < 0.5
    return torch.where(hit, fresh.to(z.dtype), z)


def time_orders(time_steps: int, count: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` random orders of the steps of a spike train, (count, T) int64 on the CPU.

    Args:
        time_steps: T.
        count: how many.
        generator: of the draws; by default the global one.
    """
    return torch.rand(count, time_steps, generator=generator).argsort(1)


def slope(x: list[float], y: list[float]) -> float:
    """Slope of the least-squares line through the points."""
    points = torch.tensor([x, y], dtype=torch.float64)
    centred = points - points.mean(1, keepdim=True)
    return float((centred[0] * centred[1]).sum() / centred[0].square().sum())


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    """Test accuracy in [0, 1] of logistic regression on standardised features: what an encoder keeps of the classes.

    Args:
        train_x: (N, d) float.
        train_y: (N,) int64.
        test_x: (M, d) float.
        test_y: (M,) int64.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    probe.fit(train_x.double().cpu().numpy(), train_y.cpu().numpy())
    return float(probe.score(test_x.double().cpu().numpy(), test_y.cpu().numpy()))
