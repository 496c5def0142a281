"""What rules of selection work on and what they give back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from leanlight.contracts import UserError

#: What a selector may have found out about N items, by name → what it is. ``leanlight predict`` writes them.
FIELDS: dict[str, str] = {
    "embedding": "(N, D) vectors before the network's last layer",
    "logits": "(N, K) outputs of the network",
    "texture": "(N,) mean Sobel magnitude of the image",
    "views": "(N, V, D) vectors of V random crops of the image",
    "train_probability": "(N, E) probability of the own class, in each epoch of the selector's training",
    "train_margin": "(N, E) logit of the own class above the largest other one, by epoch",
    "train_error": "(N, E) distance between softmax and the one-hot label, by epoch",
}


@dataclass(frozen=True)
class Features:
    """Labelled items as a selector sees them.

    Args:
        label: (N,) int64 classes.
        num_classes: number of classes K.
        values: name in `FIELDS` → tensor with N rows, on the CPU.
    """

    label: Tensor
    num_classes: int
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values:
            raise UserError(f"features: the rule needs {name}, {FIELDS[name]}; got {sorted(self.values) or 'none'}")
        return finite(self.values[name], f"features: {name}")

    def take(self, items: Tensor) -> Features:
        """The items at these positions, (n,) int64."""
        values = {name: value[items] for name, value in self.values.items()}
        return replace(self, label=self.label[items], values=values)


@dataclass(frozen=True)
class Picks:
    """Chosen items, class by class and within a class in the order in which they were chosen.

    Args:
        index: (n,) int64 positions in the features.
        order: (n,) int64 rank of an item among those of its class, from 0.
        score: (n,) float32 what the rule ranked an item by; 0 where it ranks by nothing.
        weight: (n,) float32 factor of the item's loss in training; 1 where the rule gives none.
        bin: (n,) int64 bin an item was drawn from, from 0; -1 without bins.
        details: plain numbers and lists that explain the choice.
    """

    index: Tensor
    order: Tensor
    score: Tensor
    weight: Tensor
    bin: Tensor
    details: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)


def class_picks(
    index: Tensor, score: Tensor | None = None, weight: Tensor | None = None, bin: Tensor | None = None
) -> dict[str, Tensor]:
    """The choice within one class as the plain tensors that `join_picks` takes.

    Args:
        index: (n,) positions among the items of the class, in the order in which they were chosen.
        score: (n,) see `Picks`.
        weight: (n,) see `Picks`.
        bin: (n,) see `Picks`.
    """
    return {
        "index": index,
        "score": torch.zeros(len(index)) if score is None else score.float(),
        "weight": torch.ones(len(index)) if weight is None else weight.float(),
        "bin": torch.full((len(index),), -1) if bin is None else bin,
    }


def join_picks(features: Features, choices: list[dict[str, Tensor]], details: Mapping[str, Any] | None = None) -> Picks:
    """Join the choices of `class_picks`, one a class in ascending order, into one with positions in `features`."""
    members = [class_members(features.label, label) for label in range(features.num_classes)]
    index = [own[choice["index"]] for own, choice in zip(members, choices, strict=True)]
    order = [torch.arange(len(each)) for each in index]
    score, weight, bin = (torch.cat([choice[name] for choice in choices]) for name in ("score", "weight", "bin"))
    return Picks(torch.cat(index), torch.cat(order), score, weight, bin, dict(details or {}))


def finite(x: Tensor, name: str) -> Tensor:
    """The same numbers; UserError when one is NaN or infinite."""
    bad = ~x.isfinite()
    if bad.any():
        raise UserError(f"{name}: expected numbers, got NaN or infinity in {int(bad.flatten(1).any(1).sum())} items")
    return x


def class_members(label: Tensor, value: int) -> Tensor:
    """(n,) int64 positions of the items of a class, ascending."""
    return (label == value).nonzero()[:, 0]


def class_budget(features: Features, keep: float) -> Tensor:
    """(K,) int64 items to keep of each class: ``round(keep * M_c)``, halves up.

    Args:
        features: whose labels count.
        keep: share of the items to keep, in (0, 1].

    Raises:
        UserError: a share outside (0, 1], or a class of which less than one item would be kept.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep: expected a share in (0, 1], got {keep}")
    counts = features.label.bincount(minlength=features.num_classes)
    # Never by float rounding: 0.05 * 5,400 and its like must give the same number everywhere.
    budget = (counts.double() * keep + 0.5 + 1e-9).floor().long()
    if (short := (budget < 1).nonzero()[:, 0]).numel():
        label = int(short[0])
        raise UserError(f"keep: {keep} of class {label} with {int(counts[label])} items keeps less than one; raise it")
    return budget
