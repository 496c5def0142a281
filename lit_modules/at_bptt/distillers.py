"""What an outer step computes: the meta-gradient of unrolled training, or the gradient of distribution matching."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import MediaItem, NetworkFactory, UserError, isolated_rng, to_device
from leanlight.contracts.ranges import PositiveInt
from leanlight.ops.differentiable import find_augmentation, siamese_dsa
from lit_modules.at_bptt.engines import Adjoint, GradientEngine
from lit_modules.at_bptt.inner import (
    BatchSampler,
    FlatNetwork,
    InnerBatch,
    InnerOptimizer,
    InnerProblem,
    RealLoss,
    SyntheticData,
)
from lit_modules.at_bptt.norms import twice_differentiable
from lit_modules.at_bptt.pictures import gradient_norm_curve
from lit_modules.at_bptt.windows import AdaptiveWindow, Window, WindowSelector
from lit_modules.classifier.training import LabelledImages
from lit_modules.nn.features import pooled_features, require_features


@dataclass(frozen=True)
class OuterStep:
    """What one outer step gives.

    Args:
        images: gradient with respect to the images, of their shape.
        labels: gradient with respect to the labels, None where they are fixed.
        loss: of the outer level, a scalar tensor.
        accuracy: share of the real batch that was labelled right, a scalar tensor.
        own: gradient (k,) of what the distiller itself learns, None for nothing.
    """

    images: Tensor
    labels: Tensor | None
    loss: Tensor
    accuracy: Tensor
    own: Tensor | None = None


@dataclass(frozen=True)
class Task:
    """What a distiller is told beside the set.

    Args:
        network: makes a fresh inner network.
        num_classes: number of classes.
        ipc: images per class; the set lies class by class.
        epochs: number of outer epochs.
        learn_labels: whether labels want a gradient.
        device: of the run.
    """

    network: NetworkFactory
    num_classes: int
    ipc: int
    epochs: int
    learn_labels: bool
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Study:
    """What a distiller that `studies` is given before the first outer step.

    Args:
        real: all real images (N, C, H, W), preprocessed, and their labels (N,).
        folder: of the run, for files that are to be there when it goes on.
        seed: decides all that is drawn.
        rank: number of this process.
        world: number of processes; none goes on before all have studied.
        tell: takes a line on how far it is, for people.
    """

    real: LabelledImages
    folder: Path
    seed: int
    rank: int = 0
    world: int = 1
    tell: Callable[[str], None] = lambda line: None


class Distiller:
    """Base of what computes an outer step: one call of `outer_step` a real batch, one of `start_epoch` before them."""

    # Whether `study` wants all real images. An annotation would be evaluated in the modules of subclasses.
    studies = False

    def prepare(self, task: Task) -> None:
        """Take the task; UserError when it does not fit."""

    def study(self, study: Study) -> None:
        """Learn from all real images, before the first outer step, and again when a run goes on."""

    def first_set(self, data: SyntheticData, study: Study) -> None:
        """Change the set of a new run, in place, once all processes have studied; all have to do the same."""

    def start_epoch(self, data: SyntheticData, seed: int) -> None:
        """Make this epoch's choices; on rank 0 alone, see `choice`."""

    @property
    def choice(self) -> Any:
        """What `start_epoch` chose, in plain containers, to be sent to the other ranks and kept in checkpoints."""
        return None

    @choice.setter
    def choice(self, value: Any) -> None:
        pass

    def outer_step(self, data: SyntheticData, image: Tensor, label: Tensor, seed: int) -> OuterStep:
        """Gradients of one outer step.

        Args:
            data: the set.
            image: real images (N, C, H, W), preprocessed.
            label: their classes (N,).
            seed: decides all that is drawn.
        """
        raise NotImplementedError

    def updated(self, data: SyntheticData, own: Tensor | None) -> None:
        """Take the set as an outer step has left it, and the mean of `OuterStep.own` over processes and inner runs."""

    def end_epoch(self, accuracy: float) -> None:
        """Take the mean accuracy, in percent, of the epoch's outer steps."""

    def metrics(self) -> Mapping[str, float]:
        """Numbers of the present choices, to be logged."""
        return {}

    def media(self) -> Mapping[str, MediaItem]:
        """Pictures of the present choices, by name."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State that decides later steps."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""


@dataclass
class FixedSet(Distiller):
    """Leave the set as it starts: the baselines of real images (``start: random`` or ``herding``)."""

    def outer_step(self, data: SyntheticData, image: Tensor, label: Tensor, seed: int) -> OuterStep:
        zero = image.new_zeros(())
        return OuterStep(torch.zeros_like(data.images), None, zero, zero)


def fresh_network(make: NetworkFactory, seed: int, device: torch.device) -> nn.Module:
    """A network whose initialisation follows from `seed` alone, on any device."""
    with isolated_rng(seed):
        return make()._apply(lambda value: to_device(value, device))  # `to` would wait for each tensor's copy


@dataclass
class TruncatedBPTT(Distiller):
    """Differentiate the real-data loss of a freshly trained network through a window of its training on the set.

    Each outer step trains a fresh network: up to the window's start without a graph, then through the window. The
    selector says where it lies: BPTT, T-BPTT, RaT-BPTT, AT-BPTT.

    Args:
        inner_steps: T, inner training steps at most; 200 in the paper for CIFAR.
        selector: where the window lies; AdaptiveWindow (AT-BPTT) by default.
        engine: how the window is differentiated; Adjoint with the exact Hessian by default.
        inner_optimizer: how the inner network is trained; Adam with lr 1e-3 in the paper.
        classes_per_batch: classes in an inner mini-batch, null for all.
        images_per_class: synthetic images of each class in an inner mini-batch, null for all.
        augment: augmentation of the set in inner steps, a name of leanlight.ops.differentiable, null for none.
        outer_augment: augmentation of real batches, a name as for augment.
        weight_by_p: weigh the window's steps by P_trunc(i), as Eq. 13 does and no published code.
        outer_chunk: real images at a time in the outer loss, for less memory and the same gradient; null for all.
    """

    inner_steps: PositiveInt = 200
    selector: WindowSelector | None = None
    engine: GradientEngine | None = None
    inner_optimizer: InnerOptimizer = field(default_factory=InnerOptimizer)
    classes_per_batch: PositiveInt | None = None
    images_per_class: PositiveInt | None = None
    augment: str | None = "flip_rotate"
    outer_augment: str | None = "flip_rotate"
    weight_by_p: bool = False
    outer_chunk: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.inner_steps < 1:
            raise UserError(f"inner_steps: expected at least 1, got {self.inner_steps}")
        if self.outer_chunk is not None and self.outer_chunk < 1:
            raise UserError(f"outer_chunk: expected at least 1 or null, got {self.outer_chunk}")
        self.window_selector, self.gradient_engine = self.selector or AdaptiveWindow(), self.engine or Adjoint()
        if self.weight_by_p and not isinstance(self.window_selector, AdaptiveWindow):
            raise UserError("weight_by_p: needs selector AdaptiveWindow, which defines P(t)")
        self._task: Task | None = None
        self._window: Window | None = None
        self._norms: Tensor | None = None
        self.augmentation = find_augmentation(self.augment, "augment")
        self.outer_augmentation = find_augmentation(self.outer_augment, "outer_augment")

    def prepare(self, task: Task) -> None:
        self._task = task
        self._network(0, torch.device("cpu"))  # refuses those that cannot be differentiated twice
        self.window_selector.prepare(self.inner_steps, task.epochs)
        self.gradient_engine.prepare(task.device)
        self._sampler = BatchSampler(task.num_classes, task.ipc, self.classes_per_batch, self.images_per_class)

    def _network(self, seed: int, device: torch.device) -> FlatNetwork:
        assert self._task is not None
        return FlatNetwork(twice_differentiable(fresh_network(self._task.network, seed, device)))

    def inner_run(
        self, steps: int, seed: int, generator: torch.Generator, device: torch.device
    ) -> tuple[FlatNetwork, list[InnerBatch]]:
        """A fresh network and its mini-batches for so many steps; seed: of the network, generator: of the rest."""
        return self._network(seed, device), self._sampler.draw(steps, generator, device)

    def start_epoch(self, data: SyntheticData, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.choose(self._probe(data, seed, generator) if self.needs_norms else None, generator)

    @property
    def needs_norms(self) -> bool:
        """Whether the next `choose` wants the inner gradient norms of a probe run."""
        return self.window_selector.needs_norms or self.weight_by_p

    def choose(self, norms: Tensor | None, generator: torch.Generator) -> None:
        """Choose the epoch's window; norms: (T,) on the CPU where `needs_norms`."""
        self._norms, self._window = norms, self.window_selector.select(self.inner_steps, norms, generator)

    def _probe(self, data: SyntheticData, seed: int, generator: torch.Generator) -> Tensor:
        """Inner gradient norms (T,) of a throw-away run, on the CPU."""
        network, batches = self.inner_run(self.inner_steps, seed, generator, data.images.device)
        problem = InnerProblem(network, self.inner_optimizer, self.augmentation)
        state = self.inner_optimizer.start(network.parameters())
        return torch.stack([norm for _, norm in self.gradient_engine.train(problem, state, data, batches)]).cpu()

    @property
    def choice(self) -> Any:
        window = None if self._window is None else [self._window.start, self._window.length]
        return {"window": window, "norms": self._norms}

    @choice.setter
    def choice(self, value: Any) -> None:
        self._window = None if value["window"] is None else Window(*value["window"])
        self._norms = value["norms"]

    def outer_step(self, data: SyntheticData, image: Tensor, label: Tensor, seed: int) -> OuterStep:
        assert self._task is not None
        generator = torch.Generator().manual_seed(seed)
        window = self.next_window(generator)
        network, batches = self.inner_run(window.end, seed, generator, data.images.device)
        problem = InnerProblem(network, self.inner_optimizer, self.augmentation)
        state = self.inner_optimizer.start(network.parameters())
        for state, _ in self.gradient_engine.train(problem, state, data, batches[: window.start]):  # noqa: B007, B020
            pass
        if self.outer_augmentation is not None:
            image = self.outer_augmentation(image, generator)
        outer_loss = RealLoss(network, image, label, self.outer_chunk)
        result = self.gradient_engine.meta_gradient(
            problem, state, data, batches[window.start :], outer_loss, self._task.learn_labels, self.weights(window)
        )
        return OuterStep(result.images, result.labels, outer_loss.loss, outer_loss.accuracy)

    def next_window(self, generator: torch.Generator) -> Window:
        """That of the next outer step: the epoch's, or one drawn for this step where the selector does that."""
        if self.window_selector.redraws:
            self._window = self.window_selector.select(self.inner_steps, self._norms, generator)
        assert self._window is not None
        return self._window

    def weights(self, window: Window) -> Tensor | None:
        """(length,) P_trunc(i) of the window's steps with `weight_by_p`, else None."""
        if not self.weight_by_p:
            return None
        assert isinstance(self.window_selector, AdaptiveWindow)
        assert self._norms is not None
        return self.window_selector.probabilities(self._norms)[window.start : window.end].float()

    def end_epoch(self, accuracy: float) -> None:
        self.window_selector.end_epoch(accuracy)

    def metrics(self) -> Mapping[str, float]:
        window = self._window
        assert window is not None
        return {
            "window_start": float(window.start),
            "window_length": float(window.length),
            **self.window_selector.metrics(),
        }

    def media(self) -> Mapping[str, MediaItem]:
        return {} if self._norms is None else {"inner_gradient_norm": gradient_norm_curve(self._norms)}

    def state_dict(self) -> dict[str, Any]:
        return {"selector": self.window_selector.state_dict(), "engine": self.gradient_engine.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.window_selector.load_state_dict(state["selector"])
        self.gradient_engine.load_state_dict(state["engine"])


@dataclass
class DistributionMatching(Distiller):
    """DM (Zhao & Bilen 2023): match the mean embedding of each class under fresh random networks.

    The embedding is what the network's last linear layer sees.

    Args:
        augment: apply the same random augmentation (DSA) to the real and the synthetic images of a class.
    """

    augment: bool = True

    def __post_init__(self) -> None:
        self._task: Task | None = None

    def prepare(self, task: Task) -> None:
        if task.learn_labels:
            raise UserError("learn_labels: distribution matching has no gradient for labels; use false")
        with isolated_rng():
            require_features(task.network())
        self._task = task

    def outer_step(self, data: SyntheticData, image: Tensor, label: Tensor, seed: int) -> OuterStep:
        assert self._task is not None
        embed = functools.partial(pooled_features, fresh_network(self._task.network, seed, image.device))
        leaf = data.images.detach().requires_grad_()
        real, synthetic = image, leaf
        if self.augment:
            real, synthetic = (siamese_dsa(x, torch.Generator().manual_seed(seed)) for x in (image, leaf))
        classes, ipc = self._task.num_classes, self._task.ipc
        with torch.no_grad():
            member = F.one_hot(label, classes).float()
            counts = member.sum(0).unsqueeze(1)
            real_mean = member.T @ embed(real) / counts.clamp(min=1)
        synthetic_mean = embed(synthetic).view(classes, ipc, -1).mean(1)
        # A class that this batch lacks has no real mean to match.
        loss = ((synthetic_mean - real_mean).square().sum(1) * (counts.squeeze(1) > 0)).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        return OuterStep(gradient, None, loss.detach(), loss.new_zeros(()))
