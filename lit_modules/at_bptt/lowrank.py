"""LRHA: a low-rank factor of the inner loss's Hessian from Hessian-vector products alone (AT-BPTT, Eq. 9 to 12)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leanlight.contracts import UserError, to_device
from leanlight.contracts.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt

MatrixProduct = Callable[[Tensor], Tensor]


def eigenpairs(
    product: MatrixProduct, size: int, rank: int, oversample: int, power_iters: int, like: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Randomised eigenpairs of a symmetric matrix known by its products (Halko et al. 2011).

    Returns vectors (size, rank) and values (rank,), by falling absolute value. Power iterations are orthonormalised,
    and the small matrix is symmetrised: a Hessian is symmetric, but not definite.

    Args:
        product: the matrix times columns (size, k).
        size: of the matrix.
        rank: eigenpairs to find.
        oversample: further test vectors.
        power_iters: power iterations; each makes large eigenvalues stand out more.
        like: a tensor of the dtype and on the device to work with.
        seed: of the Gaussian test vectors.
    """
    columns = min(size, rank + oversample)
    generator = torch.Generator().manual_seed(seed)
    omega = to_device(torch.randn(size, columns, generator=generator, dtype=like.dtype), like.device)
    basis = torch.linalg.qr(product(omega)).Q
    for _ in range(power_iters):
        basis = torch.linalg.qr(product(basis)).Q
    small = basis.T @ product(basis)
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    order = values.abs().argsort(descending=True)[:rank]
    return basis @ vectors[:, order], values[order]


@dataclass
class LowRankHessian:
    """A factor Q diag(e) Qᵀ of the Hessian, its refresh rule and its rank schedule.

    The paper's refresh at each inner step costs (rank + oversample) (power_iters + 2) Hessian products to save one.

    Args:
        rank: k_max, highest rank; 8 suits a CPU, 32 a GPU.
        min_rank: k_min, lowest rank.
        oversample: further test vectors of the randomised factorisation.
        power_iters: power iterations of the randomised factorisation.
        refresh: factorise at each inner ``step`` (paper), once a ``window``, or ``cached`` over outer steps.
        every: outer steps that a cached factor lives at most.
        drift: relative change of the gradient norm at the window's end that renews a cached factor.
    """

    rank: PositiveInt = 8
    min_rank: PositiveInt = 1
    oversample: NonNegativeInt = 4
    power_iters: NonNegativeInt = 2
    refresh: Literal["cached", "window", "step"] = "cached"
    every: PositiveInt = 20
    drift: NonNegativeFloat = 0.2

    def __post_init__(self) -> None:
        if not 1 <= self.min_rank <= self.rank:
            raise UserError(f"min_rank: expected 1 to rank = {self.rank}, got {self.min_rank}")
        if self.every < 1:
            raise UserError(f"every: expected at least 1, got {self.every}")
        self._vectors: Tensor | None = None
        self._values: Tensor | None = None
        self._age = 0
        self._last_norm: float | None = None

    def due(self, norms: Tensor) -> bool:
        """Whether the shared factor must be made anew for a window with these gradient norms (W,), on the CPU.

        Called once a window.
        """
        if self.refresh != "cached":
            return self.refresh == "window"
        change = (norms[-1] - norms[-2]).abs() if len(norms) > 1 else norms.new_zeros(())
        last, change = torch.stack([norms[-1], change]).tolist()
        drifted = self._last_norm is not None and change >= self.drift * self._last_norm
        self._last_norm, self._age = last, self._age + 1
        return self._vectors is None or drifted or self._age >= self.every

    def factorize(self, theta: Tensor, gradient: Tensor) -> None:
        """Factorise the Hessian at `theta`; gradient (P,) with its graph."""

        def product(columns: Tensor) -> Tensor:
            # Column by column: batched double backward of convolutions needs many times the memory and no less time.
            grad = functools.partial(torch.autograd.grad, gradient, theta, retain_graph=True)
            return torch.stack([grad(column)[0] for column in columns.T.contiguous()], 1)

        self._vectors, self._values = eigenpairs(
            product, theta.numel(), self.rank, self.oversample, self.power_iters, theta.detach()
        )
        self._age = 0

    def ranks(self, norms: Tensor) -> list[int]:
        """k_j = max(k_min, floor(k_max n_j / max_{i <= j} n_i)) (Eq. 10), for each step of a window.

        norms: (W,), on the CPU.
        """
        share = norms / norms.cummax(0).values.clamp(min=1e-30)
        return (share * self.rank).floor().long().clamp(self.min_rank, self.rank).tolist()

    def product(self, vector: Tensor, rank: int) -> Tensor:
        """Factor times `vector` (P,), with the `rank` leading eigenpairs."""
        assert self._vectors is not None
        assert self._values is not None
        if self._vectors.device != vector.device:  # from a checkpoint, which is read on the CPU
            self._vectors, self._values = self._vectors.to(vector.device), self._values.to(vector.device)
        basis = self._vectors[:, :rank]
        return basis @ (self._values[:rank] * (basis.T @ vector))

    def state_dict(self) -> dict[str, Any]:
        return {"vectors": self._vectors, "values": self._values, "age": self._age, "last_norm": self._last_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._vectors, self._values = state["vectors"], state["values"]
        self._age, self._last_norm = state["age"], state["last_norm"]
