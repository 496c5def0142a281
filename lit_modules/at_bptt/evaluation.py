"""Evaluate a set by training fresh networks on it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from leanlight.contracts import NetworkFactory, UserError, isolated_rng
from leanlight.contracts.ranges import PositiveInt
from lit_modules.at_bptt.inner import BatchSampler
from lit_modules.at_bptt.together import Course, can_stack, train_together
from lit_modules.classifier.training import LabelledImages, Recipe, train

_EPOCHS = (300, 600, 1000, 3000)


@dataclass(frozen=True)
class Evaluation:
    """How a set is evaluated: fresh networks train on it, and are measured after several lengths of training.

    Lengths are numbers of epochs, or numbers of steps whose mini-batches are drawn as those of inner training, as in
    published code; the best on validation data counts.

    Args:
        networks: fresh networks whose accuracies are averaged.
        epochs: numbers of epochs after which they are measured, ascending; without `steps` 300, 600, 1000 and 3000 by
            default.
        recipe: how they train; its own ``epochs`` is not used, with `steps` neither its ``batch_size``.
        steps: numbers of steps after which they are measured, ascending, instead of `epochs`.
        classes_per_batch: classes in a step's mini-batch, null for all; with `steps` only.
        images_per_class: images of each class in a step's mini-batch, null for all; with `steps` only.
    """

    networks: PositiveInt = 8
    epochs: tuple[PositiveInt, ...] | None = None
    recipe: Recipe = field(default_factory=lambda: Recipe(batch_size=512, augment="flip_rotate"))
    steps: tuple[PositiveInt, ...] | None = None
    classes_per_batch: PositiveInt | None = None
    images_per_class: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.networks < 1:
            raise UserError(f"networks: expected at least 1, got {self.networks}")
        for name, value in (("epochs", self.epochs), ("steps", self.steps)):
            if value is not None and (not value or list(value) != sorted(set(value)) or value[0] < 1):
                raise UserError(f"{name}: expected ascending positive numbers, got {list(value)}")
        if self.steps is None:
            for name in ("classes_per_batch", "images_per_class"):
                if getattr(self, name) is not None:
                    raise UserError(f"{name}: expected null where epochs count, got {getattr(self, name)}; give steps")
        elif self.epochs is not None:
            raise UserError(f"epochs: expected null beside steps, got {list(self.epochs)}")

    @property
    def unit(self) -> Literal["epochs", "steps"]:
        """What lengths of training are numbers of."""
        return "epochs" if self.steps is None else "steps"

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of training after which networks are measured."""
        return self.steps or self.epochs or _EPOCHS

    def course(self, num_classes: int, ipc: int) -> Course:
        """How networks train on a set of so many classes and images a class; UserError when it has not as many."""
        recipe, order = dataclasses.replace(self.recipe, epochs=self.lengths[-1]), None
        if self.steps is not None:
            order = BatchSampler(num_classes, ipc, self.classes_per_batch, self.images_per_class)
            recipe = dataclasses.replace(recipe, batch_size=order.size)
        return Course(recipe, self.lengths, order)

    def described(self, length: int) -> dict[str, Any]:
        """A training of this length in words and numbers, for people and other programs."""
        recipe = {**vars(self.recipe), self.unit: length}
        if self.steps is not None:
            del recipe["epochs"], recipe["batch_size"]
            recipe |= {"classes_per_batch": self.classes_per_batch, "images_per_class": self.images_per_class}
        return recipe


def train_networks(data: LabelledImages, factory: NetworkFactory, course: Course, seed: int) -> list[nn.Module]:
    """Train one network and return its copies after so many epochs, in evaluation mode; leaves random states alone.

    Where epochs go through all images, the network is the one that `train_and_score` makes of seed and recipe.

    Args:
        data: images (N, C, H, W) and labels, (N,) or (N, K), on the device to train on.
        factory: makes the network.
        course: how it trains, and when it is copied.
        seed: of its initialisation and of all that training draws.
    """
    copies: list[nn.Module] = []

    def keep(epoch: int) -> None:
        if epoch in course.epochs:
            copies.append(copy.deepcopy(network).eval())

    # Callers are validation hooks, where Lightning has gradients and version counting off.
    with isolated_rng(seed), torch.inference_mode(False), torch.enable_grad():
        network = factory().to(data[0].device)
        own = data[0].detach().clone(), data[1].detach().clone()
        train(network, own, course.recipe, keep, course.order)
    return copies


class Processes(Protocol):
    """What processes send one another; every strategy of Lightning has it."""

    global_rank: int
    world_size: int

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """The object that process `src` gave."""

    def reduce(self, tensor: Tensor, *, reduce_op: str) -> Any:
        """The sum or mean over processes."""


class TrainedNetworks:
    """Networks trained on one or several sets, and how many images each of them labels right.

    Training is spread over the processes, which work side by side (`train_on_sets`); after `exchange` every process has
    all networks and counts on its share of the images.

    Args:
        seeds: one a network; on every set the network of the same position starts the same.
        device: where they train and count.
        processes: the other processes of the run.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, processes: Processes) -> None:
        self.seeds, self.device, self.processes = seeds, device, processes
        self._networks: dict[str, list[list[nn.Module]]] = {}  # set → number of epochs → networks
        self._mine: dict[int, list[nn.Module]] = {}  # number of a network over all sets → its copies
        self._sets: dict[str, range] = {}  # set → numbers of its networks
        self._right: dict[str, Tensor] = {}  # set → (numbers of epochs, networks)
        self._images = 0

    def claim(self, name: str, epochs: Sequence[int]) -> list[tuple[int, int]]:
        """Number and seed of each network that this process is to train on a set, for `take` after each of `epochs`.

        Numbers go on over the sets, so that a set of one network after the other is spread over processes, too.
        """
        first = sum(map(len, self._sets.values()))
        self._sets[name] = range(first, first + len(self.seeds))
        self._right[name] = torch.zeros(len(epochs), len(self.seeds), device=self.device)
        world, rank = self.processes.world_size, self.processes.global_rank
        return [pair for pair in zip(self._sets[name], self.seeds, strict=True) if pair[0] % world == rank]

    def take(self, number: int, copies: list[nn.Module]) -> None:
        """Keep the copies of a network that this process has trained."""
        self._mine[number] = copies

    def exchange(self) -> None:
        """Give every process all networks; to be called once, on all processes, when all sets have been trained on."""
        trained = self._mine
        if self.processes.world_size > 1:
            sent = {number: [copy.cpu() for copy in copies] for number, copies in self._mine.items()}
            trained = {}
            for source in range(self.processes.world_size):
                trained |= self.processes.broadcast(sent, src=source)
        for name, numbers in self._sets.items():
            groups = zip(*(trained[number] for number in numbers), strict=True)
            self._networks[name] = [[network.to(self.device) for network in group] for group in groups]
        self._mine = {}

    def count(self, image: Tensor, label: Tensor) -> None:
        """Let every network label preprocessed images (N, C, H, W) of classes (N,)."""
        for name, by_epochs in self._networks.items():
            for row, networks in zip(self._right[name], by_epochs, strict=True):
                row += torch.stack([(network(image).argmax(1) == label).sum() for network in networks])
        self._images += len(label)

    def accuracies(self) -> dict[str, Tensor]:
        """Set → (numbers of epochs, networks) in [0, 1], on the CPU, over the images of all processes."""
        return {name: self._accuracies(right) for name, right in self._right.items()}

    def _accuracies(self, right: Tensor) -> Tensor:
        counts = torch.cat([right.flatten(), right.new_tensor([self._images])])
        counts = self.processes.reduce(counts, reduce_op="sum").cpu()
        return (counts[:-1] / counts[-1]).view_as(right)


def train_on_sets(
    trained: Sequence[TrainedNetworks],
    name: str,
    data: Sequence[LabelledImages],
    factory: NetworkFactory,
    course: Course,
) -> None:
    """Train a network a seed on the set of each replica, this process its share, to be kept when the course says.

    Those of several replicas train as one batch where that can be. Nothing is sent, so no process waits for another.

    Args:
        trained: of each replica.
        name: of the sets.
        data: of each replica, equally large; see `train_networks`.
        factory: see `train_networks`.
        course: see `train_networks`.
    """
    jobs = [
        (each, number, seed, own)
        for each, own in zip(trained, data, strict=True)
        for number, seed in each.claim(name, course.epochs)
    ]
    seeds, sets = [seed for *_, seed, _ in jobs], [own for *_, own in jobs]
    if len(trained) > 1 and jobs and can_stack(factory):
        networks = train_together(sets, factory, course, seeds)
    else:
        networks = [train_networks(own, factory, course, seed) for own, seed in zip(sets, seeds, strict=True)]
    for (each, number, *_), copies in zip(jobs, networks, strict=True):
        each.take(number, copies)


def scores_on_test(accuracies: Mapping[str, Tensor], evaluation: Evaluation, best: int | None) -> dict[str, float]:
    """Accuracies of a set, and of what it is compared with, on test data.

    Args:
        accuracies: ``set`` → (lengths of training, networks), likewise for other sets and networks by name; ``full``:
            of networks trained on all real data, measured once.
        evaluation: how it was evaluated.
        best: the length that was best on validation data, None for the last.
    """
    lengths = evaluation.lengths
    chosen = lengths.index(best) if best in lengths else len(lengths) - 1
    of_set = accuracies["set"]
    scores = {
        "accuracy": float(of_set[chosen].mean()),
        "accuracy_spread": float(of_set[chosen].std(correction=0)),
        "accuracy_best_on_test": float(of_set.mean(1).max()),
        evaluation.unit: float(lengths[chosen]),
    }
    for name, values in accuracies.items():
        if name not in ("set", "full"):
            scores[f"accuracy_{name}"] = float(values[chosen].mean())
    if "full" in accuracies:
        scores["accuracy_full"] = float(accuracies["full"].mean())
    return scores


def hard_labels(labels: Tensor) -> Tensor:
    """(n, K) soft labels → (n,) int64."""
    return labels.argmax(1)
