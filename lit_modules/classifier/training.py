"""Train fresh networks on images and score them without a Trainer: to evaluate distilled and selected data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import NetworkFactory, UserError, isolated_rng, to_device
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Share
from leanlight.ops.differentiable import find_augmentation
from lit_modules.classifier.losses import class_index

LabelledImages = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a fresh network is trained.

    Args:
        epochs: passes over the images.
        batch_size: images a step; fewer in the last one of a pass.
        lr: peak learning rate.
        optimizer: ``sgd`` (with `momentum`), ``adam`` or ``adamw``.
        momentum: of ``sgd``.
        weight_decay: of any optimiser.
        schedule: ``constant``, ``cosine`` (to 0, by steps) or ``halfway`` (a tenth after half; Zhao et al. 2021).
        augment: name of an augmentation, in `leanlight.ops.differentiable.ALL_AUGMENTATIONS`; none by default.
        label_smoothing: share of the label spread over all classes, in [0, 1).
    """

    epochs: PositiveInt = 20
    batch_size: PositiveInt = 128
    lr: PositiveFloat = 1e-3
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    momentum: Share = 0.9
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "cosine", "halfway"] = "constant"
    augment: str | None = None
    label_smoothing: Share = 0.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "lr"):
            if getattr(self, name) <= 0:
                raise UserError(f"recipe.{name}: expected a positive number, got {getattr(self, name)}")
        for name, valid in (("optimizer", ("sgd", "adam", "adamw")), ("schedule", ("constant", "cosine", "halfway"))):
            if getattr(self, name) not in valid:
                raise UserError(f"recipe.{name}: expected one of {valid}, got {getattr(self, name)!r}")
        find_augmentation(self.augment, "recipe.augment")

    def make_optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """Return the recipe's optimiser over all parameters of `network`."""
        parameters = network.parameters()
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, self.lr, weight_decay=self.weight_decay)

    def make_scheduler(self, optimizer: torch.optim.Optimizer, batches: int) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the recipe's schedule, to be stepped after each of `batches` batches an epoch."""
        steps = self.epochs * batches
        if self.schedule == "cosine":
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        milestones = [(self.epochs // 2 + 1) * batches] if self.schedule == "halfway" else []
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)


class Order(Protocol):
    """Which images an epoch goes through, and in what order."""

    @property
    def size(self) -> int:
        """Images of an epoch."""

    def positions(self, generator: torch.Generator | None = None) -> Tensor:
        """Positions (size,) of one epoch's images, on the CPU; drawn from the global random state by default."""


@dataclass(frozen=True)
class Shuffled:
    """All of `size` images, in a random order."""

    size: int

    def positions(self, generator: torch.Generator | None = None) -> Tensor:
        """See `Order`."""
        return torch.randperm(self.size, generator=generator)


def train(
    network: nn.Module,
    data: LabelledImages,
    recipe: Recipe,
    after_epoch: Callable[[int], None] | None = None,
    order: Order | None = None,
) -> nn.Module:
    """Train `network` in place on `data` and return it in evaluation mode.

    Draws from the global random state; every batch order and augmentation follows from it.

    Args:
        network: on the device of `data`.
        data: images (N, C, H, W), float in [0, 1] or uint8 in [0, 255], and labels, (N,) int64 or (N, K) soft.
        recipe: epochs, optimiser, schedule, augmentation.
        after_epoch: called with the number of epochs done.
        order: what each epoch goes through; all images, shuffled, by default.
    """
    images, labels = data
    order = order or Shuffled(len(images))
    augment = find_augmentation(recipe.augment, "recipe.augment")
    optimizer = recipe.make_optimizer(network)
    scheduler = recipe.make_scheduler(optimizer, batches=-(-order.size // recipe.batch_size))
    network.train()
    for epoch in range(1, recipe.epochs + 1):
        # The order is drawn on the CPU so that it does not depend on the device.
        for index in to_device(order.positions(), images.device).split(recipe.batch_size):
            image = _as_float(images[index])
            logits = network(augment(image, None) if augment else image)
            loss = F.cross_entropy(logits, labels[index], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
        if after_epoch:
            after_epoch(epoch)
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, data: LabelledImages, batch_size: int = 512) -> float:
    """Share of `data` that `network` labels right, in [0, 1]. Leaves it in evaluation mode.

    Args:
        network: images → logits.
        data: as in `train`.
        batch_size: images at once.
    """
    network.eval()
    images, labels = data
    right = torch.zeros((), dtype=torch.int64, device=images.device)
    for image, label in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        right += (network(_as_float(image)).argmax(1) == class_index(label)).sum()
    return right.item() / len(images)


def train_and_score(
    data: LabelledImages,
    factory: NetworkFactory,
    recipe: Recipe,
    seeds: Sequence[int],
    test_data: LabelledImages,
    device: torch.device | str = "cpu",
    on_scored: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train one fresh network a seed on `data` and return their accuracies on `test_data`, in the order of `seeds`.

    A score depends on its seed and the arguments alone, not on other seeds, so that seeds may be split over ranks.
    All random states are left as they were.

    Args:
        data: to train on, as in `train`, on any device.
        factory: makes a fresh network.
        recipe: how each is trained.
        seeds: one network each.
        test_data: to score on, as in `train`, on any device.
        device: where to train.
        on_scored: called with (seed, accuracy) after each network, for a progress bar.
    """
    data = (to_device(data[0], device), to_device(data[1], device))
    test_data = (to_device(test_data[0], device), to_device(test_data[1], device))
    scores = []
    for seed in seeds:
        # A callback may call this from a validation hook, where Lightning has gradients and version counting off.
        with isolated_rng(seed), torch.inference_mode(False), torch.enable_grad():
            network = train(factory().to(device), data, recipe)
            scores.append(accuracy(network, test_data))
        if on_scored:
            on_scored(seed, scores[-1])
    return scores


def _as_float(image: Tensor) -> Tensor:
    return image.float().div_(255) if image.dtype == torch.uint8 else image
