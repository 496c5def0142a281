"""What the server of a federation of widths does, as pure functions of state dicts (`docs/methods/sfedhifi.md`).

Updates may come in any order: they are summed in that of client ids. Nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from leanlight.contracts import ClientUpdate, UserError, to_device
from leanlight.contracts.federated import State
from leanlight.contracts.ranges import NonNegativeInt, PositiveInt, PositiveShare
from lit_modules.federated.aggregation import FedAvg, Weighting, client_weights, weighted_mean

Models = dict[float, State]  # the server's, by width p
Core = Literal["naive", "sign_aligned"]
Residual = Literal["drop", "keep"]


def average_widths(
    models: Mapping[float, State],
    updates: Iterable[ClientUpdate],
    widths: Mapping[int, float],
    parameters: Collection[str],
    aggregator: FedAvg | None = None,
) -> Models:
    """Aggregate within each width: parameters and norm buffers, bases included. A width that nobody trained stays.

    Args:
        models: the server's, by width.
        updates: of the round.
        widths: by client.
        parameters: names that are no buffers, as far as a width has them.
        aggregator: `FedAvg` by default, or `FedNova`.
    """
    aggregate = aggregator or FedAvg()
    result: Models = {}
    for width, model in models.items():
        group = [update for update in _ordered(updates) if widths[update.client] == width]
        names = [name for name in parameters if name in model]
        result[width] = aggregate(model, group, names) if group else dict(model)
    return result


def share_bases(
    models: Mapping[float, State],
    updates: Iterable[ClientUpdate],
    bases: Collection[str],
    weighting: Weighting = "uniform",
) -> Models:
    """Put the mean over the clients of all widths of every basis into every model.

    Args:
        models: the server's, by width.
        updates: of the round.
        bases: their keys, see `basis_keys`.
        weighting: of the clients.
    """
    ordered = _ordered(updates)
    if not ordered:
        return _copies(models)
    states = [{key: update.state[key] for key in bases} for update in ordered]
    shared = weighted_mean(states, client_weights(ordered, weighting))
    return {width: {**model, **shared} for width, model in models.items()}


def start_alike(models: Mapping[float, State], bases: Collection[str]) -> Models:
    """Give all widths the bases of the smallest, as at the start of a federation."""
    smallest = models[min(models)]
    return {width: {**model, **{key: smallest[key] for key in bases}} for width, model in models.items()}


# ---- HeteroFL ----


def sub_model(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """The leading part of every tensor of a wide model that a narrow one has: its first channels (HeteroFL, Diao et
    al., ICLR 2021). like: any state of the narrow model; only its shapes count.
    """
    return {key: state[key][_window(narrow)].clone() for key, narrow in like.items()}


def average_slices(
    state: Mapping[str, Tensor],
    updates: Iterable[ClientUpdate],
    weighting: Weighting = "uniform",
    head: Collection[str] = (),
    classes: Tensor | None = None,
) -> State:
    """HeteroFL: each element of the wide `state` becomes the mean over the clients whose sub-model holds it; elements
    that nobody holds stay. Counters, which are integers, keep the greatest.

    Args:
        state: of the widest network.
        updates: of the round, of any width.
        weighting: of the clients.
        head: keys of the classifier whose rows are averaged over the clients that have the class.
        classes: (clients, K) bool, the classes that each has; needed with `head`.
    """
    ordered = _ordered(updates)
    weights = client_weights(ordered, weighting)
    result = {}
    for key, old in state.items():
        if not old.is_floating_point():
            result[key] = torch.stack([old, *(update.state[key] for update in ordered)]).amax(0)
            continue
        total, mass = torch.zeros_like(old), torch.zeros_like(old)
        for update, weight in zip(ordered, weights, strict=True):
            part = update.state[key]
            held = torch.full_like(part, weight)
            if key in head:
                assert classes is not None
                held *= classes[update.client].view(-1, *[1] * (part.ndim - 1))
            total[_window(part)] += held * part
            mass[_window(part)] += held
        result[key] = torch.where(mass > 0, total / mass, old)
    return result


# ---- HIFI ----


@dataclass(frozen=True)
class HIFI:
    """Fusion of one factor over all widths, through the core of its Tucker decomposition.

    Args:
        rounds: last round that fuses, counted from 1; 0 never does; 225 of 500 in the paper.
        every: only rounds that it divides fuse.
        rank_ratio: share of the smallest width's rows and columns that the core has; 0.25 as published.
        core: how cores are averaged: ``sign_aligned``, or ``naive`` as published; see `fuse_factors`.
        residual: ``drop`` what the core leaves out, as published, or ``keep`` it.
    """

    rounds: NonNegativeInt = 225
    every: PositiveInt = 1
    rank_ratio: PositiveShare = 0.25
    core: Core = "sign_aligned"
    residual: Residual = "drop"

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.every < 1:
            raise UserError(f"hifi.rounds, hifi.every: expected at least 0 and 1, got {self.rounds} and {self.every}")
        if not 0.0 < self.rank_ratio <= 1.0:
            raise UserError(f"hifi.rank_ratio: expected a number in (0, 1], got {self.rank_ratio}")

    def active(self, number: int) -> bool:
        """Whether round `number`, counted from 1, fuses."""
        return number <= self.rounds and number % self.every == 0

    def fuse(self, models: Mapping[float, State], keys: Iterable[str]) -> Models:
        """New models by width in which the factors `keys` are fused; all else is the same."""
        fused = _copies(models)
        widths = sorted(fused)
        for key in keys:
            factors = [fused[width][key] for width in widths]
            parts = fuse_factors(factors, self.rank_ratio, self.core, self.residual)
            for width, part in zip(widths, parts, strict=True):
                fused[width][key] = part
        return fused


def fuse_factors(
    factors: Sequence[Tensor], rank_ratio: float = 0.25, core: Core = "sign_aligned", residual: Residual = "drop"
) -> list[Tensor]:
    """Replace the core of every factor by the mean of all cores.

    Factors are matrices, so the Tucker decomposition (higher-order orthogonal
    iteration) is the truncated singular value decomposition with ranks round(rank_ratio · min D) and round(rank_ratio
    · min n), and the core is diagonal: singular values up to sign. The iteration makes the largest entry of each left
    and of each right vector positive, two rules that know nothing of each other, so cores have mixed signs which differ
    between widths. ``naive`` averages those; ``sign_aligned`` turns the vectors so that all cores are positive.
    ``keep`` adds to each factor what its own truncation left out.

    Args:
        factors: (D_p, n_p, 1, 1), one a width.
        rank_ratio: share of the smallest width's rows and columns.
        core: ``sign_aligned`` or ``naive``.
        residual: ``drop`` or ``keep``.
    """
    rank = _rank(factors, rank_ratio)
    parts = []
    for factor in factors:
        left, values, right = torch.linalg.svd(factor.detach().cpu().double().flatten(1), full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank].T
        if core == "naive":
            left, turned_left = _largest_entry_positive(left)
            right, turned_right = _largest_entry_positive(right)
            values = values * turned_left * turned_right
        parts.append((left, values, right))
    mean = torch.stack([values for _, values, _ in parts]).mean(0)
    fused = []
    for factor, (left, values, right) in zip(factors, parts, strict=True):
        new = (left * mean) @ right.T
        if residual == "keep":
            new = new + factor.detach().cpu().double().flatten(1) - (left * values) @ right.T
        fused.append(to_device(new.view(factor.shape).to(factor.dtype), factor.device))
    return fused


def _rank(factors: Sequence[Tensor], rank_ratio: float) -> int:
    if any(factor.shape[2:].numel() != 1 for factor in factors):
        raise UserError(f"hifi: expected factors (D, n, 1, 1), got {[tuple(factor.shape) for factor in factors]}")
    ranks = [round(rank_ratio * min(factor.shape[axis] for factor in factors)) for axis in (0, 1)]
    if min(ranks) < 1:
        raise UserError(f"hifi.rank_ratio: {rank_ratio} leaves ranks {ranks} of the smallest width; raise it")
    return min(ranks)  # the other vectors of the longer side meet a core of zeros


def _largest_entry_positive(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Columns (n, r) turned so that each one's entry of greatest size is positive, and the signs (r,)."""
    signs = vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).squeeze(0).sign()
    return vectors * signs, signs


def _ordered(updates: Iterable[ClientUpdate]) -> list[ClientUpdate]:
    return sorted(updates, key=lambda update: update.client)


def _copies(models: Mapping[float, State]) -> Models:
    return {width: dict(model) for width, model in models.items()}


def _window(part: Tensor) -> tuple[slice, ...]:
    return tuple(slice(size) for size in part.shape)
