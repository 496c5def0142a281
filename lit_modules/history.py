"""Numbers that a module keeps over training to draw them as curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leanlight.contracts import Curve


class History:
    """Lists of values by name, plain enough for a checkpoint that loads with ``weights_only=True``."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {}

    def add(self, **values: Any) -> None:
        """Append a value to each of these names."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def __getitem__(self, name: str) -> list[Any]:
        """All values of a name so far; empty for an unknown one."""
        return self.values.get(name, [])

    def curve(self, x: str, series: Mapping[str, str], xlabel: str, ylabel: str) -> Curve | None:
        """Lines over the values of `x`, or None where there are fewer than two points.

        Args:
            x: name of the horizontal values.
            series: label of each line → name of its values; those not as long as `x` are left out.
            xlabel: of the horizontal axis.
            ylabel: of the vertical axis.
        """
        points = self[x]
        lines = {label: self[name] for label, name in series.items() if len(self[name]) == len(points)}
        return Curve(points, lines, xlabel, ylabel) if len(points) > 1 and lines else None

    def state_dict(self) -> dict[str, list[Any]]:
        """A copy of the lists."""
        return {name: list(values) for name, values in self.values.items()}

    def load_state_dict(self, state: Mapping[str, list[Any]]) -> None:
        """Take over what `state_dict` gave."""
        self.values = {name: list(values) for name, values in state.items()}
