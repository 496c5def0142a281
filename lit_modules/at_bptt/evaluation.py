"""Judge a set by training fresh networks on it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from leanlight.contracts import NetworkFactory, UserError, isolated_rng
from lit_modules.classifier.training import LabelledImages, Recipe, train


@dataclass(frozen=True)
class Evaluation:
    """How a set is judged.

    networks: fresh networks whose accuracies are averaged. epochs: marks at which they are measured, ascending; the one
    that is best on validation data counts. recipe: how they train; its own `epochs` is not used.
    """

    networks: int = 8
    epochs: tuple[int, ...] = (300, 600, 1000, 3000)
    recipe: Recipe = field(default_factory=lambda: Recipe(batch_size=512, augment="flip_rotate"))

    def __post_init__(self) -> None:
        if self.networks < 1:
            raise UserError(f"evaluation.networks: expected at least 1, got {self.networks}")
        if not self.epochs or list(self.epochs) != sorted(set(self.epochs)) or self.epochs[0] < 1:
            raise UserError(f"evaluation.epochs: expected ascending positive numbers, got {list(self.epochs)}")

    @property
    def full_recipe(self) -> Recipe:
        """The recipe up to the last mark."""
        return dataclasses.replace(self.recipe, epochs=self.epochs[-1])


def train_networks(
    data: LabelledImages, factory: NetworkFactory, recipe: Recipe, seed: int, marks: Sequence[int]
) -> list[nn.Module]:
    """Train one network and return its copies at the `marks` (epochs), in evaluation mode; leaves random states alone.

    The network is the one `train_and_score` makes of the same seed and recipe.
    """
    copies: list[nn.Module] = []

    def keep(epoch: int) -> None:
        if epoch in marks:
            copies.append(copy.deepcopy(network).eval())

    # Callers are validation hooks, where Lightning has gradients and version counting off.
    with isolated_rng(seed), torch.inference_mode(False), torch.enable_grad():
        network = factory().to(data[0].device)
        train(network, (data[0].detach().clone(), data[1].detach().clone()), recipe, keep)
    return copies


def hard_labels(labels: Tensor) -> Tensor:
    """(n, K) soft labels → (n,) int64."""
    return labels.argmax(1)


def label_robust_score(improvement: float, loss: float, weight: float = 0.5) -> float:
    """LRS of DD-Ranking (Li et al. 2025), in [0, 1], from accuracies in [0, 1].

    improvement: IOR, accuracy of the set over that of random real images under the same recipe. loss: HLR, accuracy of
    all real data over that of the set, both with hard labels.
    """
    alpha = weight * improvement - (1 - weight) * loss
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))
