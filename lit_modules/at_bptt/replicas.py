"""Several runs of one setting, which differ in their seeds alone, advanced side by side in one process.

All that a run draws comes from seeds of its own, so that each replica is the run that its seed would make alone, up to
rounding.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import MediaItem, to_device
from leanlight.ops.differentiable import augment_each
from lit_modules.at_bptt.distillers import Distiller, OuterStep, Study, Task, TruncatedBPTT
from lit_modules.at_bptt.engines import Adjoint, Unrolled
from lit_modules.at_bptt.inner import (
    FlatNetwork,
    InnerBatch,
    InnerState,
    RealLoss,
    StackedNetworks,
    StackedProblem,
    SyntheticData,
)
from lit_modules.at_bptt.windows import Window


class Replicas:
    """A distiller once a replica, with choices and state of its own; here they take turns.

    What has a leading axis S in it is of S replicas, in order of their seeds.

    Args:
        distiller: that of the first replica; the others are copies of it.
        count: S, number of replicas.
    """

    def __init__(self, distiller: Distiller, count: int) -> None:
        self.each = [distiller, *(copy.deepcopy(distiller) for _ in range(count - 1))]

    def prepare(self, task: Task) -> None:
        """See `Distiller.prepare`."""
        for distiller in self.each:
            distiller.prepare(task)

    @property
    def studies(self) -> bool:
        """See `Distiller.studies`."""
        return self.each[0].studies

    def study(self, study: Study, seeds: Sequence[int]) -> None:
        """See `Distiller.study`; with seeds of each replica, and a folder for each."""
        for distiller, own in zip(self.each, self._own(study, seeds), strict=True):
            distiller.study(own)

    def first_set(self, data: SyntheticData, study: Study, seeds: Sequence[int]) -> None:
        """See `Distiller.first_set`; data: (S, …) sets."""
        for distiller, part, own in zip(self.each, unstacked(data), self._own(study, seeds), strict=True):
            distiller.first_set(part, own)

    def _own(self, study: Study, seeds: Sequence[int]) -> list[Study]:
        """That of each replica."""
        folders = [study.folder]
        if len(self.each) > 1:
            folders = [study.folder / f"replica_{number}" for number in range(len(self.each))]
        return [
            dataclasses.replace(study, folder=folder, seed=seed) for folder, seed in zip(folders, seeds, strict=True)
        ]

    def start_epoch(self, data: SyntheticData, seeds: Sequence[int]) -> None:
        """See `Distiller.start_epoch`; data: (S, …) sets."""
        for distiller, part, seed in zip(self.each, unstacked(data), seeds, strict=True):
            distiller.start_epoch(part, seed)

    @property
    def choice(self) -> list[Any]:
        """See `Distiller.choice`."""
        return [distiller.choice for distiller in self.each]

    @choice.setter
    def choice(self, values: Sequence[Any]) -> None:
        for distiller, value in zip(self.each, values, strict=True):
            if value is not None:
                distiller.choice = value

    def outer_step(self, data: SyntheticData, image: Tensor, label: Tensor, seeds: Sequence[int]) -> OuterStep:
        """Gradients (S, …), losses (S,) and accuracies (S,) of one outer step of each replica.

        Args:
            data: (S, …) sets.
            image: (S, N, C, H, W) real images, preprocessed.
            label: (S, N) their classes.
            seeds: S of them, which decide all that is drawn.
        """
        steps = [
            distiller.outer_step(*arguments)
            for distiller, *arguments in zip(self.each, unstacked(data), image, label, seeds, strict=True)
        ]
        labels = [step.labels for step in steps if step.labels is not None]
        own = [step.own for step in steps if step.own is not None]
        images, loss, accuracy = (
            torch.stack(values)
            for values in zip(*((step.images, step.loss, step.accuracy) for step in steps), strict=True)
        )
        return OuterStep(
            images,
            torch.stack(labels) if labels else None,
            loss,
            accuracy,
            torch.stack(own) if own else None,
        )

    def updated(self, data: SyntheticData, own: Tensor | None) -> None:
        """See `Distiller.updated`; data: (S, …) sets, own: (S, k)."""
        for number, (distiller, part) in enumerate(zip(self.each, unstacked(data), strict=True)):
            distiller.updated(part, None if own is None else own[number])

    def end_epoch(self, accuracies: Sequence[float]) -> None:
        """See `Distiller.end_epoch`."""
        for distiller, accuracy in zip(self.each, accuracies, strict=True):
            distiller.end_epoch(accuracy)

    def metrics(self) -> dict[str, float]:
        """Means over the replicas that have the number."""
        found = [distiller.metrics() for distiller in self.each]
        names = dict.fromkeys(name for metrics in found for name in metrics)
        return {name: fmean(metrics[name] for metrics in found if name in metrics) for name in names}

    def media(self) -> Mapping[str, MediaItem]:
        """Pictures of the first."""
        return self.each[0].media()

    def state_dict(self) -> list[dict[str, Any]]:
        """State that decides later steps."""
        return [distiller.state_dict() for distiller in self.each]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take over what `state_dict` gave."""
        for distiller, own in zip(self.each, state, strict=True):
            distiller.load_state_dict(own)


class BatchedBPTT(Replicas):
    """Replicas of `TruncatedBPTT` whose inner training, and the way back, are one batch of S networks.

    Windows differ in place and length. All are laid so that they end together: who trains for fewer steps waits at the
    start, without moving, and before the start of a shorter window a step's contribution counts 0. So an outer step has
    as many steps as the replica that trains longest, and as many on the way back as the longest window.
    """

    each: list[TruncatedBPTT]  # type: ignore[assignment]  # a list is not covariant

    def prepare(self, task: Task) -> None:
        super().prepare(task)
        self._learn_labels, self._engine = task.learn_labels, self.each[0].gradient_engine

    def start_epoch(self, data: SyntheticData, seeds: Sequence[int]) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        numbers = [number for number, distiller in enumerate(self.each) if distiller.needs_norms]
        norms = dict(zip(numbers, self._probe(data, numbers, seeds, generators), strict=True))
        for number, distiller in enumerate(self.each):
            distiller.choose(norms.get(number), generators[number])

    def _probe(
        self, data: SyntheticData, numbers: list[int], seeds: Sequence[int], generators: Sequence[torch.Generator]
    ) -> Sequence[Tensor]:
        """Inner gradient norms (T,) of a throw-away run of each of these replicas, on the CPU."""
        if not numbers:
            return ()
        device, steps = data.images.device, self.each[0].inner_steps
        runs = [self.each[number].inner_run(steps, seeds[number], generators[number], device) for number in numbers]
        problem, state, batches = self._together(runs)
        some = SyntheticData(data.images[numbers], data.labels[numbers])
        return torch.stack([norm for _, norm in self._engine.train(problem, state, some, batches)]).cpu().unbind(1)

    def outer_step(self, data: SyntheticData, image: Tensor, label: Tensor, seeds: Sequence[int]) -> OuterStep:
        device, first = data.images.device, self.each[0]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = list(zip(self.each, seeds, generators, strict=True))
        windows = [distiller.next_window(generator) for distiller, _, generator in draws]
        problem, state, batches = self._together(
            [
                distiller.inner_run(window.end, seed, generator, device)
                for (distiller, seed, generator), window in zip(draws, windows, strict=True)
            ]
        )
        length = max(window.length for window in windows)
        for state, _ in self._engine.train(problem, state, data, batches[:-length]):  # noqa: B007, B020
            pass
        if first.outer_augmentation is not None:
            image = augment_each(first.outer_augmentation, image, generators)
        outer_loss = RealLoss(problem.network, image, label, first.outer_chunk)
        weights = self._weights(windows, length, device)
        result = self._engine.meta_gradient(
            problem, state, data, batches[-length:], outer_loss, self._learn_labels, weights
        )
        return OuterStep(result.images, result.labels, outer_loss.loss, outer_loss.accuracy)

    def _together(
        self, runs: Sequence[tuple[FlatNetwork, list[InnerBatch]]]
    ) -> tuple[StackedProblem, InnerState, list[InnerBatch]]:
        """Inner runs as one, whose ends fall together."""
        first, networks = self.each[0], StackedNetworks([network for network, _ in runs])
        problem = StackedProblem(networks, first.inner_optimizer, first.augmentation)
        theta, batches = networks.parameters(), [own for _, own in runs]
        longest = max(map(len, batches))
        steps_done = torch.tensor([[len(own) - longest] for own in batches], dtype=theta.dtype)  # below 0: to wait
        steps_done = to_device(steps_done, theta.device)
        return problem, first.inner_optimizer.start(theta, steps_done), _aligned(batches, theta.device)

    def _weights(self, windows: Sequence[Window], length: int, device: torch.device) -> Tensor | None:
        """(length, S) factors of the steps' contributions: 0 before a replica's window begins."""
        own = [distiller.weights(window) for distiller, window in zip(self.each, windows, strict=True)]
        if own[0] is None and all(window.length == length for window in windows):
            return None
        rows = [
            F.pad(torch.ones(window.length) if weight is None else weight, (length - window.length, 0))
            for window, weight in zip(windows, own, strict=True)
        ]
        return to_device(torch.stack(rows, 1), device)


def side_by_side(distiller: Distiller, count: int) -> Replicas:
    """`count` replicas of a distiller: as one batch where that can be, else taking turns.

    A low-rank Hessian and recorded steps belong to one network; a subclass may do anything.
    """
    if count > 1 and type(distiller) is TruncatedBPTT:
        engine = distiller.gradient_engine
        plain = isinstance(engine, Adjoint) and engine.hessian != "lowrank" and not engine.graph
        if plain or type(engine) is Unrolled:
            return BatchedBPTT(distiller, count)
    return Replicas(distiller, count)


def unstacked(data: SyntheticData) -> list[SyntheticData]:
    """(S, …) sets, one by one."""
    return [SyntheticData(*pair) for pair in zip(data.images, data.labels, strict=True)]


def _aligned(batches: Sequence[Sequence[InnerBatch]], device: torch.device) -> list[InnerBatch]:
    """Step by step the mini-batches of all replicas, such that their last ones fall together.

    A replica that waits gets its first one over and over, as one that is not active.
    """
    longest = max(map(len, batches))
    waits = torch.tensor([longest - len(own) for own in batches])
    active = to_device((torch.arange(longest).unsqueeze(1) >= waits).view(longest, -1, 1, 1), device)
    waited = int(waits.max())
    padded = [[own[0]] * (longest - len(own)) + list(own) for own in batches]
    steps = []
    for number, row in enumerate(zip(*padded, strict=True)):
        index = None if row[0].index is None else torch.stack([cast(Tensor, batch.index) for batch in row])
        seeds = [cast(int, batch.seed) for batch in row]
        steps.append(InnerBatch(index, seeds, active[number] if number < waited else None))
    return steps
