"""Which inner steps the meta-gradient goes through: full, last, random, by halves, and AT-BPTT's adaptive rule.

Of T inner steps a window [start, start + length) is differentiated; the steps before it only train, those after it are
not run. `docs/methods/at_bptt.md` says where the paper and the published code differ and which reading is the default.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from leanlight.contracts import UserError
from leanlight.contracts.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UnitInterval

Stage = Literal["early", "middle", "late"]
STAGES: tuple[Stage, ...] = ("early", "middle", "late")


@dataclass(frozen=True)
class Window:
    """Where a meta-gradient goes through.

    Args:
        start: inner steps before it, without a graph.
        length: inner steps that are differentiated.
    """

    start: int
    length: int

    @property
    def end(self) -> int:
        """Inner steps in all; the outer loss is taken after the last."""
        return self.start + self.length


class WindowSelector:
    """Base of all rules; `select` is called once an epoch, or also in each outer step."""

    def prepare(self, steps: int, epochs: int) -> None:
        """Take T, the inner steps, and the number of outer epochs; UserError when they do not fit."""

    @property
    def needs_norms(self) -> bool:
        """Whether the next `select` wants the inner gradient norms of a probe run."""
        return False

    @property
    def redraws(self) -> bool:
        """Whether each outer step has a window of its own."""
        return False

    def select(self, steps: int, norms: Tensor | None, generator: torch.Generator) -> Window:
        """Choose a window.

        Args:
            steps: T, inner steps.
            norms: (T,) inner gradient norms n_t where `needs_norms`, else None.
            generator: on the CPU; the choice is a function of its state.
        """
        raise NotImplementedError

    def end_epoch(self, accuracy: float) -> None:
        """Take the mean accuracy, in percent, of the epoch's outer forward passes."""

    def metrics(self) -> dict[str, float]:
        """Numbers of the last choice, to be logged."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs for the next choices to be the same."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""


def _check_window(window: int, steps: int, min_start: int = 0) -> None:
    if not 1 <= window <= steps:
        raise UserError(f"window: expected 1 to inner_steps = {steps}, got {window}")
    if not 0 <= min_start <= steps - window:
        raise UserError(f"min_start: expected 0 to inner_steps - window = {steps - window}, got {min_start}")


def _uniform(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number in [low, high]."""
    return int(torch.randint(low, high + 1, (), generator=generator))


@dataclass
class FullWindow(WindowSelector):
    """Differentiate all inner steps: BPTT."""

    def select(self, steps: int, norms: Tensor | None, generator: torch.Generator) -> Window:
        return Window(0, steps)


@dataclass
class LastWindow(WindowSelector):
    """Differentiate the last `window` steps: T-BPTT.

    Args:
        window: W, length of the window in inner steps; 40 in the paper for CIFAR-10.
    """

    window: PositiveInt = 40

    def prepare(self, steps: int, epochs: int) -> None:
        _check_window(self.window, steps)

    def select(self, steps: int, norms: Tensor | None, generator: torch.Generator) -> Window:
        return Window(steps - self.window, self.window)


@dataclass
class RandomWindow(WindowSelector):
    """A window at a uniformly random place: RaT-BPTT (Feng et al. 2024).

    Args:
        window: W, length of the window in inner steps; 40 in the paper for CIFAR-10.
        min_start: the earliest inner step that it starts at.
        redraw: whether a place is drawn each ``epoch`` (published code) or each outer ``step``.
    """

    window: PositiveInt = 40
    min_start: NonNegativeInt = 0
    redraw: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        if self.redraw not in ("epoch", "step"):
            raise UserError(f"redraw: expected epoch or step, got {self.redraw!r}")

    def prepare(self, steps: int, epochs: int) -> None:
        _check_window(self.window, steps, self.min_start)

    @property
    def redraws(self) -> bool:
        return self.redraw == "step"

    def select(self, steps: int, norms: Tensor | None, generator: torch.Generator) -> Window:
        return Window(_uniform(self.min_start, steps - self.window, generator), self.window)


@dataclass
class HalfWindow(WindowSelector):
    """Three equal stages of epochs, each with its own half of the inner steps and its own length (AT-BPTT, Fig. 1).

    Args:
        halves: where the window lies in the early, middle and late stage: ``first`` or ``second`` half, or ``any``.
        windows: its length in each stage, inner steps.
    """

    halves: tuple[str, str, str] = ("first", "any", "second")
    windows: tuple[PositiveInt, PositiveInt, PositiveInt] = (40, 40, 40)

    def __post_init__(self) -> None:
        self._epoch, self._epochs = 0, 1

    def prepare(self, steps: int, epochs: int) -> None:
        for window in self.windows:
            _check_window(window, steps)
        for half in self.halves:
            if half not in ("first", "second", "any"):
                raise UserError(f"halves: expected first, second or any, got {half!r}")
        self._epochs = epochs

    def select(self, steps: int, norms: Tensor | None, generator: torch.Generator) -> Window:
        stage = min(2, 3 * self._epoch // self._epochs)
        length, last = self.windows[stage], steps - self.windows[stage]
        low, high = {"first": (0, last // 2), "second": (last // 2, last), "any": (0, last)}[self.halves[stage]]
        return Window(_uniform(low, high, generator), length)

    def end_epoch(self, accuracy: float) -> None:
        self._epoch += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch = state["epoch"]


@dataclass
class AdaptiveWindow(WindowSelector):
    """AT-BPTT's rule: the place follows inner gradient norms, the length their changes, both a stage (Eq. 5 to 8).

    Where the paper and the code published before it differ, an argument has both readings.

    Args:
        window: W, middle length of the window in inner steps; 40 in the paper for CIFAR-10.
        half_range: d, the length lies in [W - d, W + d]; 10 in the paper for CIFAR-10.
        temperature: tau of both softmaxes, positive.
        position: where the window lies: ``adaptive`` by gradient norms (DTP), or ``uniform``.
        length: ``adaptive`` by changes of the norms (AWS), or ``fixed`` to W.
        norm_scale: ``raw`` norms in the softmax, or ``zscore``, which makes it independent of their scale.
        anchor: whether the drawn step is the window's ``start`` (published code) or its ``end`` (paper).
        late_rule: place in the late stage: ``mirror`` image of the early one (code), or ``complement`` of P (paper).
        length_rule: eta(t) of Eq. 7: ``rank`` of the change (code), ``softmax`` (paper), ``sigmoid`` of its z-score.
        length_stages: stages that adapt the length: ``early``, then W + d and W - d (code), or ``all`` (paper).
        min_gain_early: M, a smaller gain of an epoch in the early stage counts as small; points of accuracy, 1.5.
        min_gain_late: N, the same in the middle stage; points of accuracy, 1.0.
        patience_early: X, small gains that end the early stage, as a share of the epochs; 5 % in the paper.
        patience_late: Y, small gains that end the middle stage, as a share of the epochs; 4 % in the paper.
        counter: whether small gains count ``cumulative`` (paper) or ``consecutive`` (code).
        min_start: the earliest inner step that a window starts at; at 0 Adam's first step is differentiated.
        min_stage_epochs: epochs that the early and the middle stage last at least.
    """

    window: PositiveInt = 40
    half_range: NonNegativeInt = 10
    temperature: PositiveFloat = 1.0
    position: Literal["adaptive", "uniform"] = "adaptive"
    length: Literal["adaptive", "fixed"] = "adaptive"
    norm_scale: Literal["raw", "zscore"] = "raw"
    anchor: Literal["start", "end"] = "start"
    late_rule: Literal["mirror", "complement"] = "mirror"
    length_rule: Literal["rank", "softmax", "sigmoid"] = "rank"
    length_stages: Literal["early", "all"] = "early"
    min_gain_early: NonNegativeFloat = 1.5
    min_gain_late: NonNegativeFloat = 1.0
    patience_early: UnitInterval = 0.05
    patience_late: UnitInterval = 0.04
    counter: Literal["cumulative", "consecutive"] = "cumulative"
    min_start: NonNegativeInt = 0
    min_stage_epochs: NonNegativeInt = 0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"temperature: expected a positive number, got {self.temperature}")
        if not 0 <= self.half_range < self.window:
            raise UserError(f"half_range: expected 0 to window - 1 = {self.window - 1}, got {self.half_range}")
        if self.length == "adaptive" and self.length_rule == "softmax":
            warnings.warn("length_rule softmax keeps the length within a step or two of W - d", stacklevel=2)
        if self.position == "adaptive" and self.late_rule == "complement":
            warnings.warn("late_rule complement is almost uniform over the inner steps", stacklevel=2)
        self.stage: Stage = "early"
        self._small_gains, self._epochs, self._stage_epochs = 0, 1, 0
        self._accuracy: float | None = None
        self._metrics: dict[str, float] = {}

    def prepare(self, steps: int, epochs: int) -> None:
        _check_window(self.window + self.half_range, steps, self.min_start)
        self._epochs = epochs

    # ---- choice ----

    @property
    def _adapts_length(self) -> bool:
        return self.length == "adaptive" and (self.length_stages == "all" or self.stage == "early")

    @property
    def needs_norms(self) -> bool:
        return self._adapts_length or (self.position == "adaptive" and self.stage != "middle")

    def select(self, steps: int, norms: Tensor | None, generator: torch.Generator) -> Window:
        drawn = self._draw(steps, norms, generator)
        length = self._length(drawn, norms)
        if self.stage == "middle" or self.position == "uniform":
            start = _uniform(self.min_start, steps - length, generator)
        else:
            start = drawn if self.anchor == "start" else drawn + 1 - length
            if self.stage == "late" and self.late_rule == "mirror":
                start = steps - length - start
            start = min(max(start, self.min_start), steps - length)
        self._metrics = {"stage": float(STAGES.index(self.stage)), **self._entropy(norms)}
        return Window(start, length)

    def probabilities(self, norms: Tensor) -> Tensor:
        """P(t) of Eq. 5, (T,) float64."""
        norms = norms.double()
        if self.norm_scale == "zscore":
            norms = _zscore(norms)
        return (norms / self.temperature).softmax(0)

    def _draw(self, steps: int, norms: Tensor | None, generator: torch.Generator) -> int:
        if norms is None or self.stage == "middle" or self.position == "uniform":
            return _uniform(0, steps - 1, generator)
        p = self.probabilities(norms)
        if self.stage == "late" and self.late_rule == "complement":
            p = (1 - p) / (steps - 1)
        return int(torch.multinomial(p, 1, generator=generator))

    def _length(self, step: int, norms: Tensor | None) -> int:
        low, high = self.window - self.half_range, self.window + self.half_range
        if self.length == "fixed":
            return self.window
        if not self._adapts_length:
            return high if self.stage == "middle" else low
        assert norms is not None
        return int(low + 2 * self.half_range * self.share(norms)[step])

    def share(self, norms: Tensor) -> Tensor:
        """eta(t) of Eq. 7, (T,) float64 in [0, 1]: where in [W - d, W + d] the length of a window at step t lies."""
        norms = norms.double()
        change = torch.cat([norms.new_zeros(1), norms.diff().abs()])
        if self.length_rule == "softmax":
            return (change / self.temperature).softmax(0)
        if self.length_rule == "sigmoid":
            return (_zscore(change) / self.temperature).sigmoid()
        rank = change.argsort(stable=True).argsort()  # position of each step among the changes, ascending
        return rank.double() / max(1, len(change) - 1)

    def _entropy(self, norms: Tensor | None) -> dict[str, float]:
        """Entropy of P over its greatest value, log T: 1 is uniform."""
        if norms is None or len(norms) < 2:
            return {}
        p = self.probabilities(norms)
        return {"entropy": float(torch.special.entr(p).sum()) / math.log(len(norms))}

    # ---- stages ----

    def end_epoch(self, accuracy: float) -> None:
        previous, self._accuracy = self._accuracy, accuracy
        self._stage_epochs += 1
        if previous is None or self.stage == "late":
            return
        early = self.stage == "early"
        if accuracy - previous < (self.min_gain_early if early else self.min_gain_late):
            self._small_gains += 1
        elif self.counter == "consecutive":
            self._small_gains = 0
        if self._stage_epochs < self.min_stage_epochs:
            return
        if self._small_gains >= (self.patience_early if early else self.patience_late) * self._epochs:
            self.stage, self._small_gains, self._stage_epochs = ("middle" if early else "late"), 0, 0

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "small_gains": self._small_gains,
            "stage_epochs": self._stage_epochs,
            "accuracy": self._accuracy,
            "metrics": dict(self._metrics),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stage, self._small_gains = state["stage"], state["small_gains"]
        self._stage_epochs = state["stage_epochs"]
        self._accuracy, self._metrics = state["accuracy"], dict(state["metrics"])


def _zscore(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std(correction=0).clamp(min=1e-12)
