"""The suite's own games: settings and scores, known before a game is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Board:
    """A member of the Catch family.

    Args:
        random: mean score of random play.
        best: mean of the best score that is possible for who knows all balls in advance; without random actions.
        settings: arguments of `datamodules.games.catch.Catch` that are not its defaults.
    """

    random: float
    best: float
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Side of a frame in pixels."""
        return int(self.settings.get("size", 8))


BOARDS = {
    "catch": Board(-0.75, 1.0),
    # Four balls are in sight, and a third of all cannot be reached: which to let fall has to be planned.
    "catch_hard": Board(-8.3, 3.6, {"size": 12, "balls": 10, "apart": 3}),
}
