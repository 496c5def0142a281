"""DD-Ranking (Li et al. 2025): what of a set's accuracy is owed to its images, not to soft labels or augmentation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from leanlight.contracts import NetworkFactory, isolated_rng
from lit_modules.classifier.training import LabelledImages, Recipe, train


def ranking_scores(accuracies: Mapping[str, float], soft: bool) -> dict[str, float]:
    """HLR, IOR, LRS and ARS, as far as the accuracies for them are there.

    Args:
        accuracies: in [0, 1]: ``accuracy`` of the set, ``accuracy_random`` of random real images under hard labels, and
            perhaps ``accuracy_random_soft`` of these under a teacher's labels, ``accuracy_full`` of all real images,
            ``accuracy_hard_labels`` of the set under hard labels where its own are soft, ``accuracy_unaugmented`` and
            ``accuracy_random_unaugmented`` of networks trained without augmentation.
        soft: whether the set's labels are soft. Then random images have to have soft labels, too; the gain over hard
            ones is no IOR, and is called ``above_random``.
    """
    scores: dict[str, float] = {}
    own = accuracies["accuracy"]
    if soft and "accuracy_random" in accuracies:
        scores["above_random"] = own - accuracies["accuracy_random"]
    if (random := accuracies.get("accuracy_random_soft" if soft else "accuracy_random")) is not None:
        scores["ior"] = own - random
    if "accuracy_full" in accuracies:
        scores["hlr"] = accuracies["accuracy_full"] - accuracies.get("accuracy_hard_labels", own)
        if "ior" in scores:
            scores["lrs"] = label_robust_score(scores["ior"], scores["hlr"])
    if "accuracy_unaugmented" in accuracies:
        bare = accuracies["accuracy_unaugmented"] - accuracies["accuracy_random_unaugmented"]
        scores["ars"] = augmentation_robust_score(scores["ior"], bare)
    return scores


def label_robust_score(improvement: float, loss: float, weight: float = 0.5) -> float:
    """LRS, in [0, 1], from differences of accuracies in [0, 1].

    Args:
        improvement: IOR, accuracy of the set less that of random real images with the same recipe and kind of labels.
        loss: HLR, accuracy of all real data less that of the set, both with hard labels.
        weight: w, of the improvement; the loss has the rest.
    """
    return _normalised(weight * improvement - (1 - weight) * loss)


def augmentation_robust_score(improvement: float, bare: float, weight: float = 0.5) -> float:
    """ARS, in [0, 1], from differences of accuracies in [0, 1].

    Args:
        improvement: IOR, where networks train with augmentation.
        bare: the same difference where they train without.
        weight: gamma, of the former; the latter has the rest.
    """
    return _normalised(weight * improvement + (1 - weight) * bare)


def _normalised(value: float) -> float:
    """[-1, 1] → [0, 1], steeper where better."""
    return (math.exp(value) - math.exp(-1)) / (math.e - math.exp(-1))


def teacher_labels(images: Tensor, real: LabelledImages, factory: NetworkFactory, recipe: Recipe, seed: int) -> Tensor:
    """Probabilities (n, K) that a network trained on real data gives images (n, C, H, W); leaves random states alone.

    Args:
        images: preprocessed, on the device to train on.
        real: all real images, preprocessed, and their labels, there too.
        factory: makes the network.
        recipe: how it trains.
        seed: of its initialisation and of all that training draws.
    """
    # Callers are validation hooks, where Lightning has gradients and version counting off.
    with isolated_rng(seed), torch.inference_mode(False), torch.enable_grad():
        network = train(factory().to(images.device), (real[0].clone(), real[1].clone()), recipe)
    with torch.no_grad():
        return torch.cat([network(part).softmax(1) for part in images.split(512)])
