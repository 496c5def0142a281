"""What the rounds of a federation cost, and what they come to by their target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from callbacks.energy import count_operations
from callbacks.federated.state import Round
from leanlight.contracts import FederatedData, FederatedModule

Scored = Literal["never", "before", "after"]

_BACKWARD = 3  # operations of a training step over those of an inference: forward, and twice as many backward
_LAST = 10  # rounds over which the final accuracy is averaged
_SCORE_BYTES = 4  # a scored client sends one float


class Costs:
    """Sums since the first round."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = {}
        self.label_totals: list[int] = []
        self.steps: dict[int, int] = {}  # of every client that trained

    def add(self, current: Round, scored: Scored, data: FederatedData, energy_pj: float) -> dict[str, float]:
        """Count a round that has ended; return what to log of it, without names of splits.

        Args:
            current: the round.
            scored: when its selector takes scores.
            data: who holds what.
            energy_pj: see `round_energy`.
        """
        chosen = [current.reports[client] for client in current.chosen]
        trained = [current.reports[client] for client in sorted(current.reports)]
        asked = len(current.candidates) if scored != "never" else 0
        model_bytes = max((report.received_bytes for report in trained), default=0)
        down = sum(report.received_bytes for report in trained) + len(current.dropped) * model_bytes
        if scored == "before":
            down += (asked - len(current.work) - len(current.dropped)) * model_bytes  # those who were only asked
        for report in trained:
            self.steps[report.client] = self.steps.get(report.client, 0) + report.steps
        labels = data.class_matrix[current.chosen].sum(0) if current.chosen else torch.zeros(data.class_matrix.shape[1])
        self.label_totals = (torch.tensor(self.label_totals or [0] * len(labels)) + labels).tolist()
        for name, value in {
            "uplink_mb": (sum(report.sent_bytes for report in chosen) + _SCORE_BYTES * asked) / 1e6,
            "downlink_mb": down / 1e6,
            "image_passes": float(sum(report.passes for report in trained)),
            "energy_mj": energy_pj / 1e9,
        }.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        values = {
            "loss": sum(report.loss for report in chosen) / len(chosen) if chosen else math.nan,
            "participants": float(len(chosen)),
            "dropped_clients": float(len(current.dropped)),
            "failed_clients": float(len(current.failed)),
            "label_entropy": entropy(labels),
            "label_entropy_total": entropy(torch.tensor(self.label_totals)),
            **self.totals,
            **_of_scores(current.scores, data.client_sizes),
        }
        return {name: value for name, value in values.items() if not math.isnan(value)}


def _of_scores(scores: Mapping[int, float], client_sizes: Sequence[int]) -> dict[str, float]:
    if not scores:
        return {}
    clients = sorted(scores)
    values = [scores[client] for client in clients]
    return {
        "score_mean": sum(values) / len(values),
        "score_max": max(values),
        "score_size_correlation": correlation(values, [client_sizes[client] for client in clients]),
    }


def round_energy(
    current: Round, scored: Scored, module: FederatedModule, image: Tensor, client_sizes: Sequence[int]
) -> float:
    """Picojoules of a round's local training and scoring, at the firing rates of its new global weights.

    Args:
        current: the round.
        scored: when its selector takes scores.
        module: has the global networks.
        image: (N, C, H, W) on its device; operations are counted on them, and taken for those of any image.
        client_sizes: items of every client.
    """
    inference: dict[int, float] = {}  # pJ an image, by network: many clients share one
    total = 0.0
    # Scoring is an inference on the client's data: two where training lies between.
    scorings = {"never": 0, "before": 1, "after": 2}[scored]
    for client in sorted({*current.reports, *current.scores}):
        network = module.network_of(client)
        if id(network) not in inference:
            was_training = network.training
            network.eval()
            inference[id(network)] = sum(layer.energy_pj for layer in count_operations(network, image))
            network.train(was_training)
        passes = current.reports[client].passes * _BACKWARD if client in current.reports else 0
        passes += client_sizes[client] * scorings if client in current.scores else 0
        total += passes * inference[id(network)]
    return total


def summarise(history: Sequence[Mapping[str, Any]], target: float | None) -> dict[str, float]:
    """Figures over all rounds so far, by validation; empty before the first.

    Args:
        history: an entry a round: its number as ``round``, its validation as ``val`` where there was one, and the sums
            of `Costs` up to it.
        target: validation value up to which costs are counted; where it is never reached, they are those of the whole
            run, and rounds one more.
    """
    validated = [entry for entry in history if "val" in entry]
    if not validated:
        return {}
    last = [entry["val"] for entry in validated[-_LAST:]]
    figures = {"accuracy_last": sum(last) / len(last)}
    if target is not None:
        reached = next((entry for entry in validated if entry["val"] >= target), None)
        entry = reached or history[-1]
        figures |= {
            "target_reached": float(reached is not None),
            "rounds_to_target": float(entry["round"] + (1 if reached else 2)),
            "passes_to_target": entry["image_passes"],
            "uplink_mb_to_target": entry["uplink_mb"],
            "energy_mj_to_target": entry["energy_mj"],
        }
    return figures


def entropy(counts: Tensor) -> float:
    """Entropy of a histogram (K,) over log K, in [0, 1]; 0 for an empty one."""
    share = counts.double() / max(float(counts.sum()), 1.0)
    positive = share[share > 0]
    return abs(float(-(positive * positive.log()).sum())) / math.log(len(counts)) if len(counts) > 1 else 0.0


def correlation(scores: Sequence[float], sizes: Sequence[int]) -> float:
    """Pearson's correlation of scores and client sizes; NaN where one of them does not vary."""
    pair = torch.tensor([list(scores), [float(size) for size in sizes]], dtype=torch.float64)
    if pair.shape[1] < 2 or bool((pair.std(1) == 0).any()):
        return math.nan
    return float(torch.corrcoef(pair)[0, 1])
