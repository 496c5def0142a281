"""Pictures of a federation of widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from leanlight.contracts import Bars, Curve, MediaItem, Table


def accuracy_by_width(rounds: Sequence[int], accuracy: Sequence[Sequence[float]], widths: Sequence[float]) -> Curve:
    """One line a width.

    Args:
        rounds: those that were validated.
        accuracy: in each of them, one number a width.
        widths: p, ascending.
    """
    lines = zip(widths, zip(*accuracy, strict=True), strict=True)
    return Curve(rounds, {f"p = {width}": list(values) for width, values in lines}, "round", "accuracy")


def fused_layers(rounds: Sequence[int], fused: Sequence[Sequence[str]], layers: Sequence[str]) -> Curve:
    """For every layer that was ever fused, in which rounds.

    Args:
        rounds: those in which something was fused.
        fused: the layers of each of them.
        layers: all layers, in order of execution.
    """
    series = {
        layer: [float(layer in chosen) for chosen in fused]
        for layer in layers
        if any(layer in chosen for chosen in fused)
    }
    return Curve(rounds, series, "round", "fused (1) or not (0)")


def input_rates(profiles: Mapping[str, Mapping[str, float]]) -> dict[str, MediaItem]:
    """Firing rates at the inputs of the layers. profiles: width in percent → layer → rate."""
    return {f"input_rates_at_{width}": Bars(profile, "input firing rate") for width, profile in profiles.items()}


def sizes(networks: Mapping[float, nn.Module]) -> Table:
    """Parameters and megabytes (10**6) of each width's network."""
    rows = []
    for width, network in networks.items():
        count = sum(parameter.numel() for parameter in network.parameters())
        size = sum(value.numel() * value.element_size() for value in network.state_dict().values())
        rows.append((width, count, size / 1e6))
    return Table(("width", "parameters", "MB"), rows)
