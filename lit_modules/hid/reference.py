"""Graphs and networks of sessions as loops have them, session by session: for equality tests and the benchmark."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import Catalogue, SessionBatch
from lit_modules.hid.backbones import GCEGNN, SRGNN, STAMP, Backbone, GRU4Rec

if TYPE_CHECKING:
    from lit_modules.hid.module import SessionRecommender

_RANKED = ("hr", "mrr", "ndcg")

# -- graphs


def loop_session_graphs(items: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes (N, U), alias (N, U) and adjacency (N, U, 2U), inward and outward side by side, as the public code of
    SR-GNN makes them for each batch. Padding is a node of its own there, the first; here the last, as ours has it.

    Args:
        items: (N, L) int64 clicks, 0 behind them.
    """
    nodes, alias, adjacency = [], [], []
    width = items.shape[1]
    for session in items:
        node = np.unique(session)
        node = np.concatenate([node[node > 0], node[node == 0]])
        nodes.append(node.tolist() + (width - len(node)) * [0])
        after = np.zeros((width, width))
        for i in np.arange(width - 1):
            if session[i + 1] == 0:
                break
            u = np.where(node == session[i])[0][0]
            v = np.where(node == session[i + 1])[0][0]
            after[u][v] = 1
        into = np.sum(after, 0)
        into[np.where(into == 0)] = 1
        out = np.sum(after, 1)
        out[np.where(out == 0)] = 1
        adjacency.append(np.concatenate([np.divide(after, into), np.divide(after.transpose(), out)]).transpose())
        alias.append([np.where(node == i)[0][0] for i in session])
    return np.array(nodes), np.array(alias), np.array(adjacency)


def loop_edge_types(clicks: Sequence[int]) -> dict[tuple[int, int], int]:
    """GCE-GNN's type of each pair of items of one session that has one; see `lit_modules.hid.graphs.edge_types`.

    Args:
        clicks: of the session.
    """
    types = {(item, item): 1 for item in clicks}
    steps = {(a, b) for a, b in pairwise(clicks) if a != b}
    for a, b in steps:
        types[a, b], types[b, a] = (4, 4) if (b, a) in steps else (2, 3)
    return types


def loop_neighbours(sessions: Sequence[Sequence[int]], window: int = 3, count: int = 12) -> dict[int, dict[int, int]]:
    """GCE-GNN's neighbours of each item that has any, best first, with how often they were near.

    Args:
        sessions: clicks of each.
        window: most clicks from one to the other.
        count: neighbours that are kept.
    """
    near: dict[int, Counter[int]] = {}
    for clicks in sessions:
        for i, a in enumerate(clicks):
            for b in clicks[i + 1 : i + 1 + window]:
                near.setdefault(a, Counter())[b] += 1
                near.setdefault(b, Counter())[a] += 1
    return {a: dict(sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:count]) for a, found in near.items()}


# -- metrics


def loop_metrics(
    recommended: np.ndarray, target: np.ndarray, catalogue: Catalogue, ks: Sequence[int]
) -> dict[str, float]:
    """All metrics by name as `lit_modules.hid.ranking_metrics` has them, case after case.

    Args:
        recommended: (N, K) items from 1, best first.
        target: (N,) items from 1.
        catalogue: its head and clicks.
        ks: lengths of the lists.
    """
    clicks, tail = catalogue.clicks.numpy(), np.where(~catalogue.head.numpy())[0][1:]
    found: dict[str, float] = {}
    for k in ks:
        gains: dict[str, list[float]] = {f"{which}{name}_{k}": [] for which in ("", "tail_") for name in _RANKED}
        shares, popularity, exposure = [], [], Counter[int]()
        for row, wanted in zip(recommended, target, strict=True):
            best = row[:k]
            place = np.where(best == wanted)[0]
            of_case = (1.0, 1 / (place[0] + 1), 1 / np.log2(place[0] + 2)) if len(place) else (0.0, 0.0, 0.0)
            for which in ("", "tail_") if np.isin(wanted, tail) else ("",):
                for name, gain in zip(_RANKED, of_case, strict=True):
                    gains[f"{which}{name}_{k}"].append(gain)
            shares.append(np.isin(best, tail).sum() / k)
            popularity.append(clicks[best].mean())
            exposure.update(best.tolist())
        found |= {name: float(np.mean(values)) for name, values in gains.items()}
        times = np.array(sorted(exposure.values()))
        times = np.concatenate([np.zeros(catalogue.num_items - len(times)), times])
        rank = np.arange(1, len(times) + 1)
        found |= {
            f"tail_share_{k}": float(np.mean(shares)),
            f"coverage_{k}": len(exposure) / catalogue.num_items,
            f"tail_coverage_{k}": float(np.isin(list(exposure), tail).sum() / len(tail)),
            f"gini_{k}": float(((2 * rank - len(times) - 1) * times).sum() / (len(times) * times.sum())),
            f"popularity_{k}": float(np.mean(popularity)),
        }
    return found


# -- a step


class BareSessionStep:
    """Forward, backward and optimiser step without Lightning, on a copy of a module's network.

    Args:
        module: whose network, intents and optimiser are taken; it is left as it is.
    """

    def __init__(self, module: SessionRecommender) -> None:
        assert module.network is not None
        self.module, self.network = module, copy.deepcopy(module.network)
        self.optimizer = module.make_optimizer(self.network.parameters())

    def __call__(self, batch: SessionBatch) -> None:
        """One step."""
        session, table = self.network.encode(batch.items, batch.length)
        loss = F.cross_entropy(self.network.scoring(session, table), batch.target - 1)
        if self.module.icloss is not None:
            loss = loss + self.module.epsilon * self.module.icloss(session, batch, table, self.module.intents)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


# -- networks


def encode_one(network: Backbone, clicks: Sequence[int]) -> Tensor:
    """(d,) vector of one session by the weights of a network, without dropout.

    Args:
        network: any of ours.
        clicks: of the session, items from 1.
    """
    ways = {GRU4Rec: _gru4rec, STAMP: _stamp, SRGNN: _srgnn, GCEGNN: _gcegnn}
    return ways[type(network)](network, clicks)  # type: ignore[operator]


def _gru4rec(network: GRU4Rec, clicks: Sequence[int]) -> Tensor:
    """Cho et al. 2014, with PyTorch's order of gates: reset, update, candidate."""
    state = [torch.zeros_like(network.embedding.weight[0])] * network.gru.num_layers
    for click in clicks:
        x = network.embedding.weight[click]
        for layer in range(len(state)):
            w_in, w_state, b_in, b_state = network.gru.all_weights[layer]
            x = state[layer] = _gated(x, state[layer], w_in, w_state, b_in, b_state)
    return state[-1]


def _gated(x: Tensor, state: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor) -> Tensor:
    reset_x, update_x, new_x = (w_in @ x + b_in).chunk(3)
    reset_h, update_h, new_h = (w_state @ state + b_state).chunk(3)
    update = torch.sigmoid(update_x + update_h)
    candidate = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    return update * state + (1 - update) * candidate


def _stamp(network: STAMP, clicks: Sequence[int]) -> Tensor:
    """Liu et al. 2018, equations 1 to 11."""
    x = []
    for click in clicks:
        vector = network.embedding.weight[click]
        norm = vector.norm()
        x.append(
            vector * network.max_norm / norm if network.max_norm is not None and norm > network.max_norm else vector
        )
    last, mean = x[-1], torch.stack(x).mean(0)
    read = mean
    for vector in x:
        inner = (
            network.of_click.weight @ vector
            + network.of_last.weight @ last
            + network.of_mean.weight @ mean
            + network.of_click.bias
        )
        read = read + (network.attention.weight[0] @ torch.sigmoid(inner)) * vector
    session = torch.tanh(network.session_head.weight @ read + network.session_head.bias)
    return session * torch.tanh(network.last_head.weight @ last + network.last_head.bias)


def _srgnn(network: SRGNN, clicks: Sequence[int]) -> Tensor:
    """Wu et al. 2019, equations 1 to 7."""
    nodes = sorted(set(clicks))
    steps = set(pairwise(clicks))
    state = {item: network.embedding.weight[item] for item in nodes}
    half_in, half_out = network.edges_bias.chunk(2)
    gate = network.gate
    for _ in range(network.steps):
        new = {}
        for item in nodes:
            before = [state[a] for a, b in sorted(steps) if b == item]
            after = [state[b] for a, b in sorted(steps) if a == item]
            near = torch.cat([_share(before, network.edges_in) + half_in, _share(after, network.edges_out) + half_out])
            new[item] = _gated(near, state[item], gate.weight_ih, gate.weight_hh, gate.bias_ih, gate.bias_hh)
        state = new
    last = state[clicks[-1]]
    read = torch.zeros_like(last)
    for item in clicks:
        inner = torch.sigmoid(network.of_last(last) + network.of_click(state[item]))
        read = read + (network.attention.weight[0] @ inner) * state[item]
    return network.head.weight @ torch.cat([read, last]) + network.head.bias


def _share(vectors: list[Tensor], linear: torch.nn.Linear) -> Tensor:
    """Mean of what a layer gives for each vector; zero where there is none."""
    given = [linear.weight @ vector + linear.bias for vector in vectors]
    return torch.stack(given).mean(0) if given else torch.zeros_like(linear.bias)


def _gcegnn(network: GCEGNN, clicks: Sequence[int]) -> Tensor:
    """Wang et al. 2020, equations 1 to 16."""
    table = network.embedding.weight
    mean = torch.stack([table[item] for item in clicks]).mean(0)
    types = loop_edge_types(clicks)
    hidden = {}
    for item in set(clicks):
        tied = [other for other in sorted(set(clicks)) if (item, other) in types]
        kinds = [types[item, other] - 1 for other in tied]
        energy = [
            _leaky((network.local.of_type[kind] * table[item]) @ table[other])
            for kind, other in zip(kinds, tied, strict=True)
        ]
        share = torch.stack(energy).softmax(0)
        near = sum(a * table[other] for a, other in zip(share, tied, strict=True))
        hidden[item] = near + _far(network, item, mean, len(network.hops))
    hidden_mean = torch.stack([hidden[item] for item in clicks]).mean(0)
    read = torch.zeros_like(mean)
    for place, item in enumerate(reversed(clicks)):
        positioned = torch.tanh(network.of_click.weight @ torch.cat([network.position.weight[place], hidden[item]]))
        inner = network.of_positioned.weight @ positioned + network.of_positioned.bias
        inner = torch.sigmoid(inner + network.of_mean.weight @ hidden_mean)
        read = read + (network.attention.weight[0] @ inner) * hidden[item]
    return read


def _far(network: GCEGNN, item: int, mean: Tensor, hops: int) -> Tensor:
    """An item's vector after so many hops through the graph of items."""
    if hops == 0:
        return network.embedding.weight[item]
    hop: Any = network.hops[hops - 1]
    own = _far(network, item, mean, hops - 1)
    found = torch.zeros_like(own)
    others = [
        (other, weight)
        for other, weight in zip(network.neighbour[item].tolist(), network.weight[item].tolist(), strict=True)
        if other
    ]
    if others:
        vectors = [_far(network, other, mean, hops - 1) for other, _ in others]
        energy = []
        for vector, (_, weight) in zip(vectors, others, strict=True):
            inner = hop.of_neighbour.weight @ (mean * vector) + weight * hop.of_weight.weight[:, 0]
            energy.append(hop.attention.weight[0] @ _leaky(inner))
        share = torch.stack(energy).softmax(0)
        found = sum((a * vector for a, vector in zip(share, vectors, strict=True)), found)
    return torch.relu(hop.head.weight @ torch.cat([own, found]))


def _leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)
