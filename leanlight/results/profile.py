"""Performance profiles: how scores are distributed over tasks and seeds (Agarwal et al. 2021, arXiv:2108.13264)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from leanlight.results.claims import CONFIDENCE

Scores = Sequence[Sequence[float] | np.ndarray]  # of each task, its seeds
_DRAWS = 2000


def shares_above(scores: Scores, thresholds: np.ndarray) -> np.ndarray:
    """Share of runs above each threshold: the mean of the tasks' shares."""
    return np.mean([(np.asarray(task)[:, None] > thresholds).mean(0) for task in scores], axis=0)


def confidence_band(scores: Scores, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise 95 % band of `shares_above`: bootstrap percentiles, seeds drawn anew within each task."""
    generator = np.random.default_rng(0)  # the same results give the same picture
    drawn = [
        shares_above([generator.choice(np.asarray(task), len(task)) for task in scores], thresholds)
        for _ in range(_DRAWS)
    ]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(drawn, (tail, 100 - tail), axis=0)
    return low, high
