"""Rules that choose items of each class, and the two subsets that distillation compares itself with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from leanlight.contracts import UserError, derived_seed, nearest
from lit_modules.selection.features import Features, Picks, class_members, class_picks, join_picks
from lit_modules.selection.greedy import herding
from lit_modules.selection.work import Advance, Work


@dataclass(frozen=True)
class Rule:
    """Base of all rules: their switches are the fields of the dataclass.

    A choice is a function of features, budget and seed alone. Fields that are a ``Literal`` take its values alone.
    """

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and (value := getattr(self, name)) not in (known := get_args(kind)):
                raise UserError(
                    f"{name}: expected one of {', '.join(known)}; got {value!r}{nearest(str(value), known)}"
                )

    @property
    def needs(self) -> tuple[str, ...]:
        """Names in `lit_modules.selection.FIELDS` that the features must hold, given the switches."""
        return ()

    def select(self, features: Features, budget: Tensor, seed: int, work: Work | None = None) -> Picks:
        """Choose ``budget[c]`` items of every class c.

        Args:
            features: of all items.
            budget: (K,) int64, from 1 to the items of the class.
            seed: of whatever is drawn.
            work: shows progress and keeps finished classes; None for neither.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ClassRule(Rule):
    """Base of rules that look at one class at a time."""

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        """Choose `count` of the items of one class; return `class_picks`.

        Args:
            features: of this class alone.
            count: items to choose.
            generator: a stream of this seed and class alone.
            advance: to be called with the picks made since the last call.
        """
        raise NotImplementedError

    def select(self, features: Features, budget: Tensor, seed: int, work: Work | None = None) -> Picks:
        counts: Sequence[int] = budget.tolist()

        def step(own: Features, label: int, advance: Advance) -> dict[str, Tensor]:
            return self.pick(own, counts[label], class_generator(seed, label), advance)

        return join_picks(features, (work or Work()).classes(features, step, counts))


@dataclass(frozen=True)
class Random(ClassRule):
    """Items of each class at random, each as likely as any other."""

    def pick(self, features: Features, count: int, generator: torch.Generator, advance: Advance) -> dict[str, Tensor]:
        chosen = torch.randperm(len(features), generator=generator)[:count]
        advance(count)
        return class_picks(chosen)


@dataclass(frozen=True)
class Full(Rule):
    """Every item, whatever the budget: the ceiling of a comparison."""

    def select(self, features: Features, budget: Tensor, seed: int, work: Work | None = None) -> Picks:
        counts = features.label.bincount(minlength=features.num_classes).tolist()
        return join_picks(features, [class_picks(torch.arange(count)) for count in counts])


def class_generator(seed: int, label: int, *parts: object) -> torch.Generator:
    """A stream of random numbers that is a function of the seed, the class and whatever else, e.g. a bin."""
    return torch.Generator().manual_seed(derived_seed(seed, "selection", label, *parts))


def random_subset(labels: Tensor, num_classes: int, per_class: int, generator: torch.Generator) -> Tensor:
    """Choose items of each class at random: positions (num_classes * per_class,), class by class.

    Args:
        labels: (N,) int64 classes, on the CPU.
        num_classes: number of classes K.
        per_class: items of each class.
        generator: on the CPU; the choice is a function of its state.

    Raises:
        UserError: a class has fewer items.
    """
    chosen = []
    for label in range(num_classes):
        members = _members(labels, label, per_class)
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    return torch.cat(chosen)


def herding_subset(features: Tensor, labels: Tensor, num_classes: int, per_class: int) -> Tensor:
    """Choose items by herding (Welling 2009): positions (num_classes * per_class,), class by class.

    Each next item brings the mean of those chosen so far nearest to the mean of its class; of equals the first is
    taken.

    Args:
        features: (N, D) float, whatever distances shall be taken in; on the CPU.
        labels: (N,) int64 classes, on the CPU.
        num_classes: number of classes K.
        per_class: items of each class.

    Raises:
        UserError: a class has fewer items.
    """
    chosen = []
    for label in range(num_classes):
        members = _members(labels, label, per_class)
        chosen.append(members[herding(features[members], per_class)[0]])
    return torch.cat(chosen)


def _members(labels: Tensor, label: int, per_class: int) -> Tensor:
    """Positions of the items of a class, ascending."""
    members = class_members(labels, label)
    if not 1 <= per_class <= len(members):
        raise UserError(f"per_class: expected 1 to {len(members)}, the items of class {label}; got {per_class}")
    return members
