"""How a metric under noise is named and drawn, whatever the metric and the noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leanlight.contracts.media import Curve


@dataclass(frozen=True)
class UnderNoise:
    """A metric without noise, and at some levels of one or several kinds of noise.

    Args:
        clean: without noise.
        noisy: kind of noise → level → the metric.
        higher_is_better: what the metric is judged by; of an error, less is.
    """

    clean: float
    noisy: Mapping[str, Mapping[float, float]]
    higher_is_better: bool = True

    def values(self, prefix: str = "") -> dict[str, float]:
        """``<kind>_<level>`` → the metric."""
        return {
            f"{prefix}{kind}_{level:g}": value for kind, levels in self.noisy.items() for level, value in levels.items()
        }

    @property
    def mean(self) -> float:
        """Mean over kinds and levels."""
        values = list(self.values().values())
        return sum(values) / len(values)

    def losses(self) -> dict[str, float]:
        """What noise costs on average.

        ``drop``: how much worse the metric is than without noise, in its own unit, positive where noise harms.
        ``retention``: what is left of it, as a ratio, 1 where noise does nothing: noisy / clean, of an error clean /
        noisy. Where that ratio says nothing, since a part of it is not positive, there is no retention.
        """
        drop = self.clean - self.mean if self.higher_is_better else self.mean - self.clean
        kept, whole = (self.mean, self.clean) if self.higher_is_better else (self.clean, self.mean)
        return {"drop": drop} | ({"retention": kept / whole} if whole > 0 and kept >= 0 else {})

    def curve(self, xlabel: str, ylabel: str) -> Curve:
        """The metric over the level, 0 being without noise, a line a kind; all kinds have the same levels."""
        levels = list(next(iter(self.noisy.values())))
        lines = {kind: [self.clean, *values.values()] for kind, values in self.noisy.items()}
        return Curve([0.0, *levels], lines, xlabel, ylabel)
