"""Sessions as graphs, and the graph of items that all training sessions make, without a loop over sessions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from leanlight.contracts import Sessions
from lit_modules.nn.checks import require_positive


class SessionGraph(NamedTuple):
    """Graphs of N sessions, an edge from each item to the next one clicked. There are as many places for nodes as
    clicks in the longest session, so that shapes do not depend on how often sessions repeat themselves.

    Args:
        nodes: (N, U) int64, the items of a session, each once, ascending; 0 in places that are not needed.
        alias: (N, U) int64, the place in `nodes` of each click; of padding that of a node 0.
        inward: (N, U, U); row j has equal shares, which sum to 1, for the nodes with an edge to j.
        outward: (N, U, U); row i has equal shares for the nodes to which there is an edge from i.
    """

    nodes: Tensor
    alias: Tensor
    inward: Tensor
    outward: Tensor


def session_graph(items: Tensor, dtype: torch.dtype = torch.float32) -> SessionGraph:
    """SR-GNN's graphs: repeated edges count once.

    Args:
        items: (N, L) int64 clicks from 1, in their order from the left; 0 behind them.
        dtype: of the shares.
    """
    nodes, alias = _unique(items)
    width = items.shape[1]
    last = torch.arange(width, device=items.device) == width - 1
    follows = (items.roll(-1, 1) > 0) & ~last
    edge = torch.where(follows, alias * width + alias.roll(-1, 1), width * width)  # no edge: into a cell behind them
    after = torch.zeros(items.shape[0], width * width + 1, dtype=dtype, device=items.device).scatter(1, edge, 1.0)
    after = after[:, :-1].unflatten(1, (width, width))
    inward = after / after.sum(1, keepdim=True).clamp(min=1)
    outward = after / after.sum(2, keepdim=True).clamp(min=1)
    return SessionGraph(nodes, alias, inward.transpose(1, 2), outward)


def _unique(items: Tensor) -> tuple[Tensor, Tensor]:
    """Different items of each row, ascending, with 0 behind them; and where each item lies among them."""
    behind = items.masked_fill(items == 0, torch.iinfo(items.dtype).max)
    ordered, order = behind.sort(1)
    other = ordered != ordered.roll(1, 1)
    place = other.cumsum(1) - other[:, :1].long()
    alias = torch.zeros_like(items).scatter(1, order, place)
    return torch.zeros_like(items).scatter(1, alias, items), alias


def edge_types(graph: SessionGraph) -> Tensor:
    """GCE-GNN's types of the edges between nodes: (N, U, U) int64.

    Row i, column j: 1 where i is j, 2 where j was clicked after i, 3 where i was clicked after j, 4 where both were, 0
    else, also in rows and columns of places without an item.

    Args:
        graph: of the sessions.
    """
    out, into = graph.outward > 0, graph.inward > 0
    types = 2 * out + 3 * into - (out & into).long()
    same = torch.eye(types.shape[1], dtype=torch.bool, device=types.device)
    return torch.where(same, (graph.nodes > 0).long()[:, None], types)


def global_neighbours(sessions: Sessions, num_items: int, window: int = 3, count: int = 12) -> tuple[Tensor, Tensor]:
    """GCE-GNN's graph of items: for each those most often clicked near it, in both directions.

    Two clicks on one item are near each other, too, and count twice, once in each direction. Equal counts go by the
    smaller number.

    Args:
        sessions: of training.
        num_items: m.
        window: most clicks from one to the other, at least 1.
        count: neighbours that are kept, at least 1.

    Returns:
        neighbours (m + 1, count) int64, most frequent first, 0 where there are fewer; how often they were near
        (m + 1, count) float32, 0 likewise.
    """
    require_positive(window=window, count=count)
    items, base = sessions.items, num_items + 1
    owner = torch.repeat_interleave(torch.arange(len(sessions), device=items.device), sessions.offsets.diff())
    keys = []
    for step in range(1, window + 1):
        together = owner[step:] == owner[:-step]
        first, second = items[:-step][together], items[step:][together]
        keys += [first * base + second, second * base + first]
    pairs, times = torch.cat(keys).unique(return_counts=True)  # ascending by item, then by neighbour
    order = times.argsort(descending=True, stable=True)
    order = order[(pairs[order] // base).argsort(stable=True)]
    pairs, times = pairs[order], times[order]
    item = pairs // base
    start = torch.searchsorted(item, torch.arange(base, device=items.device))
    rank = torch.arange(len(item), device=items.device) - start[item]
    kept = rank < count
    neighbours = items.new_zeros(base, count)
    weights = torch.zeros(base, count, device=items.device)
    neighbours[item[kept], rank[kept]] = (pairs % base)[kept]
    weights[item[kept], rank[kept]] = times[kept].float()
    return neighbours, weights
