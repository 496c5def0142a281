"""Pictures of a federation: who holds what, who was chosen with which score, and what accuracy cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from leanlight.contracts import Curve, Heatmap, MediaItem, Table

History = Sequence[Mapping[str, Any]]


def draw(history: History, class_matrix: Tensor) -> dict[str, MediaItem]:
    """All pictures of a federation.

    Args:
        history: an entry a round: ``chosen`` clients, ``scores`` by client, ``val`` where it was validated, and costs.
        class_matrix: (clients, classes), items of each class that a client holds.
    """
    return {**clients(history, class_matrix), **choices(history, len(class_matrix)), **accuracies(history)}


def clients(history: History, class_matrix: Tensor) -> dict[str, MediaItem]:
    """Who holds what, and how often each was chosen."""
    times = Counter(client for entry in history for client in entry["chosen"])
    rows = [(client, times[client], *counts) for client, counts in enumerate(class_matrix.tolist())]
    columns = ("client", "times_chosen", *(f"class_{i}" for i in range(class_matrix.shape[1])))
    return {"clients": Heatmap(class_matrix.float(), "class", "client"), "clients_table": Table(columns, rows)}


def choices(history: History, number: int) -> dict[str, MediaItem]:
    """Who was chosen in each round, of `number` clients, and with which score; white where there was none."""
    selected, scores = torch.zeros(len(history), number), torch.full((len(history), number), math.nan)
    for row, entry in enumerate(history):
        selected[row, entry["chosen"]] = 1.0
        for client, score in entry["scores"].items():
            scores[row, client] = score
    items: dict[str, MediaItem] = {"selected": Heatmap(selected, "client", "round")}
    if not scores.isnan().all():
        items["scores"] = Heatmap(scores, "client", "round")
    return items


def accuracies(history: History) -> dict[str, MediaItem]:
    """Validation over rounds, traffic and computing; empty before the second validation."""
    validated = [entry for entry in history if "val" in entry]
    if len(validated) < 2:
        return {}
    accuracy = {"validation": [entry["val"] for entry in validated]}
    axes = {
        "accuracy_over_rounds": ("round", [entry["round"] + 1.0 for entry in validated]),
        "accuracy_over_uplink": ("uplink, MB", [entry["uplink_mb"] for entry in validated]),
        "accuracy_over_computing": ("images trained on", [entry["image_passes"] for entry in validated]),
    }
    return {name: Curve(x, accuracy, label, "accuracy") for name, (label, x) in axes.items()}
