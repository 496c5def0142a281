"""Meta-gradients of a window of inner steps: autograd through the unrolled graph, or adjoint equations step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leanlight.contracts import UserError
from lit_modules.at_bptt.inner import InnerBatch, InnerOptimizer, InnerProblem, InnerState, SyntheticData
from lit_modules.at_bptt.lowrank import LowRankHessian

OuterLoss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MetaGradient:
    """Gradients of the outer loss with respect to the set.

    Args:
        images: of the shape of the images.
        labels: of the shape of the labels, None where they are fixed.
        loss: the outer loss, a scalar tensor.
        norms: (length,) inner gradient norms n_t in the window.
    """

    images: Tensor
    labels: Tensor | None
    loss: Tensor
    norms: Tensor


class GradientEngine:
    """Base of the ways to differentiate a window of inner training."""

    def meta_gradient(
        self,
        problem: InnerProblem,
        state: InnerState,
        data: SyntheticData,
        batches: Sequence[InnerBatch],
        outer_loss: OuterLoss,
        learn_labels: bool,
        weights: Tensor | None = None,
    ) -> MetaGradient:
        """Train through the window and differentiate the outer loss at its end.

        Args:
            problem: the inner problem.
            state: parameters and moments at the window's start, held constant.
            data: the set.
            batches: inner mini-batches of the window, one a step.
            outer_loss: theta (P,) → scalar.
            learn_labels: whether labels want a gradient.
            weights: (length,) factors of the steps' direct contributions, P_trunc(i) of Eq. 13; None for 1.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """State that decides later gradients."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


def _leaves(data: SyntheticData, learn_labels: bool) -> SyntheticData:
    return SyntheticData(data.images.detach().requires_grad_(), data.labels.detach().requires_grad_(learn_labels))


@dataclass
class Unrolled(GradientEngine):
    """Keep the graph of the whole window and let autograd differentiate it: memory grows with the window."""

    def meta_gradient(
        self,
        problem: InnerProblem,
        state: InnerState,
        data: SyntheticData,
        batches: Sequence[InnerBatch],
        outer_loss: OuterLoss,
        learn_labels: bool,
        weights: Tensor | None = None,
    ) -> MetaGradient:
        data, state, norms = _leaves(data, learn_labels), state.detached(), []
        for i, batch in enumerate(batches):
            seen = data
            if weights is not None:
                seen = SyntheticData(_scaled(data.images, weights[i]), _scaled(data.labels, weights[i]))
            theta, gradient = problem.gradient(state.theta, seen, batch, create_graph=True)
            state = problem.optimizer.step(InnerState(theta, state.m, state.v, state.count), gradient)
            norms.append(gradient.detach().norm())
        loss = outer_loss(state.theta)
        inputs = [data.images, data.labels] if learn_labels else [data.images]
        gradients = torch.autograd.grad(loss, inputs)
        return MetaGradient(gradients[0], gradients[1] if learn_labels else None, loss.detach(), torch.stack(norms))


def _scaled(value: Tensor, weight: Tensor) -> Tensor:
    """The same value, its gradient times `weight`."""
    return value.detach() + weight * (value - value.detach())


@dataclass
class Adjoint(GradientEngine):
    """Keep only parameters and moments of each step and go back with cotangents: memory hardly grows with the window.

    Args:
        hessian: Hessian times cotangent: ``exact`` (nearly free), ``lowrank`` (LRHA, Eq. 9 to 12), or ``zero``.
        low_rank: settings of the low-rank factor; LowRankHessian's defaults by default.
        offload: keep the trajectory in main memory instead of the GPU's.
    """

    hessian: Literal["exact", "lowrank", "zero"] = "exact"
    low_rank: LowRankHessian | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        if self.hessian not in ("exact", "lowrank", "zero"):
            raise UserError(f"hessian: expected exact, lowrank or zero, got {self.hessian!r}")
        self._factor = self.low_rank or LowRankHessian()

    def meta_gradient(
        self,
        problem: InnerProblem,
        state: InnerState,
        data: SyntheticData,
        batches: Sequence[InnerBatch],
        outer_loss: OuterLoss,
        learn_labels: bool,
        weights: Tensor | None = None,
    ) -> MetaGradient:
        device, thetas, states, norms = state.theta.device, [], [], []
        state = state.detached()
        for batch in batches:
            thetas.append(self._keep(state.theta))
            _, gradient = problem.gradient(state.theta, data.detached(), batch)
            state = problem.optimizer.step(state, gradient)
            states.append(InnerState(state.theta, self._keep(state.m), self._keep(state.v), state.count))
            norms.append(gradient.norm())
        norm = torch.stack(norms)
        end = state.theta.requires_grad_()
        loss = outer_loss(end)
        (cotangent,) = torch.autograd.grad(loss, end)
        leaves = _leaves(data, learn_labels)
        total = [torch.zeros_like(x) for x in ((data.images, data.labels) if learn_labels else (data.images,))]
        ranks = self._refresh(problem, thetas, data, batches, norm)
        mu = nu = torch.zeros_like(cotangent)
        # Backwards in time. Each step computes g_t again with a graph, at the same parameters and with the same
        # augmentation; one backward pass from it, weighted by w, gives the products with dg/dX, dg/dY and the Hessian.
        for i in reversed(range(len(batches))):
            theta, gradient = problem.gradient(thetas.pop().to(device), leaves, batches[i], create_graph=True)
            w, cotangent, mu, nu = pull_back(problem.optimizer, states.pop(), gradient.detach(), cotangent, mu, nu)
            inputs = [leaves.images, leaves.labels] if learn_labels else [leaves.images]
            if self.hessian == "exact":
                inputs.append(theta)
            elif self.hessian == "lowrank" and self._factor.refresh == "step":
                self._factor.factorize(theta, gradient)
            products = torch.autograd.grad(gradient, inputs, w)
            for part, product in zip(total, products, strict=False):
                part += product if weights is None else weights[i] * product
            if self.hessian == "exact":
                cotangent = cotangent + products[-1]
            elif self.hessian == "lowrank":
                cotangent = cotangent + self._factor.product(w, ranks[i])
        return MetaGradient(total[0], total[1] if learn_labels else None, loss.detach(), norm)

    def _keep(self, value: Tensor) -> Tensor:
        return value.to("cpu", non_blocking=False) if self.offload else value

    def _refresh(
        self,
        problem: InnerProblem,
        thetas: Sequence[Tensor],
        data: SyntheticData,
        batches: Sequence[InnerBatch],
        norms: Tensor,
    ) -> list[int]:
        """Refresh the shared factor where it is due; return the rank to use at each step."""
        if self.hessian != "lowrank":
            return []
        if self._factor.due(norms):
            theta, gradient = problem.gradient(
                thetas[-1].to(data.images.device), data.detached(), batches[-1], create_graph=True
            )
            self._factor.factorize(theta, gradient)
        return self._factor.ranks(norms)

    def state_dict(self) -> dict[str, Any]:
        return self._factor.state_dict() if self.hessian == "lowrank" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.hessian == "lowrank":
            self._factor.load_state_dict(state)


def pull_back(
    optimizer: InnerOptimizer, after: InnerState, gradient: Tensor, cotangent: Tensor, mu: Tensor, nu: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pull cotangents of (theta, m, v) back through one optimiser step, all but its dependence on theta through g_t.

    Returns (w, cotangent, mu, nu) before the step, with w the cotangent of g_t; the caller adds the product of Hessian
    and w to the cotangent of theta. All (P,).

    Args:
        optimizer: which step it was.
        after: the state behind the step.
        gradient: g_t, detached.
        cotangent: of theta behind the step.
        mu: cotangent of m behind the step.
        nu: cotangent of v behind the step.
    """
    lr = optimizer.lr
    if optimizer.kind == "sgd":
        return -lr * cotangent, cotangent, mu, nu
    (b1, b2), m, v = optimizer.betas, after.m.to(cotangent.device), after.v.to(cotangent.device)
    m_correction, v_correction = 1 - b1**after.count, 1 - b2**after.count
    root = (v / v_correction).sqrt()
    # Derivative of the square root, 0 where it would be infinite: parameters that never got a gradient.
    slope = torch.where(root > 0, 0.5 / torch.where(root > 0, root, 1.0), 0.0)
    denominator = root + optimizer.eps
    mu = mu - lr / m_correction * cotangent / denominator
    nu = nu + lr / v_correction * cotangent * (m / m_correction) / denominator**2 * slope
    w = (1 - b1) * mu + 2 * (1 - b2) * gradient * nu
    return w, cotangent, b1 * mu, b2 * nu
