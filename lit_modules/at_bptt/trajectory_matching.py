"""MTT: a set on which a network goes, in a few steps, the way that it goes in epochs on real data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import NetworkFactory, UserError, atomic_path, derived_seed, isolated_rng, to_device
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Share
from leanlight.ops.differentiable import find_augmentation
from lit_modules.at_bptt.distillers import Distiller, OuterStep, Study, Task, fresh_network
from lit_modules.at_bptt.inner import FlatNetwork, SyntheticData
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
        from safetensors import safe_open
        from safetensors.torch import save_file

        seed, path, device = derived_seed(self.seed, "expert", number), self._path(number), real[0].device
        facts = f"{seed} {self.recipe} {fresh_network(factory, 0, torch.device('cpu'))} {len(real[0])}"
        made_of = {"made_of": hashlib.sha256(facts.encode()).hexdigest()}
        if path.is_file():
            with safe_open(path, "pt") as file:
                if file.metadata() == made_of:
                    return
        with isolated_rng(seed), torch.inference_mode(False), torch.enable_grad():
            network = factory().to(device)
            passed = [FlatNetwork(network).parameters()]
            train(network, real, self.recipe, lambda epoch: passed.append(FlatNetwork(network).parameters()))
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as part:
            save_file({"theta": torch.stack(passed).cpu()}, part, metadata=made_of)

    def after(self, number: int, epochs: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The parameters (P,) of one of them after two numbers of epochs; no more than these is read."""
        from safetensors import safe_open

        with safe_open(self._path(number), "pt") as file:
            theta = file.get_slice("theta")
            first, second = (to_device(theta[epoch : epoch + 1].squeeze(0), device) for epoch in epochs)
        return first, second


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

    def __post_init__(self) -> None:
        if self.max_start + self.expert_epochs > self.recipe.epochs:
            raise UserError(
                f"max_start: expected at most {self.recipe.epochs - self.expert_epochs}, recipe.epochs less "
                f"expert_epochs; got {self.max_start}"
            )
        self.augmentation = find_augmentation(self.augment, "augment")
        self._task: Task | None = None
        self._experts: Experts | None = None
        self._network: FlatNetwork | None = None
        self._rate, self._velocity = torch.tensor(self.lr), torch.tensor(0.0)
        self._shown = self.lr  # the rate where this epoch began: to show each new one would wait for the device

    def prepare(self, task: Task) -> None:
        self._task = task
        self._rate, self._velocity = torch.tensor(self.lr), torch.tensor(0.0)
        self._network = FlatNetwork(fresh_network(task.network, 0, task.device))  # a form for parameters alone

    def study(self, study: Study) -> None:
        assert self._task is not None
        self._experts = Experts(study.folder / "experts", study.seed, self.recipe)
        for number in range(study.rank, self.experts, study.world):
            self._experts.make(number, self._task.network, study.real)
            study.tell(f"expert {number + 1} of {self.experts} is there")

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
        expert, begin = (
            int(torch.randint(limit, (), generator=generator)) for limit in (self.experts, self.max_start + 1)
        )
        start, target = self._experts.after(expert, (begin, begin + self.expert_epochs), device)
        images = data.images.detach().requires_grad_()
        labels = data.labels.detach().requires_grad_(self._task.learn_labels)
        rate = to_device(self._rate, device).clone().requires_grad_()
        loss = trajectory_loss(self.student(SyntheticData(images, labels), start, rate, generator), start, target)
        learned = [images, rate, labels] if self._task.learn_labels else [images, rate]
        gradients = torch.autograd.grad(loss, learned)
        of_labels = gradients[2] if self._task.learn_labels else None
        return OuterStep(gradients[0], of_labels, loss.detach(), loss.new_zeros(()), gradients[1].reshape(1))

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
        """Take a step of the learning rate."""
        assert own is not None
        self._velocity = self.lr_momentum * self._velocity.to(own.device) + own.squeeze(0)
        self._rate = self._rate.to(own.device) - self.lr_rate * self._velocity

    def metrics(self) -> Mapping[str, float]:
        return {"inner_lr": self._shown}

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self._rate, "velocity": self._velocity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rate, self._velocity = state["rate"], state["velocity"]
