"""MTT and DATM: a set on which a network goes, in a few steps, the way that it goes in epochs on real data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import NetworkFactory, UserError, derived_seed, isolated_rng, to_device
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Share
from leanlight.ops.differentiable import find_augmentation
from lit_modules.at_bptt.difficulty import DifficultyAlignment, mean_logits, rightly_labelled
from lit_modules.at_bptt.distillers import Distiller, OuterStep, Study, Task, fresh_network
from lit_modules.at_bptt.inner import FlatNetwork, SyntheticData
from lit_modules.at_bptt.studied import make_once
from lit_modules.classifier.training import LabelledImages, Recipe, train


def trajectory_loss(end: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Squared distance to the expert's parameters, over that which the expert has gone (Cazenavette et al. 2022).

    Args:
        end: (P,) parameters after the steps on the set.
        start: (P,) parameters before them, those of the expert.
        target: (P,) parameters of the expert some epochs later.
    """
    return (end - target).square().sum() / (start - target).square().sum()


class Experts:
    """Parameters of networks after each epoch of their training on real data, a file a network.

    Which they are follows from seed, recipe, network and data: one whose file is gone is trained again, the same.

    Args:
        folder: of the files.
        seed: of the first; the others follow from it.
        recipe: how they train.
    """

    def __init__(self, folder: Path, seed: int, recipe: Recipe) -> None:
        self.folder, self.seed, self.recipe = folder, seed, recipe

    def _path(self, number: int) -> Path:
        return self.folder / f"expert_{number:03d}.safetensors"

    def make(self, number: int, factory: NetworkFactory, real: LabelledImages) -> None:
        """Train one, unless its file is there; leaves random states alone.

        Args:
            number: which.
            factory: makes the network.
            real: images (N, C, H, W), preprocessed, and labels (N,), on the device to train on.
        """
        seed, device = derived_seed(self.seed, "expert", number), real[0].device
        facts = f"{seed} {self.recipe} {fresh_network(factory, 0, torch.device('cpu'))} {len(real[0])}"

        def passed() -> dict[str, Tensor]:
            with isolated_rng(seed), torch.inference_mode(False), torch.enable_grad():
                network = factory().to(device)
                theta = [FlatNetwork(network).parameters()]
                train(network, real, self.recipe, lambda epoch: theta.append(FlatNetwork(network).parameters()))
            return {"theta": torch.stack(theta)}

        make_once(self._path(number), facts, passed)

    def after(self, number: int, epochs: Sequence[int], device: torch.device) -> list[Tensor]:
        """The parameters (P,) of one of them after these numbers of epochs; no more is read."""
        from safetensors import safe_open

        with safe_open(self._path(number), "pt") as file:
            theta = file.get_slice("theta")
            return [to_device(theta[epoch : epoch + 1].squeeze(0), device) for epoch in epochs]


@dataclass
class TrajectoryMatching(Distiller):
    """MTT (Cazenavette et al. 2022): from a point of an expert's way, steps on the set lead to where epochs led it.

    Experts are trained when the run begins, and lie in its folder. The learning rate of the steps is learned, too.

    Args:
        experts: networks trained on real data.
        recipe: how they train: SGD, 50 epochs in the paper.
        steps: N, steps on the set in an outer step.
        expert_epochs: M, epochs of the expert in the same time.
        max_start: T+, epochs that an expert has behind it at most where the steps begin.
        lr: alpha, first learning rate of the steps.
        lr_rate: learning rate, by SGD, of that learning rate.
        lr_momentum: of that SGD.
        batch_size: images of the set in a step, null for all.
        augment: augmentation of the set in the steps, a name of leanlight.ops.differentiable, null for none.
        alignment: what makes it DATM (Guo et al. 2024), null for MTT.
    """

    studies = True

    experts: PositiveInt = 100
    recipe: Recipe = field(default_factory=lambda: Recipe(50, 256, 0.01, "sgd", momentum=0.0, augment="dsa"))
    steps: PositiveInt = 20
    expert_epochs: PositiveInt = 3
    max_start: PositiveInt = 20
    lr: PositiveFloat = 0.01
    lr_rate: NonNegativeFloat = 1e-5
    lr_momentum: Share = 0.5
    batch_size: PositiveInt | None = None
    augment: str | None = "dsa"
    alignment: DifficultyAlignment | None = None

    def __post_init__(self) -> None:
        if self.max_start + self.expert_epochs > self.recipe.epochs:
            raise UserError(
                f"max_start: expected at most {self.recipe.epochs - self.expert_epochs}, recipe.epochs less "
                f"expert_epochs; got {self.max_start}"
            )
        if self.alignment is not None:
            self.alignment.check(self.max_start, self.recipe.epochs)
        self.augmentation = find_augmentation(self.augment, "augment")
        self._task: Task | None = None
        self._experts: Experts | None = None
        self._network: FlatNetwork | None = None
        self._shown = self.lr  # the rate where this epoch began: to show each new one would wait for the device
        self._forget()

    def _forget(self) -> None:
        self._rate, self._velocity = torch.tensor(self.lr), torch.tensor(0.0)
        self._logits, self._logits_velocity = torch.empty(0), torch.tensor(0.0)  # of labels; of DATM alone
        self._outer_steps = 0

    def prepare(self, task: Task) -> None:
        if task.learn_labels and self.alignment is not None:
            raise UserError("learn_labels: with an alignment labels are learned as logits; use false")
        self._task = task
        self._forget()
        self._network = FlatNetwork(fresh_network(task.network, 0, task.device))  # a form for parameters alone

    def study(self, study: Study) -> None:
        assert self._task is not None
        self._experts = Experts(study.folder / "experts", study.seed, self.recipe)
        for number in range(study.rank, self.experts, study.world):
            self._experts.make(number, self._task.network, study.real)
            study.tell(f"expert {number + 1} of {self.experts} is there")

    def first_set(self, data: SyntheticData, study: Study) -> None:
        """With an alignment: real images that an expert labels right, and labels that are what experts say."""
        if self.alignment is None:
            return
        assert self._task is not None
        classes, ipc, device = self._task.num_classes, self._task.ipc, data.images.device
        if self.alignment.choose_images:
            generator = torch.Generator().manual_seed(derived_seed(study.seed, "images"))
            chosen = rightly_labelled(self._predict, self.experts, study.real, classes, ipc, generator)
            data.images.copy_(study.real[0][chosen])
        labels = torch.arange(classes, device=device).repeat_interleave(ipc)
        self._logits = mean_logits((self._predict(number, data.images) for number in range(self.experts)), labels)
        data.labels.copy_(self._logits.softmax(1))

    def _predict(self, number: int, images: Tensor) -> Tensor:
        """Logits (N, K) of an expert."""
        assert self._experts is not None
        assert self._network is not None
        assert self.alignment is not None
        epoch = self.alignment.label_epoch or self.recipe.epochs
        (theta,) = self._experts.after(number, [epoch], images.device)
        with torch.no_grad():
            return torch.cat([self._network(theta, part) for part in images.split(self.recipe.batch_size)])

    def start_epoch(self, data: SyntheticData, seed: int) -> None:
        self._shown = float(self._rate)

    @property
    def choice(self) -> Any:
        return self._shown

    @choice.setter
    def choice(self, value: Any) -> None:
        self._shown = value

    def outer_step(self, data: SyntheticData, image: Tensor, label: Tensor, seed: int) -> OuterStep:
        assert self._task is not None
        assert self._experts is not None
        generator, device = torch.Generator().manual_seed(seed), data.images.device
        expert = int(torch.randint(self.experts, (), generator=generator))
        first = 0 if self.alignment is None else self.alignment.min_start
        begin = int(torch.randint(first, self._last_start + 1, (), generator=generator))
        start, target = self._experts.after(expert, (begin, begin + self.expert_epochs), device)
        images = data.images.detach().requires_grad_()
        rate = to_device(self._rate, device).clone().requires_grad_()
        if self.alignment is None:
            given = labels = data.labels.detach().requires_grad_(self._task.learn_labels)
        else:
            given = to_device(self._logits, device).detach().requires_grad_()
            labels = given.softmax(1)
        loss = trajectory_loss(self.student(SyntheticData(images, labels), start, rate, generator), start, target)
        learned = [images, rate, given] if given.requires_grad else [images, rate]
        gradients = list(torch.autograd.grad(loss, learned))
        if self.alignment is None:
            own, of_labels = gradients[1].reshape(1), gradients[2] if self._task.learn_labels else None
        else:
            follows = loss <= self.alignment.threshold
            gradients = [torch.where(follows, gradient, 0.0) for gradient in gradients]
            own, of_labels = torch.cat([gradients[1].reshape(1), gradients[2].flatten()]), None
        return OuterStep(gradients[0], of_labels, loss.detach(), loss.new_zeros(()), own)

    @property
    def _last_start(self) -> int:
        alignment = self.alignment
        return self.max_start if alignment is None else alignment.latest_start(self._outer_steps, self.max_start)

    def student(self, data: SyntheticData, theta: Tensor, rate: Tensor, generator: torch.Generator) -> Tensor:
        """theta (P,) after `steps` steps of SGD on the set, with their graph."""
        assert self._network is not None
        count, device = len(data.images), data.images.device
        size = min(self.batch_size or count, count)
        passes = -(-self.steps // -(-count // size))
        batches = [part for _ in range(passes) for part in torch.randperm(count, generator=generator).split(size)]
        theta = theta.requires_grad_()
        for index in batches[: self.steps]:
            index = to_device(index, device)
            images = data.images[index]
            if self.augmentation is not None:
                images = self.augmentation(images, generator)
            loss = F.cross_entropy(self._network(theta, images), data.labels[index])
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            theta = theta - rate * gradient
        return theta

    def updated(self, data: SyntheticData, own: Tensor | None) -> None:
        """Take a step of the learning rate and, with an alignment, of the labels."""
        assert own is not None
        rate, logits = own[0], own[1:]
        self._rate, self._velocity = sgd_step(self._rate, self._velocity, rate, self.lr_rate, self.lr_momentum)
        if self.alignment is not None:
            lr, momentum = self.alignment.label_rate, self.alignment.label_momentum
            gradient = logits.view_as(data.labels)
            self._logits, self._logits_velocity = sgd_step(self._logits, self._logits_velocity, gradient, lr, momentum)
            data.labels.copy_(self._logits.softmax(1))
        self._outer_steps += 1

    def metrics(self) -> Mapping[str, float]:
        return {"inner_lr": self._shown} | ({"max_start": float(self._last_start)} if self.alignment else {})

    def state_dict(self) -> dict[str, Any]:
        state = {"rate": self._rate, "velocity": self._velocity}
        if self.alignment is None:
            return state
        labels = {"logits": self._logits, "logits_velocity": self._logits_velocity}
        return state | labels | {"outer_steps": self._outer_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rate, self._velocity = state["rate"], state["velocity"]
        if self.alignment is not None:
            self._logits, self._logits_velocity = state["logits"], state["logits_velocity"]
            self._outer_steps = state["outer_steps"]


def sgd_step(value: Tensor, velocity: Tensor, gradient: Tensor, lr: float, momentum: float) -> tuple[Tensor, Tensor]:
    """A value and its velocity after a step of SGD with momentum, on the device of the gradient."""
    velocity = momentum * velocity.to(gradient.device) + gradient
    return value.to(gradient.device) - lr * velocity, velocity
