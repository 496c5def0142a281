"""Rules that choose clients without looking at spikes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from leanlight.contracts import ClientUpdate, Measurement, Selector


@dataclass(frozen=True)
class RandomClients(Selector):
    """All candidates, drawn uniformly (FedAvg)."""


@dataclass(frozen=True)
class LargestClients(Selector):
    """The clients with most data: a control, to see whether a score is more than size."""

    def candidates(self, sizes: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
        holders = [client for client, size in enumerate(sizes) if size > 0]
        return sorted(sorted(holders, key=lambda client: (-sizes[client], client))[:count])


@dataclass(frozen=True)
class PowerOfChoice(Selector):
    """The candidates on whose data the received weights have the largest mean loss (Cho et al. 2022, arXiv:2010.01243).

    No training is spent on candidates that are not chosen.

    Args:
        draw: of the candidates: ``by_size``, in proportion to their data (the paper), or ``uniform`` (SFedCA's code).
    """

    draw: Literal["by_size", "uniform"] = "by_size"
    scored = "before"

    def candidates(self, sizes: Sequence[int], count: int, generator: torch.Generator) -> list[int]:
        if self.draw == "uniform":
            return super().candidates(sizes, count, generator)
        holders = sum(size > 0 for size in sizes)
        weights = torch.tensor(sizes, dtype=torch.float64)
        return sorted(torch.multinomial(weights, min(count, holders), generator=generator).tolist())

    def score(self, before: Measurement, after: Measurement | None, update: ClientUpdate | None) -> float:
        return before.loss


@dataclass(frozen=True)
class LargestUpdate(Selector):
    """The candidates whose local training moves the weights furthest (optimal client sampling, Chen et al. 2020)."""

    scored = "after"

    def score(self, before: Measurement, after: Measurement | None, update: ClientUpdate | None) -> float:
        assert update is not None
        return update.distance
