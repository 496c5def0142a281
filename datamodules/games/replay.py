"""Replay memory that stores every frame once, in a file mapped into memory, and survives a kill."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap

from leanlight.contracts import Transition, UserError

# What a row's action led to. A closing row holds the last frame of an episode and has no action.
GOES_ON, TERMINAL, TRUNCATED, CLOSING = range(4)


class ReplayMemory:
    """The newest `capacity` rows of experience; a row is a frame, the action taken there, and its reward.

    States are stacks of the last `history` frames, put together when they are sampled; at the beginning of an episode
    its first frame is repeated. The last frame of an episode is a closing row without action, so every transition,
    also over several steps, finds its next state a few rows on.

    Write in this order: `begin` with an episode's first frame; for every action `record`, then `observe` or, at the
    end, `close` with the next frame.

    Args:
        folder: of the arrays, 7 kB a row for 84x84 frames; `load_state_dict` goes on with those of an earlier process.
        capacity: rows that may be sampled.
        frame_shape: (H, W) of a frame, uint8.
        history: frames of a state.
        n_step: steps n of a transition.
        gamma: discount γ a step.
        slack: rows written after a `state_dict` that leave what it describes alone; a killed run writes them again.
    """

    def __init__(
        self,
        folder: Path,
        capacity: int,
        frame_shape: tuple[int, ...],
        history: int = 4,
        n_step: int = 1,
        gamma: float = 0.99,
        slack: int = 20_000,
    ) -> None:
        self.folder, self.capacity, self.history, self.n_step, self.slack = folder, capacity, history, n_step, slack
        self.size = capacity + slack
        self.head = 0  # rows written since the beginning; row r lies at r modulo size
        self._powers = (gamma ** np.arange(n_step + 1)).astype(np.float32)
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, self.size * int(np.prod(frame_shape)))
        self.frames = self._map("frames", np.uint8, frame_shape)
        self.actions = self._map("actions", np.uint8)
        self.rewards = self._map("rewards", np.float32)
        self.ends = self._map("ends", np.uint8)
        self.ages = self._map("ages", np.int32)  # steps since the episode's first frame
        self._written = self._map("written", np.int64, rows=1)  # how far any process has come

    def _map(self, name: str, kind: Any, shape: tuple[int, ...] = (), rows: int | None = None) -> np.ndarray:
        path, whole = self.folder / f"{name}.npy", (rows or self.size, *shape)
        if path.is_file():
            array = open_memmap(path, mode="r+")
            if array.shape == whole and array.dtype == kind:
                return array
        return open_memmap(path, mode="w+", dtype=kind, shape=whole)

    def __len__(self) -> int:
        return min(self.head, self.capacity)

    # -- writing

    def begin(self, frame: np.ndarray) -> None:
        """Write the first frame of an episode."""
        self._push(frame, 0)

    def record(self, action: int, reward: float, end: int = GOES_ON) -> None:
        """Write what was done at the newest frame, and what became of it.

        Args:
            action: the action taken there.
            reward: what it earned, as it is to be learned from.
            end: ``GOES_ON``, ``TERMINAL`` (no value is bootstrapped) or ``TRUNCATED``.
        """
        at = (self.head - 1) % self.size
        self.actions[at], self.rewards[at], self.ends[at] = action, reward, end

    def observe(self, frame: np.ndarray) -> None:
        """Write the next frame of the episode."""
        self._push(frame, int(self.ages[(self.head - 1) % self.size]) + 1)

    def close(self, frame: np.ndarray) -> None:
        """Write the last frame of the episode."""
        self.observe(frame)
        self.ends[(self.head - 1) % self.size] = CLOSING

    def _push(self, frame: np.ndarray, age: int) -> None:
        at = self.head % self.size
        self.frames[at], self.ages[at], self.ends[at] = frame, age, GOES_ON
        # The farthest row of any process: what a resumed run writes again was there before.
        self._written[0] = max(self.head + 1, int(self._written[0]) if self.head else 0)
        self.head += 1

    # -- reading

    def _stack(self, rows: np.ndarray) -> np.ndarray:
        """States (N, history, …) whose newest frames are at `rows` (N,)."""
        back = np.minimum(np.arange(self.history - 1, -1, -1), self.ages[rows % self.size][:, None])
        return self.frames[(rows[:, None] - back) % self.size]

    def newest(self) -> np.ndarray:
        """The present state (history, …) uint8."""
        return self._stack(np.array([self.head - 1]))[0]

    def _follow(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of n-step transitions from `rows` (N,): which of the n steps happen (N, n), rewards, ends."""
        at = (rows[:, None] + np.arange(self.n_step)) % self.size
        ends = self.ends[at]
        happens = np.ones_like(ends, bool)
        happens[:, 1:] = np.logical_and.accumulate(ends == GOES_ON, axis=1)[:, :-1]
        return happens, self.rewards[at], ends

    def _usable(self, rows: np.ndarray) -> np.ndarray:
        """Which rows begin a transition whose frames are all in the window."""
        at, oldest = rows % self.size, max(0, self.head - self.capacity)
        complete = rows - np.minimum(self.history - 1, self.ages[at]) >= oldest
        arrives = rows + self._follow(rows)[0].sum(1) < self.head
        return complete & arrives & (self.ends[at] != CLOSING)

    def sample(self, number: int, generator: np.random.Generator) -> Transition:
        """`number` transitions, uniformly and with replacement; UserError when the memory holds none."""
        oldest, newest = max(0, self.head - self.capacity), self.head - 1
        rows = np.empty(0, np.int64)
        for _ in range(1000):
            drawn = generator.integers(oldest, max(newest, oldest + 1), number)
            rows = np.concatenate([rows, drawn[self._usable(drawn)]])[:number]
            if len(rows) == number:
                return self.transitions(rows)
        raise UserError(
            f"replay_size: {self.capacity} rows hold hardly a transition of {self.n_step} steps on "
            f"{self.history} frames; raise it"
        )

    def transitions(self, rows: np.ndarray) -> Transition:
        """The transitions that begin at `rows` (N,), counted from the first row ever written."""
        happens, rewards, ends = self._follow(rows)
        steps = happens.sum(1)
        return Transition(
            state=torch.from_numpy(self._stack(rows)),
            action=torch.from_numpy(self.actions[rows % self.size].astype(np.int64)),
            reward=torch.from_numpy((rewards * self._powers[:-1] * happens).sum(1)),
            next_state=torch.from_numpy(self._stack(rows + steps)),
            terminal=torch.from_numpy(((ends == TERMINAL) & happens).any(1)),
            discount=torch.from_numpy(self._powers[steps]),
        )

    # -- resume

    def state_dict(self) -> dict[str, int]:
        """The cursor and the size, after everything written so far has reached the disk."""
        for array in (self.frames, self.actions, self.rewards, self.ends, self.ages, self._written):
            array.flush()  # type: ignore[attr-defined]
        return {"head": self.head, "size": self.size}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state`; UserError when the files are not those it describes any more."""
        written = int(self._written[0])
        if state["size"] != self.size or written < state["head"]:
            raise UserError(
                f"{self.folder}: the replay memory of this checkpoint ({state['size']} rows, {state['head']} written) "
                f"is not there (found {self.size} rows, {written} written); keep replay_size and slack, "
                "and keep_replay for runs that shall go on after their end; or start the run anew"
            )
        if written - state["head"] > self.slack:
            raise UserError(
                f"{self.folder}: {written - state['head']} rows were written after this checkpoint, more than "
                f"slack ({self.slack}); start anew with more slack or more frequent checkpoints"
            )
        self.head = state["head"]

    def delete(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"replay_size: its frames need {needed / 1e9:.1f} GB in {folder}, which has "
            f"{free / 1e9:.1f} GB free; lower it or choose another trainer.default_root_dir"
        )
