"""Catch: the smallest game played from pixels, for tests and first runs."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class Catch(gymnasium.Env[np.ndarray, int]):
    """A ball falls from a random column; a paddle of one pixel on the ground moves left, stays or moves right.

    Observations are (8, 8) uint8, 255 at ball and paddle. After 7 steps the ball is at the ground: reward 1 if the
    paddle is there, -1 otherwise, and the episode ends. The best policy scores 1, a random one about -0.74.

    Args:
        size: side of the board in pixels; the paddle starts in the middle.
        render_mode: as gymnasium wants it; pictures are always arrays.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012  # gymnasium's own way

    def __init__(self, size: int = 8, render_mode: str | None = "rgb_array") -> None:
        self.size, self.render_mode = size, render_mode
        self.observation_space = gymnasium.spaces.Box(0, 255, (size, size), np.uint8)
        self.action_space: Any = gymnasium.spaces.Discrete(3)
        self._ball, self._paddle = (0, 0), 0

    def get_action_meanings(self) -> list[str]:
        """Names of the actions, as Atari environments give them."""
        return ["LEFT", "NOOP", "RIGHT"]

    def _frame(self) -> np.ndarray:
        frame = np.zeros((self.size, self.size), np.uint8)
        frame[self._ball] = frame[-1, self._paddle] = 255
        return frame

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a game."""
        super().reset(seed=seed)
        self._ball, self._paddle = (0, int(self.np_random.integers(self.size))), self.size // 2
        return self._frame(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the paddle, let the ball fall by one row."""
        self._paddle = min(max(self._paddle + int(action) - 1, 0), self.size - 1)
        self._ball = (self._ball[0] + 1, self._ball[1])
        landed = self._ball[0] == self.size - 1
        reward = (1.0 if self._ball[1] == self._paddle else -1.0) if landed else 0.0
        return self._frame(), reward, landed, False, {}

    def render(self) -> np.ndarray:
        """(size, size, 3) uint8: ball white, paddle orange."""
        picture = np.repeat(self._frame()[:, :, None], 3, axis=2)
        picture[-1, self._paddle] = (230, 120, 30)
        return picture
