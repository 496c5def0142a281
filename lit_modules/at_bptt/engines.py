"""Meta-gradients of a window of inner steps: autograd through the unrolled graph, or adjoint equations step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leanlight.contracts import UserError
from lit_modules.at_bptt.graphs import Cotangents, RecordedSteps
from lit_modules.at_bptt.inner import InnerBatch, InnerProblem, InnerState, SyntheticData, times_each
from lit_modules.at_bptt.lowrank import LowRankHessian

#: theta → parts of the loss, one after another; their sum is differentiated.
OuterLoss = Callable[[Tensor], Iterable[Tensor]]


@dataclass(frozen=True)
class MetaGradient:
    """Gradients of the outer loss with respect to the set.

    Args:
        images: of the shape of the images.
        labels: of the shape of the labels, None where they are fixed.
        loss: the outer loss, a scalar tensor.
        norms: (length,) inner gradient norms n_t in the window; (length, S) of replicas.
    """

    images: Tensor
    labels: Tensor | None
    loss: Tensor
    norms: Tensor


class GradientEngine:
    """Base of the ways to differentiate a window of inner training."""

    def prepare(self, device: torch.device) -> None:
        """Take the device of the run; UserError when it does not fit."""

    def train(
        self, problem: InnerProblem, state: InnerState, data: SyntheticData, batches: Sequence[InnerBatch]
    ) -> Iterator[tuple[InnerState, Tensor]]:
        """Plain training in front of the window: as `InnerProblem.train`."""
        return problem.train(state, data, batches)

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
            outer_loss: theta (P,) → scalars, the parts of the loss; of replicas (S, P) → sums of theirs.
            learn_labels: whether labels want a gradient.
            weights: (length,), of replicas (length, S): factors of the steps' direct contributions, P_trunc(i) of
                Eq. 13, and 0 before a replica's window begins; None for 1.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """State that decides later gradients."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


def _outer_gradient(outer_loss: OuterLoss, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The outer loss at theta and its gradient there; the graph of one part is gone before that of the next is made."""
    theta = theta.detach().requires_grad_()
    loss, cotangent = theta.new_zeros(()), torch.zeros_like(theta)
    for part in outer_loss(theta):
        cotangent += torch.autograd.grad(part, theta)[0]
        loss += part.detach()
    return loss, cotangent


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
            norms.append(torch.linalg.vector_norm(gradient.detach(), dim=-1))
        loss, cotangent = _outer_gradient(outer_loss, state.theta)
        inputs = [data.images, data.labels] if learn_labels else [data.images]
        gradients = torch.autograd.grad(state.theta, inputs, cotangent)
        return MetaGradient(gradients[0], gradients[1] if learn_labels else None, loss, torch.stack(norms))


def _scaled(value: Tensor, weight: Tensor) -> Tensor:
    """The same value, its gradient times `weight`."""
    return value.detach() + times_each(value - value.detach(), weight)


@dataclass
class Adjoint(GradientEngine):
    """Keep only parameters and moments of each step and go back with cotangents: memory hardly grows with the window.

    Args:
        hessian: Hessian times cotangent: ``exact`` (nearly free), ``lowrank`` (LRHA, Eq. 9 to 12), or ``zero``.
        low_rank: settings of the low-rank factor; LowRankHessian's defaults by default.
        offload: keep the trajectory in main memory instead of the GPU's.
        graph: record an inner step and its adjoint as CUDA graphs and replay them: one launch a step. CUDA only.
    """

    hessian: Literal["exact", "lowrank", "zero"] = "exact"
    low_rank: LowRankHessian | None = None
    offload: bool = False
    graph: bool = False

    def __post_init__(self) -> None:
        if self.hessian not in ("exact", "lowrank", "zero"):
            raise UserError(f"hessian: expected exact, lowrank or zero, got {self.hessian!r}")
        self._factor = self.low_rank or LowRankHessian()
        if self.graph and self._factorizes_each_step:
            raise UserError("graph: a factorisation at each step cannot be recorded; use refresh: cached or window")
        self._recorded: RecordedSteps | None = None

    def prepare(self, device: torch.device) -> None:
        if self.graph and device.type != "cuda":
            raise UserError(f"graph: expected a CUDA device to record on, got {device.type}; use false")

    @property
    def _factorizes_each_step(self) -> bool:
        return self.hessian == "lowrank" and self._factor.refresh == "step"

    @property
    def _steps(self) -> RecordedSteps | None:
        if self.graph and self._recorded is None:
            self._recorded = RecordedSteps()
        return self._recorded

    def train(
        self, problem: InnerProblem, state: InnerState, data: SyntheticData, batches: Sequence[InnerBatch]
    ) -> Iterator[tuple[InnerState, Tensor]]:
        if self._steps is None:
            yield from problem.train(state, data, batches)
            return
        for batch in batches:
            state, norm = self._steps.step(problem, state, data, batch)
            yield state, norm

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
        device, norms = state.theta.device, []
        state = state.detached()
        trajectory = [self._keep(state)]
        for state, norm in self.train(problem, state, data, batches):  # noqa: B020
            trajectory.append(self._keep(state))
            norms.append(norm)
        norm = torch.stack(norms)
        loss, cotangent = _outer_gradient(outer_loss, state.theta)
        leaves = _leaves(data, learn_labels)
        total = [torch.zeros_like(x) for x in ((data.images, data.labels) if learn_labels else (data.images,))]
        ranks = self._refresh(problem, trajectory[-2].theta, data, batches[-1], norm)
        cotangents = cotangent, torch.zeros_like(cotangent), torch.zeros_like(cotangent)
        # Backwards in time. Each step computes g_t again with a graph, at the same parameters and with the same
        # augmentation; one backward pass from it, weighted by w, gives the products with dg/dX, dg/dY and the Hessian.
        for i in reversed(range(len(batches))):
            after = trajectory.pop()
            theta = trajectory[-1].theta.to(device)
            w, cotangents, products = self._pull_back(problem, theta, after, leaves, batches[i], cotangents)
            for part, product in zip(total, products, strict=False):
                part += product if weights is None else times_each(product, weights[i])
            cotangent, mu, nu = cotangents
            if self.hessian == "exact":
                cotangents = cotangent + products[-1], mu, nu
            elif self.hessian == "lowrank":
                # Where no step has had a gradient the Hessian is zero, and Adam's w of the order of 1 / eps. A factor
                # of another moment or network is not zero there, and one such product would drown all others.
                reached = problem.optimizer.reached(after).to(device)
                cotangents = cotangent + reached * self._factor.product(w * reached, ranks[i]), mu, nu
        return MetaGradient(total[0], total[1] if learn_labels else None, loss, norm)

    def _pull_back(
        self,
        problem: InnerProblem,
        theta: Tensor,
        after: InnerState,
        leaves: SyntheticData,
        batch: InnerBatch,
        cotangents: Cotangents,
    ) -> tuple[Tensor, Cotangents, tuple[Tensor, ...]]:
        """Cotangents before a step: see `RecordedSteps.pull_back`."""
        exact = self.hessian == "exact"
        if self._steps is not None:
            return self._steps.pull_back(problem, theta, after, leaves, batch, cotangents, exact)
        theta, gradient = problem.gradient(theta, leaves, batch, create_graph=True)
        w, *before = problem.optimizer.pull_back(after, gradient.detach(), *cotangents)
        if self._factorizes_each_step:
            self._factor.factorize(theta, gradient)
        inputs = [x for x in (leaves.images, leaves.labels) if x.requires_grad]
        products = torch.autograd.grad(gradient, [*inputs, theta] if exact else inputs, w)
        return w, (before[0], before[1], before[2]), products

    def _keep(self, state: InnerState) -> InnerState:
        if not self.offload:
            return state
        return InnerState(state.theta.cpu(), state.m.cpu(), state.v.cpu(), state.count)

    def _refresh(
        self, problem: InnerProblem, theta: Tensor, data: SyntheticData, batch: InnerBatch, norms: Tensor
    ) -> list[int]:
        """Refresh the shared factor, at the window's last step, where it is due; return the rank of each step."""
        if self.hessian != "lowrank":
            return []
        norms = norms.cpu()  # waited for once: ranks are sizes, which the host has to know
        if self._factor.due(norms):
            theta, gradient = problem.gradient(theta.to(data.images.device), data.detached(), batch, create_graph=True)
            self._factor.factorize(theta, gradient)
        return self._factor.ranks(norms)

    def state_dict(self) -> dict[str, Any]:
        return self._factor.state_dict() if self.hessian == "lowrank" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.hessian == "lowrank":
            self._factor.load_state_dict(state)
