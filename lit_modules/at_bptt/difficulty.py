"""DATM: which stretch of an expert's way a set is to follow, and soft labels that begin as what experts say."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from leanlight.contracts import UserError, to_device
from leanlight.contracts.ranges import NonNegativeInt, PositiveFloat, PositiveInt, Share
from lit_modules.classifier.training import LabelledImages


@dataclass(frozen=True)
class DifficultyAlignment:
    """What DATM (Guo et al. 2024) adds: the steps begin later as the set grows able, and learned logits are labels.

    The defaults are of CIFAR-10 with ten images a class.

    Args:
        min_start: T-, epochs that an expert has behind it at least where the steps begin.
        first_max_start: T, epochs that it has behind it at most in the first outer step; `max_start`, T+, later.
        grow_steps: outer steps in which the one becomes the other, linearly.
        threshold: an outer step whose loss is above it has gradient 0.
        label_epoch: epochs of the experts that choose images and give labels, null for all of theirs.
        label_rate: learning rate, by SGD, of the labels' logits.
        label_momentum: of that SGD.
        choose_images: begin with real images that an expert labels right; else with those of the model.
    """

    min_start: NonNegativeInt = 0
    first_max_start: NonNegativeInt = 10
    grow_steps: PositiveInt = 1000
    threshold: PositiveFloat = 1.0
    label_epoch: PositiveInt | None = None
    label_rate: PositiveFloat = 2.0
    label_momentum: Share = 0.9
    choose_images: bool = True

    def check(self, max_start: int, epochs: int) -> None:
        """UserError when it does not fit experts of so many epochs."""
        if not self.min_start <= self.first_max_start <= max_start:
            raise UserError(
                f"alignment: expected min_start <= first_max_start <= max_start, got {self.min_start}, "
                f"{self.first_max_start}, {max_start}"
            )
        if self.label_epoch is not None and self.label_epoch > epochs:
            raise UserError(f"alignment.label_epoch: expected at most {epochs}, recipe.epochs; got {self.label_epoch}")

    def latest_start(self, outer_steps: int, max_start: int) -> int:
        """T after so many outer steps."""
        grown = (max_start - self.first_max_start) * outer_steps // self.grow_steps
        return min(max_start, self.first_max_start + grown)


Predict = Callable[[int, Tensor], Tensor]  # number of an expert, images (N, C, H, W) → logits (N, K)


def rightly_labelled(
    predict: Predict, experts: int, real: LabelledImages, num_classes: int, ipc: int, generator: torch.Generator
) -> Tensor:
    """Positions (num_classes * ipc,), class by class, of random real images that an expert labels right.

    The first expert chooses. Where it knows too few of a class the next one adds those that it knows, and so on; what
    then lacks is drawn from the others.

    Args:
        predict: what an expert says.
        experts: their number.
        real: images (N, C, H, W) and labels (N,).
        num_classes: number of classes.
        ipc: images per class.
        generator: of the draw, on the CPU.
    """
    images, labels = real
    if (fewest := int(labels.bincount(minlength=num_classes).min())) < ipc:
        raise UserError(f"ipc: expected at most {fewest}, the images of the smallest class; got {ipc}")
    known_by = torch.full_like(labels, experts)  # the first expert that labels an image right
    for number in range(experts):
        right = predict(number, images).argmax(1) == labels
        known_by = torch.where(right & (known_by == experts), number, known_by)
        if int(labels[known_by < experts].bincount(minlength=num_classes).min()) >= ipc:
            break
    order = to_device(torch.randperm(len(labels), generator=generator), labels.device)
    order = order[known_by[order].argsort(stable=True)]
    return torch.cat([order[labels[order] == number][:ipc] for number in range(num_classes)])


def mean_logits(logits: Iterable[Tensor], labels: Tensor) -> Tensor:
    """(n, K) mean of experts' logits, for each image of those that label it right; of all where none does.

    Args:
        logits: (n, K) of each expert.
        labels: (n,) classes.
    """
    stacked = torch.stack(list(logits))
    right = (stacked.argmax(2) == labels).unsqueeze(2)
    counted = (right | ~right.any(0)).to(stacked.dtype)
    return (stacked * counted).sum(0) / counted.sum(0)
