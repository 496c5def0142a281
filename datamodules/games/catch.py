"""Catch: the smallest game played from pixels, for tests and first runs, and a harder member of its family."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class Catch(gymnasium.Env[np.ndarray, int]):
    """Balls fall from random columns; a paddle of one pixel on the ground moves left, stays or moves right.

    Observations are (size, size) uint8, 255 at balls and paddle. A ball reaches the ground after size - 1 steps: reward
    1 if the paddle is there, -1 otherwise. The episode ends with the last ball.

    Args:
        size: side of the board in pixels; the paddle starts in the middle.
        balls: of an episode.
        apart: steps between the starts of two balls; with fewer than a ball takes to fall, several are in sight, and
            those that lie farther apart than the paddle gets in time cannot all be caught.
        render_mode: as gymnasium wants it; pictures are always arrays.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012  # gymnasium's own way

    def __init__(self, size: int = 8, balls: int = 1, apart: int = 1, render_mode: str | None = "rgb_array") -> None:
        self.size, self.balls, self.apart, self.render_mode = size, balls, apart, render_mode
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size), np.uint8)
        self.action_space: Any = gymnasium.spaces.Discrete(3)
        self._falling: list[tuple[int, int]] = []  # (row, column), the lowest first
        self._started = self._steps = self._paddle = 0

    def get_action_meanings(self) -> list[str]:
        """Names of the actions, as Atari environments give them."""
        return ["LEFT", "NOOP", "RIGHT"]

    def _frame(self) -> np.ndarray:
        frame = np.zeros((self.size, self.size), np.uint8)
        for ball in self._falling:
            frame[ball] = 255
        frame[-1, self._paddle] = 255
        return frame

    def _start_ball(self) -> None:
        self._falling.append((0, int(self.np_random.integers(self.size))))
        self._started += 1

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a game."""
        super().reset(seed=seed)
        self._falling, self._started, self._steps = [], 0, 0
        self._start_ball()
        self._paddle = self.size // 2
        return self._frame(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the paddle, let the balls fall by one row."""
        self._steps += 1
        self._paddle = min(max(self._paddle + int(action) - 1, 0), self.size - 1)
        self._falling = [(row + 1, column) for row, column in self._falling]
        reward, over = 0.0, False
        if self._falling and self._falling[0][0] == self.size - 1:
            reward = 1.0 if self._falling[0][1] == self._paddle else -1.0
            over = self._started == self.balls and len(self._falling) == 1
            if not over:  # a ball on the ground would look like a paddle
                del self._falling[0]
        if self._started < self.balls and self._steps % self.apart == 0:
            self._start_ball()
        return self._frame(), reward, over, False, {}

    def render(self) -> np.ndarray:
        """(size, size, 3) uint8: balls white, paddle orange."""
        picture = np.repeat(self._frame()[:, :, None], 3, axis=2)
        picture[-1, self._paddle] = (230, 120, 30)
        return picture
