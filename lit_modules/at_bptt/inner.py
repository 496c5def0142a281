"""Inner training on a synthetic set, as a function of one flat parameter vector.

The network is used functionally: theta (P,) holds all parameters, so that optimiser states, cotangents and low-rank
factors are plain vectors and matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveFloat, Share
from leanlight.ops.augment import Augmentation
from leanlight.ops.differentiable import augment_each


class FlatNetwork:
    """A network as a function of a flat vector.

    Args:
        network: without batch norm, whose running statistics would change inside graphs that are differentiated twice.
    """

    def __init__(self, network: nn.Module) -> None:
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            raise UserError("network: expected one without batch norm, e.g. norm: instance")
        self.network = network.train()
        self.shapes = {name: value.shape for name, value in network.named_parameters()}
        self.buffers = dict(network.named_buffers())
        self._sizes = [shape.numel() for shape in self.shapes.values()]

    def parameters(self) -> Tensor:
        """The network's present parameters as one vector (P,)."""
        return torch.cat([value.detach().flatten() for value in self.network.parameters()])

    def __call__(self, theta: Tensor, image: Tensor, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        """theta (P,), image (N, C, H, W), buffers by name (its own by default) → logits (N, K)."""
        pieces = theta.split(self._sizes)
        values = {name: piece.view(shape) for (name, shape), piece in zip(self.shapes.items(), pieces, strict=True)}
        return functional_call(self.network, {**values, **(self.buffers if buffers is None else buffers)}, (image,))


class StackedNetworks(FlatNetwork):
    """Networks of one architecture as one function of their flat vectors.

    Args:
        networks: S of them.
    """

    def __init__(self, networks: Sequence[FlatNetwork]) -> None:
        super().__init__(networks[0].network)
        self.networks = networks
        self.buffers = {name: torch.stack([each.buffers[name] for each in networks]) for name in self.buffers}

    def parameters(self) -> Tensor:
        """The networks' present parameters (S, P)."""
        return torch.stack([each.parameters() for each in self.networks])

    def __call__(self, theta: Tensor, image: Tensor, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        """theta (S, P), image (S, N, C, H, W), buffers (S, …) by name (their own by default) → logits (S, N, K)."""
        return vmap(super().__call__)(theta, image, self.buffers if buffers is None else buffers)


class Corrections(NamedTuple):
    """What depends on the count of steps in Adam: numbers, or scalar tensors for a step that is recorded.

    Args:
        m: 1 - beta_1^count.
        v: 1 - beta_2^count.
        m_rate: alpha over `m`.
        v_rate: alpha over `v`.
    """

    m: float | Tensor
    v: float | Tensor
    m_rate: float | Tensor
    v_rate: float | Tensor


@dataclass(frozen=True)
class InnerOptimizer:
    """How the inner network is trained on the synthetic set, differentiably.

    Args:
        kind: ``adam``, as in the paper, or plain ``sgd``.
        lr: alpha, learning rate; 1e-3 in the paper.
        betas: of Adam, decay of its first and second moment.
        eps: of Adam, added to the root of its second moment.
        eps_placement: eps is added ``after`` that moment's bias correction (torch) or ``before`` it (library higher, in
            published code).
    """

    kind: Literal["adam", "sgd"] = "adam"
    lr: PositiveFloat = 1e-3
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    eps_placement: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"lr: expected a positive number, got {self.lr}")
        if self.eps_placement not in ("after", "before"):
            raise UserError(f"eps_placement: expected after or before, got {self.eps_placement!r}")

    def start(self, theta: Tensor, count: int | Tensor = 0) -> InnerState:
        """The state before the first step; count: of `InnerState`."""
        return InnerState(theta, torch.zeros_like(theta), torch.zeros_like(theta), count)

    def corrections(self, count: int | Tensor) -> Corrections:
        """Those after `count` steps; where it is a tensor, of (S, 1) networks, for each of them.

        A network that waits for its first step has a count below 1. Its moments are 0, so that any correction will do.
        """
        if isinstance(count, Tensor):
            exact = count.clamp(min=1).double()
            first, second = (1 - beta**exact for beta in self.betas)
            return Corrections(*(value.to(count.dtype) for value in (first, second, self.lr / first, self.lr / second)))
        m, v = (1 - beta**count for beta in self.betas)
        return Corrections(m, v, self.lr / m, self.lr / v)

    def step(self, state: InnerState, gradient: Tensor, corrections: Corrections | None = None) -> InnerState:
        """One differentiable step.

        Args:
            state: before the step.
            gradient: g_t (P,).
            corrections: those after the step, of the state's count by default.
        """
        if self.kind == "sgd":
            return InnerState(state.theta - self.lr * gradient, state.m, state.v, state.count + 1)
        (b1, b2), count = self.betas, state.count + 1
        correct = corrections or self.corrections(count)
        m = torch.lerp(gradient, state.m, b1)
        v = torch.addcmul(b2 * state.v, gradient, gradient, value=1 - b2)
        root = safe_sqrt(v / correct.v)
        return InnerState(state.theta - correct.m_rate * m / (root + self._eps(correct)), m, v, count)

    def _eps(self, correct: Corrections) -> float | Tensor:
        """What is added to the root of the corrected second moment: sqrt(v) + eps, corrected, has a larger eps."""
        return self.eps if self.eps_placement == "after" else self.eps / correct.v**0.5

    def reached(self, after: InnerState) -> Tensor:
        """(P,) 1 where a step up to `after` may have had a gradient, else 0: at the weights of a silent ReLU, say."""
        return (after.v > 0).to(after.v.dtype) if self.kind == "adam" else torch.ones_like(after.theta)

    def pull_back(
        self,
        after: InnerState,
        gradient: Tensor,
        cotangent: Tensor,
        mu: Tensor,
        nu: Tensor,
        corrections: Corrections | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pull cotangents of (theta, m, v) back through one step, all but its dependence on theta through g_t.

        Returns (w, cotangent, mu, nu) before the step, with w the cotangent of g_t; the caller adds the product of
        Hessian and w to the cotangent of theta. All (P,).

        Args:
            after: the state behind the step.
            gradient: g_t, detached.
            cotangent: of theta behind the step.
            mu: cotangent of m behind the step.
            nu: cotangent of v behind the step.
            corrections: as in `step`.
        """
        if self.kind == "sgd":
            return -self.lr * cotangent, cotangent, mu, nu
        (b1, b2), m, v = self.betas, after.m.to(cotangent.device), after.v.to(cotangent.device)
        correct = corrections or self.corrections(after.count)
        root = (v / correct.v).sqrt()
        # Derivative of the square root, 0 where it would be infinite: parameters that never got a gradient.
        slope = torch.where(root > 0, 0.5 / torch.where(root > 0, root, 1.0), 0.0)
        denominator = root + self._eps(correct)
        mu = mu - correct.m_rate * cotangent / denominator
        nu = nu + correct.v_rate * cotangent * (m / correct.m) / denominator**2 * slope
        w = (1 - b1) * mu + 2 * (1 - b2) * gradient * nu
        return w, cotangent, b1 * mu, b2 * nu


@dataclass(frozen=True)
class InnerState:
    """State of the inner training, of one network or, with a leading axis, of several.

    Args:
        theta: (P,) or (S, P) parameters.
        m: Adam's first moment, of the same shape.
        v: Adam's second moment, of the same shape.
        count: steps taken; of several networks a tensor (S, 1) in the dtype of `theta`.
    """

    theta: Tensor
    m: Tensor
    v: Tensor
    count: int | Tensor

    def detached(self) -> InnerState:
        return InnerState(self.theta.detach(), self.m.detach(), self.v.detach(), self.count)


def safe_sqrt(value: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0: parameters that never got a gradient (dead units, biases before a norm)
    would make it infinite."""
    if not value.requires_grad:
        return value.sqrt()
    positive = value > 0
    return torch.where(positive, value, 1.0).sqrt() * positive


def times_each(value: Tensor, factor: Tensor) -> Tensor:
    """value (…) times a scalar, or value (S, …) times factor (S,)."""
    return value * factor.view(factor.shape + (1,) * (value.dim() - factor.dim()))


@dataclass(frozen=True)
class InnerBatch:
    """One inner mini-batch, enough to repeat it exactly; or one of each of S replicas.

    Args:
        index: (B,) or (S, B) positions in the set, or None for all of it.
        seed: of its augmentation; of replicas one each.
        active: of replicas (S, 1, 1), 0 where training has not begun and else 1; None: all have begun.
    """

    index: Tensor | None
    seed: int | Sequence[int]
    active: Tensor | None = None


@dataclass(frozen=True)
class SyntheticData:
    """The synthetic set, as leaves of a graph or as plain tensors; or, with a leading axis, those of S replicas.

    Args:
        images: (n, C, H, W) float, preprocessed.
        labels: (n, K) float.
    """

    images: Tensor
    labels: Tensor

    def detached(self) -> SyntheticData:
        return SyntheticData(self.images.detach(), self.labels.detach())


class InnerProblem:
    """The loss l_t(theta) of one inner mini-batch: cross entropy of augmented synthetic images and (soft) labels.

    Args:
        network: the inner network.
        optimizer: makes the steps.
        augment: of the synthetic images, or None.
    """

    def __init__(self, network: FlatNetwork, optimizer: InnerOptimizer, augment: Augmentation | None) -> None:
        self.network, self.optimizer, self.augment = network, optimizer, augment

    def inputs(self, data: SyntheticData, batch: InnerBatch) -> tuple[Tensor, Tensor]:
        """Augmented images (B, C, H, W) and labels (B, K) of the mini-batch."""
        images, labels = data.images, data.labels
        if batch.index is not None:
            images, labels = images[batch.index], labels[batch.index]
        if self.augment is not None:
            assert isinstance(batch.seed, int)
            images = self.augment(images, torch.Generator().manual_seed(batch.seed))
        return images, labels

    def loss(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy at theta (P,) of what `inputs` gives."""
        return F.cross_entropy(self.network(theta, images), labels)

    def gradient(
        self, theta: Tensor, data: SyntheticData, batch: InnerBatch, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return theta as a leaf (or as given, when it has a graph) and the gradient g_t (P,) there."""
        theta = theta if theta.requires_grad else theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(theta, *self.inputs(data, batch)), theta, create_graph=create_graph)
        return theta, gradient

    def train(
        self, state: InnerState, data: SyntheticData, batches: Sequence[InnerBatch]
    ) -> Iterator[tuple[InnerState, Tensor]]:
        """Plain training: yield each state and the gradient norm (scalar, or (S,)) of the step that led to it."""
        data = data.detached()
        for batch in batches:
            _, gradient = self.gradient(state.theta, data, batch)
            state = self.optimizer.step(state, gradient)
            yield state, torch.linalg.vector_norm(gradient, dim=-1)

    def trained(self, state: InnerState, data: SyntheticData, batches: Sequence[InnerBatch]) -> InnerState:
        """The state after plain training on `batches`."""
        for state, _ in self.train(state, data, batches):  # noqa: B007, B020
            pass
        return state


class StackedProblem(InnerProblem):
    """The inner problems of S replicas as one, whose loss is the sum of theirs: theta (S, P), and S sets.

    They share nothing, so the sum's gradient holds that of each in its own row, and its Hessian is block-diagonal: one
    backward pass and one double backward pass serve all.
    """

    def inputs(self, data: SyntheticData, batch: InnerBatch) -> tuple[Tensor, Tensor]:
        """Augmented images (S, B, C, H, W) and labels (S, B, K); those of a replica that waits are zero.

        Without labels there is no loss and no gradient, and without a gradient moments of 0 stay 0: it does not move.
        """
        images, labels = data.images, data.labels
        if batch.index is not None:
            rows = torch.arange(len(images), device=images.device).unsqueeze(1)
            images, labels = images[rows, batch.index], labels[rows, batch.index]
        if self.augment is not None:
            assert not isinstance(batch.seed, int)
            images = augment_each(self.augment, images, [torch.Generator().manual_seed(seed) for seed in batch.seed])
        return images, labels if batch.active is None else labels * batch.active

    def loss(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Sum over replicas of the cross entropy at theta (S, P) of what `inputs` gives."""
        logits = self.network(theta, images)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), reduction="sum") / logits.shape[1]


class RealLoss:
    """The outer loss: cross entropy on real images, in parts that an engine differentiates one by one.

    Args:
        network: the inner network, or those of S replicas.
        image: (N, C, H, W) or (S, N, C, H, W), preprocessed.
        label: (N,) or (S, N) classes.
        chunk: images of a part; all by default.
    """

    def __init__(self, network: FlatNetwork, image: Tensor, label: Tensor, chunk: int | None = None) -> None:
        self.network, self.image, self.label, self.chunk = network, image, label, chunk
        self._seen: list[tuple[Tensor, Tensor]] = []  # loss and accuracy of each part, weighted by its share

    def __call__(self, theta: Tensor) -> Iterator[Tensor]:
        """theta (P,) → parts of the loss; (S, P) → parts of the sum of the replicas' losses."""
        self._seen, count = [], self.label.shape[-1]
        size = self.chunk or count
        images, labels = self.image.split(size, self.label.dim() - 1), self.label.split(size, -1)
        for image, label in zip(images, labels, strict=True):
            logits, share = self.network(theta, image), label.shape[-1] / count
            losses = F.cross_entropy(logits.flatten(0, -2), label.flatten(), reduction="none").view_as(label)
            loss = losses.mean(-1) * share
            self._seen.append((loss.detach(), (logits.argmax(-1) == label).float().mean(-1) * share))
            yield loss.sum()

    @property
    def loss(self) -> Tensor:
        """The loss at the theta of the last call, a scalar or (S,)."""
        return torch.stack([loss for loss, _ in self._seen]).sum(0)

    @property
    def accuracy(self) -> Tensor:
        """Share of images that were labelled right there, a scalar or (S,)."""
        return torch.stack([accuracy for _, accuracy in self._seen]).sum(0)


@dataclass(frozen=True)
class BatchSampler:
    """Inner mini-batches: so many classes, so many of each class's images; None for all.

    The set lies class by class: image k of class c at ``c * ipc + k``.

    Args:
        num_classes: number of classes.
        ipc: images per class.
        classes_per_batch: classes in a mini-batch, None for all.
        images_per_class: images of each class in a mini-batch, None for all.
    """

    num_classes: int
    ipc: int
    classes_per_batch: int | None = None
    images_per_class: int | None = None

    def __post_init__(self) -> None:
        for name, value, most in (
            ("classes_per_batch", self.classes_per_batch, self.num_classes),
            ("images_per_class", self.images_per_class, self.ipc),
        ):
            if value is not None and not 1 <= value <= most:
                raise UserError(f"{name}: expected 1 to {most}, got {value}")

    @property
    def _taken(self) -> tuple[int, int]:
        """Classes of a mini-batch, and images of each."""
        return self.classes_per_batch or self.num_classes, self.images_per_class or self.ipc

    @property
    def size(self) -> int:
        """Images of a mini-batch."""
        classes, images = self._taken
        return classes * images

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> list[InnerBatch]:
        """Draw `count` mini-batches, with a generator on the CPU, so that every device sees the same."""
        seeds = torch.randint(2**62, (count,), generator=generator).tolist()
        if self.size == self.num_classes * self.ipc:
            return [InnerBatch(None, seed) for seed in seeds]
        index = self._draw(count, generator).to(device, non_blocking=True)
        return [InnerBatch(row, seed) for row, seed in zip(index, seeds, strict=True)]

    def positions(self, generator: torch.Generator | None = None) -> Tensor:
        """Positions (size,) of one mini-batch in the set, on the CPU, from the global random state by default.

        So the sampler is the order of an epoch of one step, for `lit_modules.classifier.training`.
        """
        return self._draw(1, generator)[0]

    def _draw(self, count: int, generator: torch.Generator | None) -> Tensor:
        classes, images = self._taken
        chosen = torch.rand(count, self.num_classes, generator=generator).argsort(1)[:, :classes]
        within = torch.rand(count, classes, self.ipc, generator=generator).argsort(2)[..., :images]
        return (chosen.unsqueeze(2) * self.ipc + within).flatten(1)
