"""SRe2L: a set for which the batch norms of a network trained on real data see what they remember of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import NetworkFactory, UserError, derived_seed, isolated_rng, to_device
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from leanlight.ops.differentiable import DIFFERENTIABLE, find_augmentation
from lit_modules.at_bptt.distillers import Distiller, OuterStep, Study, Task, fresh_network
from lit_modules.at_bptt.inner import SyntheticData
from lit_modules.at_bptt.studied import make_once
from lit_modules.classifier.training import Recipe, accuracy, train
from lit_modules.nn.batch_statistics import batch_norms, bn_distances, look
from lit_modules.nn.checks import blank_output


@dataclass
class SqueezeRecoverRelabel(Distiller):
    """SRe2L (Yin, Xing & Shen 2023): a network learns all real images; the set is made from the network alone.

    When the run begins, a teacher with batch norm trains on the real images (squeeze). An outer step descends on its
    cross entropy for random crops of the set and on the distance of their statistics to those of its batch norms
    (recover). After it images are brought back into the range of real ones, and labels are what the teacher says of
    them (relabel).

    Args:
        teacher: makes the network that learns the real images; with batch norm.
        recipe: how it trains.
        bn_weight: alpha, of the statistics' distances, beside 1 of cross entropy; 0.01 in published code.
        first_bn_factor: further factor of the first batch norm's distance; 10 in published code.
        together: images whose statistics are one, as many of each class as can be; null for all of the set.
        augment: of the set in an outer step, a differentiable augmentation, null for none.
        soft_labels: relabel; else labels stay one-hot.
    """

    studies = True

    teacher: NetworkFactory | None = None
    recipe: Recipe = field(default_factory=lambda: Recipe(20, 128, 0.1, "sgd", weight_decay=5e-4, schedule="cosine"))
    bn_weight: NonNegativeFloat = 0.01
    first_bn_factor: PositiveFloat = 10.0
    together: PositiveInt | None = 100
    augment: str | None = "flip_then_resized_crop"
    soft_labels: bool = True

    def __post_init__(self) -> None:
        self.augmentation = find_augmentation(self.augment, "augment", DIFFERENTIABLE)
        self._task: Task | None = None
        self._path: Path | None = None
        self._network: nn.Module | None = None
        self._low, self._high = torch.tensor(-torch.inf), torch.tensor(torch.inf)

    def prepare(self, task: Task) -> None:
        if task.learn_labels:
            raise UserError("learn_labels: labels are what the teacher says of images; use false")
        if self.teacher is None:
            raise UserError("teacher: expected a network with batch norm, got null")
        if not batch_norms(network := fresh_network(self.teacher, 0, torch.device("cpu"))):
            raise UserError(f"teacher: expected a network with batch norm, got a {type(network).__name__} without")
        self._task, self._network = task, None

    def study(self, study: Study) -> None:
        """Train the teacher, on one process, unless the run's folder holds it; take the range of real images."""
        assert self._task is not None
        assert self.teacher is not None
        images, labels = study.real
        network, classes = fresh_network(self.teacher, 0, torch.device("cpu")), self._task.num_classes
        if (given := blank_output(network, tuple(images.shape[1:]), "teacher").shape[1]) != classes:
            raise UserError(f"teacher: expected one of {classes} classes, those of the data; got {given}")
        self._path, self._network = study.folder / "teacher.safetensors", None
        low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
        self._low, self._high = low.view(-1, 1, 1), high.view(-1, 1, 1)
        seed = derived_seed(study.seed, "teacher")

        def trained() -> dict[str, Tensor]:
            study.tell(f"the teacher trains for {self.recipe.epochs} epochs on {len(images):,} images")
            assert self.teacher is not None
            with isolated_rng(seed), torch.inference_mode(False), torch.enable_grad():
                network = train(self.teacher().to(images.device), study.real, self.recipe)
            study.tell(f"the teacher labels {accuracy(network, study.real):.1%} of them right")
            return dict(network.state_dict())

        if study.rank == 0:
            make_once(self._path, f"{seed} {self.recipe} {network} {len(labels)}", trained)

    def _teacher(self, device: torch.device) -> nn.Module:
        """The trained network, in evaluation mode and without gradients of its own."""
        if self._network is None:
            from safetensors.torch import load_file

            assert self.teacher is not None
            assert self._path is not None
            network = fresh_network(self.teacher, 0, torch.device("cpu"))
            network.load_state_dict(load_file(self._path))
            self._network = network.eval().requires_grad_(False)._apply(lambda value: to_device(value, device))
        return self._network

    def outer_step(self, data: SyntheticData, image: Tensor, label: Tensor, seed: int) -> OuterStep:
        assert self._task is not None
        generator, device = torch.Generator().manual_seed(seed), data.images.device
        teacher, gradients, losses = self._teacher(device), torch.zeros_like(data.images), []
        for group in self._groups(device):
            leaf = data.images[group].requires_grad_()
            logits, seen = look(teacher, leaf if self.augmentation is None else self.augmentation(leaf, generator))
            first, *others = bn_distances(seen)
            distance = torch.stack([self.first_bn_factor * first, *others]).sum()
            loss = F.cross_entropy(logits, group // self._task.ipc) + self.bn_weight * distance
            (gradients[group],) = torch.autograd.grad(loss, leaf)
            losses.append(loss.detach())
        return OuterStep(gradients, None, torch.stack(losses).mean(), gradients.new_zeros(()))

    def _groups(self, device: torch.device) -> tuple[Tensor, ...]:
        """Positions of images whose statistics are one: the first image of every class, then the second, …"""
        assert self._task is not None
        classes, ipc = self._task.num_classes, self._task.ipc
        order = torch.arange(classes * ipc, device=device).view(classes, ipc).T.flatten()
        return order.split(self.together or len(order))

    @torch.no_grad()
    def updated(self, data: SyntheticData, own: Tensor | None) -> None:
        data.images.copy_(data.images.clamp(self._low, self._high))
        if self.soft_labels:
            teacher = self._teacher(data.images.device)
            data.labels.copy_(torch.cat([teacher(part).softmax(1) for part in data.images.split(512)]))
