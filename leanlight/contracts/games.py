"""What an agent asks of a DataModule of games."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from leanlight.contracts.meta import DataMeta

# States (N, K, H, W) uint8, the last K frames with the newest last → one value an action, (N, A), on any device.
QFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Episode:
    """One evaluation episode.

    score: sum of unclipped rewards. decisions: actions taken. greedy: of them, decisions that asked the agent. max_q:
    largest value of any action at any of these. q_spread: standard deviation over the actions there. Both are 0 in an
    episode without greedy decisions. frames: (T, 3, H, W) uint8 pictures, where they were asked for.
    """

    score: float
    decisions: int
    greedy: int
    max_q: float
    q_spread: float
    frames: Tensor | None = None


@runtime_checkable
class GameData(Protocol):
    """A DataModule of games: training batches are `Transition`, evaluation batches `EpisodeBatch`.

    meta: ``num_classes`` actions named ``classes``, states of ``shape`` (K, H, W); ``extra`` has ``frame_skip``, and
    where they are known ``random_score`` and ``human_score``.
    """

    meta: DataMeta

    def follow(self, values: QFunction) -> None:
        """Let training decisions be made by `values` from now on (with the exploration of this DataModule)."""

    def play(self, seeds: Sequence[int], values: QFunction, pictures: int = 0) -> list[Episode]:
        """Play one evaluation episode a seed; the first keeps its first `pictures` frames."""

    @property
    def frames(self) -> int:
        """Emulator frames seen in training so far."""

    @property
    def epsilon(self) -> float:
        """Present probability of a random action in training."""

    @property
    def recent_score(self) -> float | None:
        """Mean unclipped score of the last finished training games; none before the first."""
