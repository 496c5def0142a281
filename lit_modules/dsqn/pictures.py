"""Pictures of an agent that plays: what is drawn, not how."""

from __future__ import annotations

from dataclasses import replace

import torch

from leanlight.contracts import Animation, Histogram, MediaItem
from lit_modules.dsqn.evaluation import GameEvaluation
from lit_modules.history import History

_NOISED = {"gaussian": "pixels", "weight": "weights"}


def pictures(evaluation: GameEvaluation, history: History) -> dict[str, MediaItem]:
    """An episode as animation, the scores of all, and curves over training; nothing before the first episode."""
    if not evaluation.episodes:
        return {}
    items: dict[str, MediaItem] = {}
    if (frames := evaluation.episodes[0].frames) is not None:
        items["play"] = Animation(frames.float() / 255, fps=15.0 if len(frames) > 60 else 5.0)
    scores = torch.tensor([episode.score for episode in evaluation.episodes])
    items["scores"] = Histogram({"episodes": scores}, "score", bins=20)
    return items | _curves(history)


def noise_curves(evaluation: GameEvaluation) -> dict[str, MediaItem]:
    """Score over the strength of each kind of noise under which the episodes were played again."""
    return {
        f"{kind}_noise": result.curve(f"standard deviation of the noise on the {_NOISED[kind]}", "mean score")
        for kind, result in evaluation.under_noise.items()
    }


def _curves(history: History) -> dict[str, MediaItem]:
    name = "mean and standard deviation over episodes"
    evaluations = history.curve("frames", {name: "score"}, "frames", f"score: {name}")
    if evaluations is not None:
        points = list(zip(history["score"], history["score_std"], strict=True))
        band = [mean - std for mean, std in points], [mean + std for mean, std in points]
        evaluations = replace(evaluations, bands={name: band})
    values = {"largest Q-value of an episode": "max_q", "spread over actions": "q_spread"}
    curves = {
        "evaluation": evaluations,
        "q_values": history.curve("frames", values, "frames", "Q-value"),
        "epsilon": history.curve("frames", {"ε": "epsilon"}, "frames", "probability of a random action"),
        "returns": history.curve("frames", {"training games": "train_score"}, "frames", "score"),
    }
    return {name: curve for name, curve in curves.items() if curve is not None}
