"""Which widths clients train in a round, and which layer is the most informative (`docs/methods/sfedhifi.md`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanlight.contracts import UserError, derived_seed
from leanlight.contracts.ranges import PositiveShare
from lit_modules.sfedhifi.decomposition import factorised_layers

_TRIES = 100_000
LayerRule = Literal["max_rate", "min_rate", "random", "fixed", "all"]
WIDTHS = (0.25, 0.5, 0.75, 1.0)


def percent(width: float) -> str:
    """A width without a dot, for names of files and modules: 0.25 → ``25``."""
    return f"{round(100 * width)}"


def _generator(seed: int, number: int, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, purpose, number))


# ---- widths of clients ----


@dataclass(frozen=True)
class DynamicWidths:
    """Budgets that change: each joined client draws a width uniformly, all again until every width occurs (or, of
    fewer clients than widths, until all differ).

    Args:
        widths: p, ascending.
    """

    widths: tuple[PositiveShare, ...] = WIDTHS

    def draw(self, joined: Sequence[int], clients: int, seed: int, number: int) -> dict[int, float]:
        """Width by client; a function of the arguments alone.

        Args:
            joined: clients of the round.
            clients: how many there are in the federation.
            seed: of the run.
            number: of the round.
        """
        generator = _generator(seed, number, "widths")
        for _ in range(_TRIES):
            drawn = torch.randint(len(self.widths), (len(joined),), generator=generator).tolist()
            if len(set(drawn)) == min(len(self.widths), len(joined)):
                return {client: self.widths[i] for client, i in zip(sorted(joined), drawn, strict=True)}
        raise UserError(
            f"widths: no draw in {_TRIES} had each of {len(self.widths)} widths among {len(joined)} clients"
        )


@dataclass(frozen=True)
class FixedWidths:
    """Budgets tied to clients: their ids are cut into as many ranges of equal length as there are widths.

    Args:
        widths: p, ascending.
    """

    widths: tuple[PositiveShare, ...] = WIDTHS

    def draw(self, joined: Sequence[int], clients: int, seed: int, number: int) -> dict[int, float]:
        """As `DynamicWidths.draw`; a width may be missing."""
        return {client: self.widths[client * len(self.widths) // clients] for client in sorted(joined)}


# ---- firing rates at the inputs of factorised layers ----


@dataclass(frozen=True)
class InputRates:
    """Firing rates at the inputs of a network's factorised layers.

    Args:
        layers: paths of those with binary inputs.
        rates: (batches, layers) float64, mean inputs over time, items, channels and space.
    """

    layers: tuple[str, ...]
    rates: Tensor

    def profile(self) -> dict[str, float]:
        """Mean rate of each layer over the batches."""
        return dict(zip(self.layers, self.rates.mean(0).tolist(), strict=True))


def measure_rates(network: nn.Module, batches: Iterable[Tensor]) -> InputRates:
    """Run `network` in evaluation mode on `batches` of images (N, C, H, W); its mode is restored.

    Layers whose first input is not made of zeros and ones do not compete.
    """
    layers = factorised_layers(network)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            (x,) = inputs
            if not seen[name]:
                seen[name].append(((x == 0) | (x == 1)).all().double())
            seen[name].append(x.sum(dtype=torch.float64) / x.numel())

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                network(batch)
    finally:
        network.train(was_training)
        for handle in handles:
            handle.remove()
    found = [name for name in layers if seen[name]]
    if not found:
        return InputRates((), torch.empty(0, 0, dtype=torch.float64))
    # One copy for all: whether a layer's first input was binary, and its rates below.
    binary, *rates = torch.stack([torch.stack(seen[name]) for name in found], dim=1).cpu()
    competes = binary.bool()
    names = tuple(name for name, yes in zip(found, competes.tolist(), strict=True) if yes)
    return InputRates(names, torch.stack(rates)[:, competes] if names else torch.empty(0, 0, dtype=torch.float64))


# ---- the vote ----


@dataclass(frozen=True)
class Vote:
    """What a width votes for.

    Args:
        layer: that of most batches.
        rate: its mean rate over those batches (ρ_p).
    """

    layer: str
    rate: float


def vote(measured: InputRates, least: bool = False) -> Vote:
    """A width's vote: the layer that has the greatest rate in most batches. least: the smallest rate instead.

    Between equal rates the earlier layer wins, between equally many batches the layer with the more extreme mean rate
    over its own.
    """
    if not measured.layers or not len(measured.rates):
        raise UserError("hifi.layer: no factorised layer has binary input, so none can be chosen by firing rate")
    signed = -measured.rates if least else measured.rates
    winner = signed.argmax(1)
    counts = Counter(winner.tolist())
    most = max(counts.values())
    means = {layer: float(signed[winner == layer, layer].mean()) for layer in counts if counts[layer] == most}
    best = max(sorted(means), key=lambda layer: means[layer])
    return Vote(measured.layers[best], abs(means[best]))


def elect(votes: Mapping[float, Vote], least: bool = False) -> str:
    """The layer that most widths name; without a unique one, that of the width with the greatest rate (`least`:
    smallest), the narrowest of equals.
    """
    counts = Counter(votes[width].layer for width in sorted(votes)).most_common()
    if len(counts) == 1 or counts[0][1] > counts[1][1]:
        return counts[0][0]
    extreme = (min if least else max)(sorted(votes), key=lambda width: votes[width].rate)
    return votes[extreme].layer


@dataclass(frozen=True)
class InformativeLayer:
    """Which factorised layer is fused.

    The widths vote on ``max_rate`` and ``min_rate`` of the input firing rate; ``random`` draws every round. Before the
    first vote it is the last layer.

    Args:
        rule: ``max_rate`` (the paper), ``min_rate``, ``random``, ``fixed`` (the layer `name`) or ``all``.
        name: path of the layer for ``fixed``; the last one by default.
    """

    rule: LayerRule = "max_rate"
    name: str | None = None

    def choose(self, layers: Sequence[str], measured: Mapping[float, InputRates], seed: int, number: int) -> list[str]:
        """Paths of the layers to fuse; a function of the arguments alone.

        Args:
            layers: all factorised ones, in order of execution.
            measured: rates by width; empty before the first measurement.
            seed: of the run.
            number: of the round.
        """
        if self.rule == "all":
            return list(layers)
        if self.rule == "random":
            return [layers[int(torch.randint(len(layers), (), generator=_generator(seed, number, "layer")))]]
        if self.rule in ("max_rate", "min_rate") and measured:
            least = self.rule == "min_rate"
            return [elect({width: vote(rates, least) for width, rates in measured.items()}, least)]
        if self.name is not None and self.name not in layers:
            raise UserError(f"hifi.layer.name: expected one of {', '.join(layers)}, got {self.name!r}")
        return [self.name or layers[-1]]
