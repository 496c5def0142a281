"""What the ESVAE family is measured by: Fréchet distance, robustness of the decoder, information in firing rates."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

Noise = Literal["flip", "replace"]


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


class FrechetDistance(Metric):
    """Fréchet distance between the features of real and generated items, over any number of batches and processes.

    On features of an autoencoder it is the Fréchet autoencoder distance, FAD (Kamata et al. 2022). Sums are kept in
    float64; `compute` needs at least two items of each kind, and more than d of each for covariances of full rank.

    Args:
        features: d, length of a feature vector.
        kwargs: those of a torchmetrics `Metric`.
    """

    higher_is_better = False
    full_state_update = False
    real_count: Tensor
    real_sum: Tensor
    real_square: Tensor
    generated_count: Tensor
    generated_sum: Tensor
    generated_square: Tensor

    def __init__(self, features: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for kind in ("real", "generated"):
            self.add_state(f"{kind}_count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_sum", torch.zeros(features, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{kind}_square", torch.zeros(features, features, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, real: bool) -> None:
        """Add a batch of feature vectors (N, d)."""
        features = features.detach().double()
        kind = "real" if real else "generated"
        setattr(self, f"{kind}_count", getattr(self, f"{kind}_count") + len(features))
        setattr(self, f"{kind}_sum", getattr(self, f"{kind}_sum") + features.sum(0))
        setattr(self, f"{kind}_square", getattr(self, f"{kind}_square") + features.T @ features)

    def compute(self) -> Tensor:
        """The distance, scalar float64."""
        return frechet_distance(*self._moments("real"), *self._moments("generated"))

    def _moments(self, kind: str) -> tuple[Tensor, Tensor]:
        """Mean (d,) and unbiased covariance (d, d)."""
        count, total, square = (getattr(self, f"{kind}_{what}") for what in ("count", "sum", "square"))
        mean = total / count
        return mean, (square - count * torch.outer(mean, mean)) / (count - 1)


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


def shuffle_time(z: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Spikes (T, N, d) with the steps in another order, one permutation for the whole batch."""
    return z[torch.randperm(len(z), device=z.device, generator=generator)]


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
