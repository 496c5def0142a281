"""Rules without parameters that every recommender has to beat: popularity, popularity in the session, item-kNN."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from leanlight.contracts.ranges import PositiveInt
from leanlight.contracts.sessions import Catalogue, Sessions
from lit_modules.hid.counts import place_within
from lit_modules.nn.checks import require_positive


class Floor(nn.Module):
    """A rule that is counted once in the training sessions and then gives scores.

    Args:
        num_items: m.
    """

    #: There is nothing to train.
    trains = False
    #: (m + 1,) float, place of each item by its clicks, from 0 for the least; items with as many clicks share one.
    popularity: Tensor

    def __init__(self, num_items: int) -> None:
        super().__init__()
        require_positive(num_items=num_items)
        self.register_buffer("popularity", torch.zeros(num_items + 1))

    def prepare(self, catalogue: Catalogue, sessions: Sessions) -> None:
        """Count what the rule goes by."""
        place = catalogue.clicks[1:].unique(return_inverse=True)[1]
        self.popularity[1:] = place.to(self.popularity)

    def scores(self, items: Tensor, length: Tensor) -> Tensor:
        """Scores (N, m), column j of item j + 1.

        Args:
            items: (N, L) int64 clicks, 0 behind them.
            length: (N,) int64.
        """
        raise NotImplementedError


class Popularity(Floor):
    """The most clicked items of training, whatever the session. The score is the item's place by clicks."""

    def scores(self, items: Tensor, length: Tensor) -> Tensor:
        return self.popularity[1:].expand(items.shape[0], -1)  # of len() an export would make a constant


class SessionPopularity(Floor):
    """The items of the session by how often they are in it, then all others; ties go by clicks in training.

    The score is exact while (distinct numbers of clicks) × (clicks of an item in one session + 1) is below 2**24.
    """

    def scores(self, items: Tensor, length: Tensor) -> Tensor:
        above = self.popularity.max() + 1  # one click in the session outweighs any popularity
        scores = self.popularity.repeat(items.shape[0], 1)
        return scores.scatter_add_(1, items, above.expand(items.shape))[:, 1:]


class ItemKNN(Floor):
    """Items that are in the same sessions as the last click: (sessions with both) / √((with one) (with the other)).

    The cosine of two items as sets of sessions, as in Hidasi et al. 2016. Items that are no neighbours come after
    them, with scores in [-1, 0), by their clicks.

    Args:
        num_items: m.
        neighbours: items that are kept for each, the most similar ones; of equal ones those of smaller numbers.
    """

    #: (m + 1, neighbours) int64 items, 0 where there are fewer, and their cosines, 0 there.
    neighbour: Tensor
    weight: Tensor

    def __init__(self, num_items: int, neighbours: PositiveInt = 100) -> None:
        super().__init__(num_items)
        require_positive(neighbours=neighbours)
        self.neighbours = neighbours
        shape = (num_items + 1, neighbours)
        self.register_buffer("neighbour", torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("weight", torch.zeros(shape))

    def prepare(self, catalogue: Catalogue, sessions: Sessions) -> None:
        super().prepare(catalogue, sessions)
        together = item_cosines(sessions, catalogue.num_items).tocoo()
        item, other = together.coords
        place = place_within(item, -together.data, other)
        kept = place < self.neighbours
        where = torch.from_numpy(item[kept]).long(), torch.from_numpy(place[kept])
        self.neighbour[where] = torch.from_numpy(other[kept]).to(self.neighbour)
        self.weight[where] = torch.from_numpy(together.data[kept]).to(self.weight)

    def scores(self, items: Tensor, length: Tensor) -> Tensor:
        last = items.gather(1, length[:, None] - 1)[:, 0]
        others = self.popularity / (self.popularity.max() + 1) - 1
        return others.repeat(items.shape[0], 1).scatter_(1, self.neighbour[last], self.weight[last])[:, 1:]


def item_cosines(sessions: Sessions, num_items: int) -> sp.csr_array:
    """Cosines (m + 1, m + 1) of different items as sets of the sessions that they are in."""
    offsets = sessions.offsets.cpu().numpy()
    session = np.repeat(np.arange(len(sessions)), np.diff(offsets))
    items = sessions.items.cpu().numpy()
    within = sp.csr_array((np.ones(len(items)), (session, items)), (len(sessions), num_items + 1))
    within.data[:] = 1  # however often an item is in a session
    count = np.maximum(np.asarray(within.sum(0)).ravel(), 1)
    together = (within.T @ within).tocoo()
    row, column = together.coords
    apart = row != column
    row, column, both = row[apart], column[apart], together.data[apart]
    return sp.csr_array((both / np.sqrt(count[row] * count[column]), (row, column)), together.shape)
