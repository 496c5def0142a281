"""Counting in all training sessions at once, without a loop over them."""

from __future__ import annotations

import numpy as np

from leanlight.contracts.sessions import Sessions


def neighbouring_clicks(sessions: Sessions) -> tuple[np.ndarray, np.ndarray]:
    """Items clicked one after the other in a session: the first and the second (pairs,), int64."""
    items = sessions.items.cpu().numpy()
    within = np.ones(max(len(items) - 1, 0), dtype=bool)
    edge = sessions.offsets.cpu().numpy()[1:-1]
    within[edge[(edge > 0) & (edge < len(items))] - 1] = False
    return items[:-1][within], items[1:][within]


def place_within(group: np.ndarray, *keys: np.ndarray) -> np.ndarray:
    """Place (P,) of each entry among those of its group in ascending order of the keys, from 0.

    Args:
        group: (P,) int, at least 0.
        keys: (P,) each, the weightiest first.
    """
    order = np.lexsort((*reversed(keys), group))
    count = np.bincount(group)
    place = np.empty(len(group), dtype=np.int64)
    place[order] = np.arange(len(group)) - (count.cumsum() - count)[group[order]]
    return place
