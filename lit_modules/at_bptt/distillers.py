"""What an outer step computes: the meta-gradient of unrolled training, or the gradient of distribution matching."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import MediaItem, NetworkFactory, UserError, isolated_rng
from leanlight.ops.differentiable import find_augmentation, siamese_dsa
from lit_modules.at_bptt.engines import Adjoint, GradientEngine
from lit_modules.at_bptt.inner import (
    BatchSampler,
    FlatNetwork,
    InnerOptimizer,
    InnerProblem,
    SyntheticData,
)
from lit_modules.at_bptt.windows import AdaptiveWindow, Window, WindowSelector


@dataclass(frozen=True)
class OuterStep:
    """images, labels: gradients shaped as the set; labels None where they are fixed. loss, accuracy: scalar tensors."""

    images: Tensor
    labels: Tensor | None
    loss: Tensor
    accuracy: Tensor


@dataclass(frozen=True)
class Setting:
    """What a distiller may know beside the set.

    network: makes a fresh one. epochs: outer epochs. learn_labels: whether labels want a gradient.
    """

    network: NetworkFactory
    num_classes: int
    ipc: int
    epochs: int
    learn_labels: bool


class Distiller:
    """Base: one call of `outer_step` a real batch, one of `start_epoch` before an epoch's first."""

    def prepare(self, setting: Setting) -> None:
        """Hear the setting; UserError when it does not fit."""

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
        """Gradients of one outer step. image (N, C, H, W), preprocessed; label (N,). seed decides all that is drawn."""
        raise NotImplementedError

    def end_epoch(self, accuracy: float) -> None:
        """Hear the mean accuracy, in percent, of the epoch's outer steps."""

    def facts(self) -> Mapping[str, float]:
        """Numbers to log at the start of an epoch."""
        return {}

    def media(self) -> Mapping[str, MediaItem]:
        """Pictures of the present choices."""
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


def fresh_network(setting: Setting, seed: int, device: torch.device) -> nn.Module:
    """A network whose initialisation follows from `seed` alone, on any device."""
    with isolated_rng(seed):
        return setting.network().to(device)


@dataclass
class TruncatedBPTT(Distiller):
    """Differentiate the real-data loss of a freshly trained network through a window of its training on the set.

    Fresh network each outer step, `inner_steps` at most: up to the window's start without a graph, then the window. The
    selector says where it lies (BPTT, T-BPTT, RaT-BPTT, AT-BPTT; the last by default), the engine how it is
    differentiated (`Adjoint` by default). augment: on the
    set in inner steps; outer_augment: on real batches; names of `leanlight.contracts`. weight_by_p: weigh the window's
    steps by P_trunc(i) as Eq. 13 does (no published code does).
    """

    inner_steps: int = 200
    selector: WindowSelector | None = None
    engine: GradientEngine | None = None
    inner_optimizer: InnerOptimizer = field(default_factory=InnerOptimizer)
    classes_per_batch: int | None = None
    images_per_class: int | None = None
    augment: str | None = "flip_rotate"
    outer_augment: str | None = "flip_rotate"
    weight_by_p: bool = False

    def __post_init__(self) -> None:
        if self.inner_steps < 1:
            raise UserError(f"distiller.init_args.inner_steps: expected at least 1, got {self.inner_steps}")
        self._selector, self._engine = self.selector or AdaptiveWindow(), self.engine or Adjoint()
        if self.weight_by_p and not isinstance(self._selector, AdaptiveWindow):
            raise UserError("distiller.init_args.weight_by_p: needs selector AdaptiveWindow, which defines P(t)")
        self._setting: Setting | None = None
        self._window: Window | None = None
        self._norms: Tensor | None = None
        self._augment = find_augmentation(self.augment, "distiller.init_args.augment")
        self._outer_augment = find_augmentation(self.outer_augment, "distiller.init_args.outer_augment")

    def prepare(self, setting: Setting) -> None:
        self._setting = setting
        self._problem(0, torch.device("cpu"))  # refuses networks that cannot be differentiated twice
        self._selector.prepare(self.inner_steps, setting.epochs)
        self._sampler = BatchSampler(setting.num_classes, setting.ipc, self.classes_per_batch, self.images_per_class)

    def _problem(self, seed: int, device: torch.device) -> InnerProblem:
        assert self._setting is not None
        network = FlatNetwork(fresh_network(self._setting, seed, device))
        return InnerProblem(network, self.inner_optimizer, self._augment)

    def start_epoch(self, data: SyntheticData, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._norms = None
        if self._selector.needs_norms or self.weight_by_p:
            self._norms = self._probe(data, seed, generator)
        self._window = self._selector.select(self.inner_steps, self._norms, generator)

    def _probe(self, data: SyntheticData, seed: int, generator: torch.Generator) -> Tensor:
        """Inner gradient norms (T,) of a throw-away run, on the CPU."""
        device = data.images.device
        problem = self._problem(seed, device)
        batches = self._sampler.draw(self.inner_steps, generator, device)
        state = self.inner_optimizer.start(problem.network.parameters())
        return torch.stack([norm for _, norm in problem.train(state, data, batches)]).cpu()

    @property
    def choice(self) -> Any:
        window = None if self._window is None else [self._window.start, self._window.length]
        return {"window": window, "norms": self._norms}

    @choice.setter
    def choice(self, value: Any) -> None:
        self._window = None if value["window"] is None else Window(*value["window"])
        self._norms = value["norms"]

    def outer_step(self, data: SyntheticData, image: Tensor, label: Tensor, seed: int) -> OuterStep:
        window, device = self._window, data.images.device
        assert window is not None
        assert self._setting is not None
        generator = torch.Generator().manual_seed(seed)
        problem = self._problem(seed, device)
        batches = self._sampler.draw(window.end, generator, device)
        state = self.inner_optimizer.start(problem.network.parameters())
        state = problem.trained(state, data, batches[: window.start])
        if self._outer_augment is not None:
            image = self._outer_augment(image, generator)
        logits: list[Tensor] = []

        def outer_loss(theta: Tensor) -> Tensor:
            logits[:] = [problem.network(theta, image)]
            return F.cross_entropy(logits[0], label)

        result = self._engine.meta_gradient(
            problem, state, data, batches[window.start :], outer_loss, self._setting.learn_labels, self._weights(window)
        )
        right = (logits[0].detach().argmax(1) == label).float().mean()
        return OuterStep(result.images, result.labels, result.loss, right)

    def _weights(self, window: Window) -> Tensor | None:
        if not self.weight_by_p:
            return None
        assert isinstance(self._selector, AdaptiveWindow)
        assert self._norms is not None
        return self._selector.probabilities(self._norms)[window.start : window.end].float()

    def end_epoch(self, accuracy: float) -> None:
        self._selector.end_epoch(accuracy)

    def facts(self) -> Mapping[str, float]:
        window = self._window
        assert window is not None
        return {"window_start": float(window.start), "window_length": float(window.length), **self._selector.facts()}

    @property
    def norms(self) -> Tensor | None:
        """n_t of this epoch's probe, (T,), or None without one."""
        return self._norms

    def state_dict(self) -> dict[str, Any]:
        return {"selector": self._selector.state_dict(), "engine": self._engine.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._selector.load_state_dict(state["selector"])
        self._engine.load_state_dict(state["engine"])


@dataclass
class DistributionMatching(Distiller):
    """DM (Zhao & Bilen 2023): match the mean embedding of each class under fresh random networks.

    The embedding is what enters the network's last linear layer. augment: apply the same random augmentation (DSA) to
    the real and the synthetic images of a class.
    """

    augment: bool = True

    def __post_init__(self) -> None:
        self._setting: Setting | None = None

    def prepare(self, setting: Setting) -> None:
        if setting.learn_labels:
            raise UserError("model.init_args.learn_labels: distribution matching has no gradient for labels; use false")
        self._setting = setting

    def outer_step(self, data: SyntheticData, image: Tensor, label: Tensor, seed: int) -> OuterStep:
        assert self._setting is not None
        embed = _embedding(fresh_network(self._setting, seed, image.device))
        leaf = data.images.detach().requires_grad_()
        real, synthetic = image, leaf
        if self.augment:
            real, synthetic = (siamese_dsa(x, torch.Generator().manual_seed(seed)) for x in (image, leaf))
        classes, ipc = self._setting.num_classes, self._setting.ipc
        with torch.no_grad():
            member = F.one_hot(label, classes).float()
            counts = member.sum(0).unsqueeze(1)
            real_mean = member.T @ embed(real) / counts.clamp(min=1)
        synthetic_mean = embed(synthetic).view(classes, ipc, -1).mean(1)
        # A class that this batch lacks has no real mean to match.
        loss = ((synthetic_mean - real_mean).square().sum(1) * (counts.squeeze(1) > 0)).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        return OuterStep(gradient, None, loss.detach(), loss.new_zeros(()))


def _embedding(network: nn.Module) -> Callable[[Tensor], Tensor]:
    """The network up to its last linear layer."""
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError("model.init_args.network: distribution matching needs one that ends with a linear layer")
    kept: list[Tensor] = []
    linear[-1].register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))

    def embed(image: Tensor) -> Tensor:
        network(image)
        return kept.pop()

    return embed
