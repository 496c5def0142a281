"""Client credit: how much local training changes a network's firing (SFedCA, arXiv:2406.12200)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leanlight.contracts import ClientUpdate, Measurement, Selector, UserError
from leanlight.contracts.ranges import NonNegativeInt

Layers = Literal["all", "first", "middle", "last"]
Order = Literal["top", "bottom", "random", "skip_top", "top_and_bottom"]


def firing_intensity(rates: Tensor, layers: Layers = "all") -> float:
    """Sum of firing rates (L, T) over layers and steps. ``middle``: the second and third layer."""
    chosen = {"all": rates, "first": rates[:1], "middle": rates[1:3], "last": rates[-1:]}[layers]
    return float(chosen.sum(dtype=torch.float64))


@dataclass(frozen=True)
class CreditSelection(Selector):
    """Take the candidates with the largest credit: those whose firing changes most in local training (SFedCA).

    ``total_abs`` is ``c_k = |F(w_k) - F(w_r)|`` with firing intensity F on the client's own data, w_r the received and
    w_k the locally trained weights; ``signed`` leaves the absolute value out; ``class_abs``, of the journal version, is
    ``Σ_c |ρ_c(w_k) - ρ_c(w_r)|`` with the mean firing rate ρ_c of the client's samples of class c.

    Args:
        mode: of the credit: ``total_abs`` (the paper), ``signed`` or ``class_abs``.
        layers: those that F counts: ``all`` (the paper), ``first``, ``middle`` (second and third) or ``last``.
        order: ``top`` (the paper); controls: ``bottom``, ``random``, ``skip_top``, ``top_and_bottom`` (half and half).
        skip: the largest credits that ``skip_top`` leaves out.
        per_step: divide the credit by the client's local steps.
    """

    mode: Literal["total_abs", "signed", "class_abs"] = "total_abs"
    layers: Layers = "all"
    order: Order = "top"
    skip: NonNegativeInt = 1
    per_step: bool = False
    scored = "after"

    def __post_init__(self) -> None:
        if self.mode == "class_abs" and self.layers != "all":
            raise UserError(f"selector.layers: expected all with mode class_abs, got {self.layers}")

    def score(self, before: Measurement, after: Measurement | None, update: ClientUpdate | None) -> float:
        assert after is not None
        assert update is not None
        if self.mode == "class_abs":
            credit = float((after.class_rates - before.class_rates).abs().sum(dtype=torch.float64))
        else:
            credit = firing_intensity(after.rates, self.layers) - firing_intensity(before.rates, self.layers)
            credit = abs(credit) if self.mode == "total_abs" else credit
        return credit / max(update.steps, 1) if self.per_step else credit

    def choose(self, scores: Mapping[int, float], count: int, generator: torch.Generator) -> list[int]:
        ranked = super().choose(scores, len(scores), generator)
        if self.order == "random":
            return [ranked[i] for i in torch.randperm(len(ranked), generator=generator)[:count].tolist()]
        if self.order == "bottom":
            return sorted(scores, key=lambda client: (scores[client], client))[:count]
        if self.order == "skip_top":
            return ranked[min(self.skip, max(len(ranked) - count, 0)) :][:count]
        if self.order == "top_and_bottom":
            half = -(-count // 2)
            return [*ranked[:half], *ranked[half:][len(ranked[half:]) - (count - half) :]]
        return ranked[:count]

    def may_win(self, scores: Mapping[int, float], count: int) -> Collection[int]:
        if self.order in ("top", "bottom"):
            return super().may_win(scores, count)
        return list(scores)


@dataclass(frozen=True)
class HighFiring(Selector):
    """Take the candidates on whose data the received weights fire most: needs no training, and is a control.

    Args:
        layers: those that the firing intensity F counts: ``all``, ``first``, ``middle`` (second and third) or ``last``.
    """

    layers: Layers = "all"
    scored = "before"

    def score(self, before: Measurement, after: Measurement | None, update: ClientUpdate | None) -> float:
        return firing_intensity(before.rates, self.layers)
