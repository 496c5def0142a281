"""Making decisions in games, several at once, for training and for evaluation."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch

from datamodules.games.replay import GOES_ON, TERMINAL, TRUNCATED, ReplayMemory
from leanlight.contracts import Episode, QFunction, Transition, UserError, derived_seed

Game = gymnasium.Env[np.ndarray, int]
_RESET = -1  # in the log of actions
_BLOCK = 4096  # decisions whose random numbers are drawn together
_SEEDED_EVERY = 5_000  # decisions between games that begin from a seed; seeding an emulator takes 0.1 s
_RECENT = 100  # training games in the mean score


def _game_seed(*parts: object) -> int:
    """A seed that emulators take, a function of `parts`."""
    return derived_seed(*parts) % 2**31


@dataclass(frozen=True)
class Exploration:
    """Probability ε of a random action as a function of the decisions made; it falls linearly, then stays.

    Args:
        start: ε before the first decision.
        end: ε after the last of `decisions`.
        decisions: until `end` is reached; 0: at once.
    """

    start: float = 1.0
    end: float = 0.1
    decisions: int = 1_000_000

    def __call__(self, decision: int) -> float:
        share = min(1.0, decision / self.decisions) if self.decisions else 1.0
        return self.start + (self.end - self.start) * share


class TrainingGame:
    """Plays one game after the other and writes what happens into a replay memory.

    Everything random is a function of `seed` and of counters. So the whole state is: counters, the cursor of the
    memory, and the actions since the game last began from a seed; a resumed run takes these actions again.

    Args:
        game: observations are single frames (H, W) uint8.
        memory: where experience goes.
        exploration: probability of a random action.
        seed: of games and exploration.
        clip: keep only the sign of rewards in the memory.
        bootstrap_on_truncation: whether a transition that meets the time limit has a future.
    """

    def __init__(
        self,
        game: Game,
        memory: ReplayMemory,
        exploration: Exploration,
        seed: int,
        clip: bool = True,
        bootstrap_on_truncation: bool = False,
    ) -> None:
        self.game, self.memory, self.exploration, self.seed = game, memory, exploration, seed
        self.clip, self.bootstrap_on_truncation = clip, bootstrap_on_truncation
        self.decisions = 0  # without those that filled the memory
        self.total = 0
        self.scores: list[float] = []  # of the last games
        self._score = 0.0
        self._seedings = 0
        self._log: list[int] = []
        self._block = -1
        self._draws = np.empty((2, 0))

    @property
    def epsilon(self) -> float:
        """Present probability of a random action."""
        return self.exploration(self.decisions)

    def fill(self, rows: int, progress: Callable[[int], None] = lambda done: None) -> None:
        """Play at random until the memory has `rows` rows, and the episode to its end."""
        if self.memory.head == 0:
            self._begin()
        ended = False
        while self.memory.head < rows or not ended:
            ended = self._act(self._random(self.total)[1])
            progress(min(self.memory.head, rows))

    def explore(self) -> int | None:
        """With probability ε the action that the next decision takes at random, else None."""
        chance, action = self._random(self.total)
        return action if chance < self.epsilon else None

    def take(self, action: int) -> None:
        """Make a decision."""
        self.decisions += 1
        self._act(action)

    def _random(self, number: int) -> tuple[float, int]:
        """A number in [0, 1) and an action, both uniform, for the decision of this number."""
        block, place = divmod(number, _BLOCK)
        if block != self._block:
            self._draws = np.random.default_rng([self.seed, 1, block]).random((2, _BLOCK))
            self._block = block
        chance, action = self._draws[:, place]
        return float(chance), int(action * self.game.action_space.n)  # type: ignore[attr-defined]

    def _act(self, action: int) -> bool:
        """Take an action and remember it; whether the episode ended."""
        frame, given, terminated, truncated, info = self.game.step(action)
        reward = float(given)
        self._log.append(action)
        self.total += 1
        self._score += reward
        end = GOES_ON
        if terminated or truncated:
            end = TRUNCATED if truncated and not terminated and self.bootstrap_on_truncation else TERMINAL
        self.memory.record(action, float(np.sign(reward)) if self.clip else reward, end)
        if end == GOES_ON:
            self.memory.observe(frame)
            return False
        self.memory.close(frame)
        self._next(goes_on=bool(info.get("life_lost")))
        return True

    def _begin(self) -> None:
        """Start a game from a seed."""
        frame, _ = self.game.reset(seed=_game_seed(self.seed, "game", self._seedings))
        self._seedings += 1
        self._log = []
        self.memory.begin(frame)

    def _next(self, goes_on: bool) -> None:
        """Start the next episode, in the same game or in a new one."""
        new_game = True
        if not goes_on and len(self._log) >= _SEEDED_EVERY:
            self._begin()
        else:
            frame, info = self.game.reset()
            self._log.append(_RESET)
            self.memory.begin(frame)
            new_game = bool(info.get("new_game", True))
        if new_game:
            self.scores = [*self.scores, self._score][-_RECENT:]
            self._score = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, in tensors, numbers and strings."""
        return {
            "memory": self.memory.state_dict(),
            "seed": self.seed,
            "seedings": self._seedings,
            "log": torch.tensor(self._log, dtype=torch.int16),
            **{name: getattr(self, name) for name in ("decisions", "total", "scores", "_score")},
        }

    def load_state_dict(self, state: Mapping[str, Any], trained: bool = False) -> None:
        """Bring game and memory to where `state_dict` was taken; takes the time of at most a long game.

        Args:
            state: what `state_dict` gave.
            trained: nothing will be played or drawn any more; only what was counted comes back.
        """
        self.decisions, self.total = state["decisions"], state["total"]
        if trained:
            self.scores = list(state["scores"])
            return
        self.memory.load_state_dict(state["memory"])
        self.seed, self._seedings = state["seed"], state["seedings"]
        self.scores, self._score = list(state["scores"]), state["_score"]
        self._block = -1
        self._log = state["log"].tolist()
        if self._seedings:
            self.game.reset(seed=_game_seed(self.seed, "game", self._seedings - 1))
        for action in self._log:
            if action == _RESET:
                self.game.reset()
            else:
                self.game.step(action)


class TrainingGames:
    """Training games played side by side, each with its replay memory; the agent decides for all at once.

    Everything random is a function of seeds and of counters, so all of them together go on exactly, too.

    Args:
        games: the games.
    """

    def __init__(self, games: Sequence[TrainingGame]) -> None:
        self.games = list(games)
        self.values: QFunction | None = None  # makes the greedy decisions

    @property
    def total(self) -> int:
        """Decisions made so far, also those that filled the memories."""
        return sum(game.total for game in self.games)

    @property
    def epsilon(self) -> float:
        """Present probability of a random action."""
        return self.games[0].epsilon

    @property
    def recent_score(self) -> float | None:
        """Mean score of the last finished games; none before the first."""
        scores = [score for game in self.games for score in game.scores]
        return float(np.mean(scores)) if scores else None

    @property
    def rows(self) -> int:
        """Rows written into the memories so far."""
        return sum(game.memory.head for game in self.games)

    def fill(self, rows: int, progress: Callable[[int], None] = lambda done: None) -> None:
        """Play at random until the memories have `rows` rows in all, and the episodes to their ends."""
        done = 0
        for game in self.games:
            game.fill(-(-rows // len(self.games)), lambda now, done=done: progress(done + now))  # type: ignore[misc]
            done += game.memory.head

    def decide(self) -> None:
        """One decision of every game: at random with probability ε, else the action of the largest value."""
        actions = [game.explore() for game in self.games]
        greedy = [number for number, action in enumerate(actions) if action is None]
        if greedy:
            assert self.values is not None
            states = torch.from_numpy(np.stack([self.games[number].memory.newest() for number in greedy]))
            for number, action in zip(greedy, self.values(states).argmax(1).tolist(), strict=True):
                actions[number] = action
        for game, action in zip(self.games, actions, strict=True):
            assert action is not None
            game.take(action)

    def sample(self, number: int) -> Transition:
        """`number` transitions of all memories, a function of how far the games are."""
        generator = np.random.default_rng([self.games[0].seed, 4, self.total])
        memories = [game.memory for game in self.games]
        if len(memories) == 1:
            return memories[0].sample(number, generator)
        sizes = np.array([len(memory) for memory in memories], float)
        shares = generator.multinomial(number, sizes / sizes.sum())
        parts = [memory.sample(int(n), generator) for memory, n in zip(memories, shares, strict=True)]
        return Transition(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Transition)))

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs, in tensors, numbers and strings."""
        return {"games": [game.state_dict() for game in self.games]}

    def load_state_dict(self, state: Mapping[str, Any], trained: bool = False) -> None:
        """Bring all games to where `state_dict` was taken, `trained` as there. UserError for another number."""
        if len(state["games"]) != len(self.games):
            asked, there = len(self.games), len(state["games"])
            raise UserError(f"training_games: got {asked}, but the checkpoint is of {there}")
        for game, own in zip(self.games, state["games"], strict=True):
            game.load_state_dict(own, trained)

    def delete(self) -> None:
        """Remove the memories."""
        for game in self.games:
            game.memory.delete()


class _Evaluation:
    """One evaluation episode under way."""

    def __init__(self, game: Game, seed: int, history: int, pictures: int) -> None:
        self.game, self.pictures = game, pictures
        self.random = np.random.default_rng([seed, 3])
        frame, _ = game.reset(seed=seed)
        self.stack = deque([frame] * history, history)
        self.shown: list[Any] = []
        self.over = False
        self.score = self.max_q = self.spread = 0.0
        self.decisions = self.greedy = 0
        self._show()

    def explores(self, epsilon: float) -> bool:
        return bool(self.random.random() < epsilon)

    def judge(self, values: np.ndarray) -> int:
        """Note the values (A,) of a greedy decision; return its action."""
        if self.greedy == 0 or values.max() > self.max_q:
            self.max_q, self.spread = float(values.max()), float(values.std(ddof=1))
        self.greedy += 1
        return int(values.argmax())

    def act(self, action: int) -> None:
        frame, reward, terminated, truncated, _ = self.game.step(action)
        self.stack.append(frame)
        self.score += float(reward)
        self.decisions += 1
        self.over = terminated or truncated
        self._show()

    def _show(self) -> None:
        if len(self.shown) < self.pictures:
            self.shown.append(self.game.render())

    def result(self) -> Episode:
        frames = torch.from_numpy(np.stack(self.shown)).permute(0, 3, 1, 2) if self.shown else None
        return Episode(self.score, self.decisions, self.greedy, self.max_q, self.spread, frames)


def play(
    games: Sequence[Game], seeds: Sequence[int], values: QFunction, epsilon: float, history: int, pictures: int = 0
) -> list[Episode]:
    """Play one episode a game, side by side, so that greedy decisions are made together.

    An episode is a function of its seed and of `values`.

    Args:
        games: as many as `seeds`, or more.
        seeds: one an episode.
        values: of the actions, for greedy decisions.
        epsilon: probability of a random action.
        history: frames of a state.
        pictures: how many pictures of the first episode to keep.
    """
    running = episodes = [
        _Evaluation(game, seed, history, pictures if number == 0 else 0)
        for number, (game, seed) in enumerate(zip(games, seeds, strict=True))
    ]
    while running:
        greedy = []
        for episode in running:
            if episode.explores(epsilon):
                episode.act(int(episode.random.integers(episode.game.action_space.n)))  # type: ignore[attr-defined]
            else:
                greedy.append(episode)
        if greedy:
            states = torch.from_numpy(np.stack([np.stack(episode.stack) for episode in greedy]))
            for episode, row in zip(greedy, values(states).float().cpu().numpy(), strict=True):
                episode.act(episode.judge(row))
        running = [episode for episode in running if not episode.over]
    return [episode.result() for episode in episodes]


def open_memory(folder: Path, game: Game, **settings: Any) -> ReplayMemory:
    """A replay memory for the frames of `game`."""
    shape = game.observation_space.shape
    assert shape is not None
    return ReplayMemory(folder, frame_shape=shape, **settings)
