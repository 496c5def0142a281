"""What callbacks, the command line and the tests may ask of a module, a DataModule or a logger."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, get_type_hints, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from leanlight.contracts.errors import UserError
from leanlight.contracts.media import MediaItem
from leanlight.contracts.meta import DataMeta

NetworkFactory = Callable[[], nn.Module]
Split = Literal["train", "val", "test"]
Data = TypeVar("Data")


@dataclass(frozen=True)
class PrimaryMetric:
    """The metric a method is judged by, logged on validation data.

    Args:
        name: as it is logged, ``val/…``.
        mode: whether ``min`` or ``max`` is better.
    """

    name: str
    mode: Literal["min", "max"]


@dataclass(frozen=True)
class Progress:
    """How far training is.

    Args:
        unit: the method's own: ``step``, ``round``, ``frames``, ``outer_step``, ``images``, …
        value: how many of them are done; it grows in every training batch, or nearly.
    """

    unit: str
    value: int


@runtime_checkable
class MethodModule(Protocol):
    """Every method's LightningModule. One without some of these members trains all the same: see `progress_of`."""

    @property
    def primary_metric(self) -> PrimaryMetric:
        """What `best` checkpoints follow."""

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """Pictures of the present state; called outside of gradients, at the end of an epoch of `split`."""

    def export(self, directory: Path) -> list[Path]:
        """Write what works without this suite into the existing `directory`; return the files."""

    def progress(self) -> Progress:
        """How far training is."""


@runtime_checkable
class MethodData(Protocol):
    """Every method's LightningDataModule."""

    meta: DataMeta

    def ensure_available(self) -> None:
        """Find and check the data, downloading if need be; raise UserError with every place tried. Writes no run."""


@runtime_checkable
class ResumableLogger(Protocol):
    """A logger whose file can be cut back to what it held when a checkpoint was written."""

    def position(self) -> int:
        """Number of rows written and flushed so far."""

    def rewind(self, position: int) -> None:
        """Drop every row after the first `position`."""


@runtime_checkable
class HasTerms(Protocol):
    """A module that names the terms of its last loss, so that the NaN guard can say which one broke."""

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        """Name → detached scalar."""


@runtime_checkable
class HasVariants(Protocol):
    """A module that stands for several networks, each to be measured by itself."""

    def variants(self) -> Mapping[str, nn.Module]:
        """Name → network for images (N, C, H, W) in [0, 1], on the module's device."""


@runtime_checkable
class HasReplicas(Protocol):
    """A module that advances several runs as one, which differ in their seeds: that of replica i is the run's plus i.

    A training batch then holds the one that each replica would have alone, one after another.
    """

    replicas: int

    def replica_metrics(self) -> Mapping[str, Sequence[float]]:
        """Name of a logged metric → the value of each replica; the logged one is their mean."""

    def as_best(self) -> AbstractContextManager[None]:
        """Inside, every replica is what it was at its own best validation."""


@dataclass(frozen=True)
class TrainingStep:
    """What one training step of a process differentiates and updates.

    Args:
        network: that is differentiated; from one tensor to one.
        shape: (N, …) of its input.
        optimizer: of its parameters.
        copies: of the network's weights beside those that the module holds.
    """

    network: nn.Module
    shape: tuple[int, ...]
    optimizer: Optimizer
    copies: int = 0


@runtime_checkable
class HasStep(Protocol):
    """A module whose step can be followed by shapes alone, for ``leanlight fit --estimate``; before ``setup``."""

    def training_parts(self, shape: tuple[int, ...]) -> TrainingStep:
        """The step on a batch whose inputs have `shape`."""


@runtime_checkable
class HasStepShape(Protocol):
    """A DataModule that knows the shape of a training batch before anything is loaded."""

    @property
    def step_shape(self) -> tuple[int, ...]:
        """(N, …) of a training batch's inputs."""


@runtime_checkable
class CompilesNetworks(Protocol):
    """A module whose networks can be compiled."""

    def compile_networks(self, **options: Any) -> None:
        """Compile the networks that training calls, each in place; options: of `torch.compile`."""


@runtime_checkable
class CollectsPredictions(Protocol):
    """A module that makes one artefact of all that it predicted, in the folder ``bank`` or the one it names itself.

    Its attribute ``collected_in``, where it has one, is that folder's name among the run's artefacts.
    """

    def collect(self, pieces: Callable[[], Iterator[Mapping[str, Any]]], directory: Path) -> Mapping[str, float]:
        """Write it; called on one process, after the last prediction.

        Args:
            pieces: reads the predictions anew, piece by piece, in order of their items: ``index`` (N,) and the fields
                of `predict_step`.
            directory: of the artefact; it exists.

        Returns:
            what there is to tell of it, by name: metrics ``predict/NAME`` of the run.
        """


def progress_of(module: Any) -> Progress:
    """How far a LightningModule's training is: its own `progress`, or without one its optimiser steps."""
    return module.progress() if hasattr(module, "progress") else Progress("step", module.global_step)


def data_of(module: Any, kind: type[Data]) -> Data:
    """The DataModule of a LightningModule's trainer, as one of a kind of this package, e.g. `InMemoryImages`.

    To be called in the module's ``setup(stage)`` at the earliest. Raises UserError when it is of another kind.
    """
    data = module.trainer.datamodule
    if isinstance(data, kind) and isinstance(data.meta, get_type_hints(kind)["meta"]):  # type: ignore[attr-defined]
        return data
    what = (kind.__doc__ or kind.__name__).split(":")[0].split(".")[0].split(";")[0]
    got = "loaders without a DataModule" if data is None else f"{type(data).__name__}, which is none"
    raise UserError(f"data: {type(module).__name__} needs {what[0].lower()}{what[1:]} ({kind.__name__}); got {got}")
