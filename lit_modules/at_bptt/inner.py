"""Inner training on a synthetic set, as a function of one flat parameter vector.

The network is used functionally: theta (P,) holds all parameters, so that optimiser states, cotangents and low-rank
factors are plain vectors and matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from leanlight.contracts import UserError
from leanlight.ops.augment import Augmentation


class FlatNetwork:
    """A network as a function of a flat vector.

    Args:
        network: without batch norm, whose running statistics would change inside graphs that are differentiated twice.
    """

    def __init__(self, network: nn.Module) -> None:
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            raise UserError("network: expected one without batch norm, e.g. norm: instance")
        self.network = network.train()
        self._shapes = {name: value.shape for name, value in network.named_parameters()}
        self._sizes = [shape.numel() for shape in self._shapes.values()]
        self._buffers = dict(network.named_buffers())

    def parameters(self) -> Tensor:
        """The network's present parameters as one vector (P,)."""
        return torch.cat([value.detach().flatten() for value in self.network.parameters()])

    def __call__(self, theta: Tensor, image: Tensor) -> Tensor:
        """theta (P,), image (N, C, H, W) → logits (N, K)."""
        pieces = theta.split(self._sizes)
        values = {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces, strict=True)}
        return functional_call(self.network, {**values, **self._buffers}, (image,))


@dataclass(frozen=True)
class InnerOptimizer:
    """How the inner network is trained on the synthetic set, differentiably.

    Args:
        kind: ``adam``, as in the paper, or plain ``sgd``.
        lr: alpha, learning rate; 1e-3 in the paper.
        betas: of Adam, decay of its first and second moment.
        eps: of Adam, added to the root of its second moment.
    """

    kind: Literal["adam", "sgd"] = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise UserError(f"lr: expected a positive number, got {self.lr}")

    def start(self, theta: Tensor) -> InnerState:
        """The state before the first step."""
        return InnerState(theta, torch.zeros_like(theta), torch.zeros_like(theta), 0)

    def step(self, state: InnerState, gradient: Tensor) -> InnerState:
        """One differentiable step; gradient (P,)."""
        if self.kind == "sgd":
            return InnerState(state.theta - self.lr * gradient, state.m, state.v, state.count + 1)
        (b1, b2), count = self.betas, state.count + 1
        m = torch.lerp(gradient, state.m, b1)
        v = b2 * state.v + (1 - b2) * gradient * gradient
        root = safe_sqrt(v / (1 - b2**count))
        return InnerState(state.theta - self.lr / (1 - b1**count) * m / (root + self.eps), m, v, count)


@dataclass(frozen=True)
class InnerState:
    """State of the inner training.

    Args:
        theta: (P,) parameters.
        m: (P,) Adam's first moment.
        v: (P,) Adam's second moment.
        count: steps taken.
    """

    theta: Tensor
    m: Tensor
    v: Tensor
    count: int

    def detached(self) -> InnerState:
        return InnerState(self.theta.detach(), self.m.detach(), self.v.detach(), self.count)


def safe_sqrt(value: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0: parameters that never got a gradient (dead units, biases before a norm)
    would make it infinite."""
    positive = value > 0
    return torch.where(positive, value, 1.0).sqrt() * positive


@dataclass(frozen=True)
class InnerBatch:
    """One inner mini-batch, enough to repeat it exactly.

    Args:
        index: (B,) positions in the set, or None for all of it.
        seed: of its augmentation.
    """

    index: Tensor | None
    seed: int


@dataclass(frozen=True)
class SyntheticData:
    """The synthetic set, as leaves of a graph or as plain tensors.

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

    def loss(self, theta: Tensor, data: SyntheticData, batch: InnerBatch) -> Tensor:
        images, labels = data.images, data.labels
        if batch.index is not None:
            images, labels = images[batch.index], labels[batch.index]
        if self.augment is not None:
            images = self.augment(images, torch.Generator().manual_seed(batch.seed))
        return F.cross_entropy(self.network(theta, images), labels)

    def gradient(
        self, theta: Tensor, data: SyntheticData, batch: InnerBatch, create_graph: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return theta as a leaf (or as given, when it has a graph) and the gradient g_t (P,) there."""
        theta = theta if theta.requires_grad else theta.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(theta, data, batch), theta, create_graph=create_graph)
        return theta, gradient

    def train(
        self, state: InnerState, data: SyntheticData, batches: Sequence[InnerBatch]
    ) -> Iterator[tuple[InnerState, Tensor]]:
        """Plain training: yield each state and the gradient norm (scalar tensor) of the step that led to it."""
        data = data.detached()
        for batch in batches:
            _, gradient = self.gradient(state.theta, data, batch)
            state = self.optimizer.step(state, gradient)
            yield state, gradient.norm()

    def trained(self, state: InnerState, data: SyntheticData, batches: Sequence[InnerBatch]) -> InnerState:
        """The state after plain training on `batches`."""
        for state, _ in self.train(state, data, batches):  # noqa: B007, B020
            pass
        return state


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

    def draw(self, count: int, generator: torch.Generator, device: torch.device) -> list[InnerBatch]:
        """Draw `count` mini-batches, with a generator on the CPU, so that every device sees the same."""
        seeds = torch.randint(2**62, (count,), generator=generator).tolist()
        classes = self.classes_per_batch or self.num_classes
        images = self.images_per_class or self.ipc
        if classes == self.num_classes and images == self.ipc:
            return [InnerBatch(None, seed) for seed in seeds]
        chosen = torch.rand(count, self.num_classes, generator=generator).argsort(1)[:, :classes]
        within = torch.rand(count, classes, self.ipc, generator=generator).argsort(2)[..., :images]
        index = (chosen.unsqueeze(2) * self.ipc + within).flatten(1).to(device, non_blocking=True)
        return [InnerBatch(row, seed) for row, seed in zip(index, seeds, strict=True)]
