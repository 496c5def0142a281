"""Games: their batches, their facts, and what an agent asks of a DataModule of games."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from leanlight.contracts.batch import Batch
from leanlight.contracts.meta import DataMeta

# States (N, K, H, W) uint8, the last K frames with the newest last → one value an action, (N, A), on any device.
QFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Transition(Batch):
    """Reinforcement-learning transitions.

    Args:
        state: (N, K, H, W) uint8 stacked frames s.
        action: (N,) int64 a.
        reward: (N,) float32 r.
        next_state: (N, K, H, W) uint8 stacked frames s'.
        terminal: (N,) bool, true where no value is bootstrapped.
        discount: (N,) float32, γ to the power of the steps between s and s'.
    """

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    terminal: Tensor
    discount: Tensor


@dataclass(frozen=True)
class EpisodeBatch(Batch):
    """Evaluation episodes to play.

    Args:
        seed: (N,) int64, one an episode; it decides everything random in it.
    """

    seed: Tensor


@dataclass(frozen=True, kw_only=True)
class GameMeta(DataMeta):
    """Facts of a game.

    Args:
        actions: names of the actions; index = action.
        shape: (K, H, W) of a state: K stacked frames.
        random_score: mean score of random play, where it is known.
        human_score: score of a human tester, where it is known; of the suite's own games the best there is.
    """

    actions: tuple[str, ...]
    shape: tuple[int, int, int]
    random_score: float | None = None
    human_score: float | None = None


@dataclass(frozen=True)
class Episode:
    """One evaluation episode.

    Args:
        score: sum of unclipped rewards.
        decisions: actions taken.
        greedy: of them, decisions that asked the agent.
        max_q: largest value of any action at any greedy decision; 0 without one.
        q_spread: sample standard deviation (n - 1) over the actions at that decision; 0 without one.
        frames: (T, 3, H, W) uint8 pictures, where they were asked for.
    """

    score: float
    decisions: int
    greedy: int
    max_q: float
    q_spread: float
    frames: Tensor | None = None


@runtime_checkable
class GameData(Protocol):
    """A DataModule of games: training batches are `Transition`, evaluation batches `EpisodeBatch`."""

    meta: GameMeta

    def follow(self, values: QFunction) -> None:
        """Let training decisions be made by `values` from now on (with the exploration of this DataModule)."""

    def play(self, seeds: Sequence[int], values: QFunction, pictures: int = 0) -> list[Episode]:
        """Play evaluation episodes.

        Args:
            seeds: one an episode; it decides everything random in it.
            values: of the actions, for greedy decisions.
            pictures: how many pictures of the first episode to keep.
        """

    @property
    def frames(self) -> int:
        """Emulator frames seen in training so far."""

    @property
    def epsilon(self) -> float:
        """Present probability of a random action in training."""

    @property
    def recent_score(self) -> float | None:
        """Mean unclipped score of the last finished training games; none before the first."""
