"""Recorded inner steps: one launch for what are hundreds of small kernels, in training and on the way back.

A step's kernels are recorded once as a CUDA graph over buffers that stay where they are, and replayed for every step of
every outer step. Mini-batches are drawn and augmented outside, since each picks its own operation; what is recorded is
the network, its gradient, Adam, and the second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_modules.at_bptt.inner import Corrections, InnerBatch, InnerProblem, InnerState, SyntheticData

Work = Callable[[], tuple[Tensor, ...]]
Recorder = Callable[[Work], tuple[Callable[[], object], tuple[Tensor, ...]]]
Cotangents = tuple[Tensor, Tensor, Tensor]
_WARM_UP = 3  # runs before the recording: kernels load, cuDNN chooses, workspaces are allocated


class CudaRecorder:
    """Records work on the present CUDA device; all recordings share their scratch memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
        """Return what repeats the work, and where it puts its results until the next repetition of any work."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads (pinned loaders, NCCL's watchdog) go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = work()
        return graph.replay, results


class Recording:
    """A function of tensors that is recorded once, then replayed with other values.

    Args:
        function: tensors → tensors, without a decision of the host that depends on their values.
        values: of the arguments; later ones have the same shapes.
        record: turns work on fixed buffers into what repeats it.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], values: Sequence[Tensor], record: Recorder) -> None:
        self._arguments = [value.detach().clone() for value in values]
        self._replay, self._results = record(lambda: function(*self._arguments))

    def __call__(self, *values: Tensor) -> list[Tensor]:
        torch._foreach_copy_(self._arguments, [value.detach() for value in values])
        self._replay()
        return [result.clone() for result in self._results]  # the next replay writes over them


class RecordedSteps:
    """Inner steps and their adjoints as recordings, which outlive the networks of outer steps.

    A network enters by its parameters, an argument, and its buffers, which are copied; all else of it is that of the
    first network.

    Args:
        record: turns work on fixed buffers into what repeats it; CUDA graphs by default.
    """

    def __init__(self, record: Recorder | None = None) -> None:
        self._record = record or CudaRecorder()
        self._problem: InnerProblem | None = None
        self._current: InnerProblem | None = None
        self._recordings: dict[Any, Recording] = {}
        self._corrections = torch.empty(0, 4)

    def step(
        self, problem: InnerProblem, state: InnerState, data: SyntheticData, batch: InnerBatch
    ) -> tuple[InnerState, Tensor]:
        """One plain step: the state behind it and the gradient norm."""
        self._adopt(problem)
        images, labels = problem.inputs(data.detached(), batch)
        corrections = self._corrections_at(state.count + 1, state.theta)
        values = (state.theta, state.m, state.v, corrections, images, labels)
        theta, m, v, norm = self._run(self._step, values)
        return InnerState(theta, m, v, state.count + 1), norm

    def pull_back(
        self,
        problem: InnerProblem,
        theta: Tensor,
        after: InnerState,
        leaves: SyntheticData,
        batch: InnerBatch,
        cotangents: Cotangents,
        exact: bool,
    ) -> tuple[Tensor, Cotangents, tuple[Tensor, ...]]:
        """Pull cotangents of (theta, m, v) back through one step.

        Args:
            problem: the inner problem.
            theta: (P,) before the step.
            after: the state behind the step; its theta is not read.
            leaves: the set, whose parts that require gradients get products.
            batch: the step's mini-batch.
            cotangents: of theta, m and v behind the step, each (P,).
            exact: whether the Hessian's product is wanted.

        Returns:
            w (P,), the cotangents before the step but for the Hessian's product, and the products of w with the
            derivatives of g_t by images, by labels where they require gradients, and by theta where wanted.
        """
        self._adopt(problem)
        inputs = problem.inputs(leaves, batch)
        corrections = self._corrections_at(after.count, theta)
        function = self._back_exact if exact else self._back
        values = (theta, after.m, after.v, corrections, *inputs, *cotangents)
        w, cotangent, mu, nu, *products = self._run(function, values)
        learned = [x for x in (leaves.images, leaves.labels) if x.requires_grad]
        by_set = torch.autograd.grad(inputs[: len(learned)], learned, products[: len(learned)])
        return w, (cotangent, mu, nu), (*by_set, *products[2:])

    # ---- what is recorded ----

    def _step(
        self, theta: Tensor, m: Tensor, v: Tensor, corrections: Tensor, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, ...]:
        assert self._problem is not None
        leaf = theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self._problem.loss(leaf, images, labels), leaf)
        state = self._problem.optimizer.step(InnerState(theta, m, v, 0), gradient, Corrections(*corrections.unbind()))
        return state.theta, state.m, state.v, gradient.norm()

    def _back(self, *values: Tensor, exact: bool = False) -> tuple[Tensor, ...]:
        assert self._problem is not None
        theta, m, v, corrections, images, labels, *behind = values
        leaves = [value.detach().requires_grad_() for value in (images, labels, theta)]
        loss = self._problem.loss(leaves[2], leaves[0], leaves[1])
        (gradient,) = torch.autograd.grad(loss, leaves[2], create_graph=True)
        cotangent, mu, nu = behind
        w, cotangent, mu, nu = self._problem.optimizer.pull_back(
            InnerState(theta, m, v, 0), gradient.detach(), cotangent, mu, nu, Corrections(*corrections.unbind())
        )
        products = torch.autograd.grad(gradient, leaves if exact else leaves[:2], w)
        return (w, cotangent, mu, nu, *products)

    def _back_exact(self, *values: Tensor) -> tuple[Tensor, ...]:
        return self._back(*values, exact=True)

    # ---- recordings ----

    def _run(self, function: Callable[..., tuple[Tensor, ...]], values: Sequence[Tensor]) -> list[Tensor]:
        key = (function.__name__, *(value.shape for value in values))
        if key not in self._recordings:
            self._recordings[key] = Recording(function, values, self._record)
        return self._recordings[key](*values)

    def _adopt(self, problem: InnerProblem) -> None:
        """Make recordings act as with this problem's network."""
        if problem is self._current:
            return
        first = self._problem
        if first is None or _kind(first) != _kind(problem):
            self._problem, self._recordings, self._corrections = problem, {}, torch.empty(0, 4)
        else:
            for name, value in problem.network.buffers.items():
                first.network.buffers[name].copy_(value)
        self._current = problem

    def _corrections_at(self, count: int | Tensor, like: Tensor) -> Tensor:
        """Adam's corrections after `count` steps, (4,), from a table on the device."""
        assert isinstance(count, int)  # of one network
        if len(self._corrections) < count:
            assert self._problem is not None
            table = [self._problem.optimizer.corrections(i) for i in range(1, 2 * count + 1)]
            self._corrections = torch.tensor(table, dtype=torch.float64).to(like.device, like.dtype)
        return self._corrections[count - 1]


def _kind(problem: InnerProblem) -> tuple[Any, ...]:
    """What a recording holds of its problem."""
    device = next(iter(problem.network.network.parameters())).device
    return problem.optimizer, problem.network.shapes, device
