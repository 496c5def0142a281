"""Networks that turn a session of clicks into a vector: GRU4Rec, STAMP, SR-GNN, GCE-GNN.

A session is compared with the rows of the table of items, `lit_modules.hid.Scoring`: always the table itself, also
where a network has updated the items of a session on its way (the published code of both graph networks does so, their
figures do not). Shapes depend on those of the input alone, so that nothing waits for a device, and all can be exported
with N and L left open. Equations: docs/methods/hid.md.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import Catalogue, Sessions, UserError
from leanlight.contracts.ranges import PositiveFloat, PositiveInt, Share
from lit_modules.hid.graphs import edge_types, global_neighbours, session_graph
from lit_modules.nn.checks import require_positive, require_share


class Backbone(nn.Module):
    """A table of items, and a network for sessions.

    Args:
        num_items: m, items of the catalogue, numbered from 1.
        dim: d, size of the vectors of items and sessions.
        embedding_std: standard deviation of the table's first values, drawn from a normal distribution; None: those of
            the network's authors, here U(-1/√d, 1/√d), as all weights.
    """

    #: Clicks that a session can have at most; None: any number.
    max_length: int | None = None

    def __init__(self, num_items: int, dim: PositiveInt = 100, embedding_std: PositiveFloat | None = None) -> None:
        super().__init__()
        require_positive(num_items=num_items, dim=dim)
        if embedding_std is not None and embedding_std <= 0:
            raise UserError(f"embedding_std: expected a positive number, got {embedding_std}")
        self.num_items, self.dim, self.embedding_std = num_items, dim, embedding_std
        self.embedding = nn.Embedding(num_items + 1, dim, padding_idx=0)

    def prepare(self, catalogue: Catalogue, sessions: Sessions) -> None:
        """Take from the training sessions what the network needs of them."""

    def forward(self, items: Tensor, length: Tensor) -> Tensor:
        """Vectors (N, d) of sessions.

        Args:
            items: (N, L) int64 clicks from 1, in their order from the left; 0 behind them.
            length: (N,) int64 number of clicks, at least 1.
        """
        raise NotImplementedError

    def item_embedding(self) -> Tensor:
        """(m + 1, d) vectors of the items; row 0 is zero."""
        return self.embedding.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        bound = 1 / math.sqrt(self.dim)
        for weight in self.parameters():
            weight.uniform_(-bound, bound)
        self._reset_items()

    @torch.no_grad()
    def _reset_items(self) -> None:
        if self.embedding_std is not None:
            self.embedding.weight.normal_(0, self.embedding_std)
        self.embedding.weight[0] = 0


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Of values (N, L, d) those at positions (N, K): (N, K, d)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


def _last(values: Tensor, length: Tensor) -> Tensor:
    """Of values (N, L, d) the last that is no padding: (N, d)."""
    return _at(values, length[:, None] - 1).squeeze(1)


class GRU4Rec(Backbone):
    """A recurrent network; the last state is the session's (Hidasi et al. 2016), trained by a softmax over all items.

    Args:
        num_items: m.
        dim: d, also of the state.
        dropout: of the items' vectors, in [0, 1).
        layers: of the recurrent network.
        embedding_std: see `Backbone`.
    """

    def __init__(
        self,
        num_items: int,
        dim: PositiveInt = 100,
        dropout: Share = 0.3,
        layers: PositiveInt = 1,
        embedding_std: PositiveFloat | None = None,
    ) -> None:
        super().__init__(num_items, dim, embedding_std)
        require_positive(layers=layers)
        require_share(dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(dim, dim, layers, batch_first=True)
        self.reset_parameters()

    def forward(self, items: Tensor, length: Tensor) -> Tensor:
        # Padding lies behind the clicks, so the state at the last click knows nothing of it.
        clicks = self.dropout(self.embedding(items))
        states = _scanned(self.gru, clicks) if torch.compiler.is_exporting() else self.gru(clicks)[0]
        return _last(states, length)


def _scanned(gru: nn.GRU, clicks: Tensor) -> Tensor:
    """What a GRU gives for (N, L, d) without gradients, by an operation whose number of steps an export leaves open.

    An exported `nn.GRU` is unrolled over the clicks of the example it is exported with, so it takes no other length.
    """
    from torch._higher_order_ops import scan  # not public in PyTorch yet: nothing but the export shall hang on it

    for layer in gru.all_weights:
        w_in, w_state, b_in, b_state = (weight.detach() for weight in layer)

        def step(state: Tensor, x: Tensor, w: Tensor = w_state, b: Tensor = b_state) -> tuple[Tensor, Tensor]:
            (reset_x, update_x, new_x), (reset_h, update_h, new_h) = x.chunk(3, 1), (state @ w.T + b).chunk(3, 1)
            candidate = (new_x + (reset_x + reset_h).sigmoid() * new_h).tanh()
            state = candidate + (update_x + update_h).sigmoid() * (state - candidate)
            return state, state.clone()

        inputs = (clicks.detach() @ w_in.T + b_in).transpose(0, 1)
        clicks = scan(step, inputs.new_zeros(inputs.shape[1], gru.hidden_size), inputs)[1].transpose(0, 1)
    return clicks


class STAMP(Backbone):
    """Attention between a session's mean, its last click and every click (Liu et al. 2018).

    Args:
        num_items: m.
        dim: d.
        embedding_std: standard deviation of the table's first values.
        weight_std: standard deviation of the other weights' first values; biases begin with 0.
        max_norm: longest vector of an item where a session is read; longer ones are scaled. None: any length. The
            items that a session is compared with keep theirs.
    """

    def __init__(
        self,
        num_items: int,
        dim: PositiveInt = 100,
        embedding_std: PositiveFloat = 0.002,
        weight_std: PositiveFloat = 0.05,
        max_norm: PositiveFloat | None = 1.5,
    ) -> None:
        super().__init__(num_items, dim, embedding_std)
        for name, value in (("weight_std", weight_std), ("max_norm", max_norm)):
            if value is not None and value <= 0:
                raise UserError(f"{name}: expected a positive number, got {value}")
        self.weight_std, self.max_norm = weight_std, max_norm
        self.of_click = nn.Linear(dim, dim)
        self.of_last = nn.Linear(dim, dim, bias=False)
        self.of_mean = nn.Linear(dim, dim, bias=False)
        self.attention = nn.Linear(dim, 1, bias=False)
        self.session_head, self.last_head = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for name, weight in self.named_parameters():
            weight.zero_() if name.endswith("bias") else weight.normal_(0, self.weight_std)
        self._reset_items()

    def forward(self, items: Tensor, length: Tensor) -> Tensor:
        clicks = self.embedding(items)
        if self.max_norm is not None:
            clicks = clicks * (self.max_norm / clicks.norm(dim=2, keepdim=True).clamp(min=self.max_norm))
        mean = clicks.sum(1) / length[:, None]  # padding's vectors are zero
        last = _last(clicks, length)
        hidden = self.of_click(clicks) + (self.of_last(last) + self.of_mean(mean))[:, None]
        # Not a softmax: the weights of a session need not add up to 1. Padding weighs nothing, its vector being zero.
        read = (self.attention(hidden.sigmoid()) * clicks).sum(1) + mean
        return self.session_head(read).tanh() * self.last_head(last).tanh()


class SRGNN(Backbone):
    """A gated network on the graph of a session (Wu et al. 2019).

    Args:
        num_items: m.
        dim: d.
        steps: of the gated network, at least 1.
        embedding_std: see `Backbone`.
    """

    def __init__(
        self, num_items: int, dim: PositiveInt = 100, steps: PositiveInt = 1, embedding_std: PositiveFloat | None = None
    ) -> None:
        super().__init__(num_items, dim, embedding_std)
        require_positive(steps=steps)
        self.steps = steps
        self.edges_in, self.edges_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.edges_bias = nn.Parameter(torch.empty(2 * dim))
        self.gate = nn.GRUCell(2 * dim, dim)
        self.of_last, self.of_click = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attention = nn.Linear(dim, 1, bias=False)
        self.head = nn.Linear(2 * dim, dim)
        self.reset_parameters()

    def forward(self, items: Tensor, length: Tensor) -> Tensor:
        graph = session_graph(items, self.embedding.weight.dtype)
        state = self.embedding(graph.nodes)
        for _ in range(self.steps):
            near = (
                torch.cat([graph.inward @ self.edges_in(state), graph.outward @ self.edges_out(state)], 2)
                + self.edges_bias
            )
            state = self.gate(near.flatten(0, 1), state.flatten(0, 1)).view_as(state)
        clicks = _at(state, graph.alias)
        last = _last(clicks, length)
        weight = self.attention((self.of_last(last)[:, None] + self.of_click(clicks)).sigmoid())
        read = (weight * clicks * (items > 0)[..., None]).sum(1)  # not a softmax
        return self.head(torch.cat([read, last], 1))


class GCEGNN(Backbone):
    """Attention on the graph of a session and on the graph of items of all sessions (Wang et al. 2020).

    An item with fewer than `neighbours` in the graph of items attends to those that it has. (The published code fills
    its places by drawing some of them again, which weighs them at random.)

    Args:
        num_items: m.
        dim: d.
        hops: steps from an item in the graph of items; memory grows with `neighbours` to this power.
        neighbours: of an item in that graph, the most frequent ones.
        window: clicks within which two items are neighbours.
        dropout_gcn: of what the graph of items is aggregated from, in [0, 1).
        dropout_local: of items' vectors from the graph of a session.
        dropout_global: of items' vectors from the graph of items.
        positions: clicks that a session can have at most.
        embedding_std: see `Backbone`.
    """

    neighbour: Tensor
    weight: Tensor

    def __init__(
        self,
        num_items: int,
        dim: PositiveInt = 100,
        hops: PositiveInt = 1,
        neighbours: PositiveInt = 12,
        window: PositiveInt = 3,
        dropout_gcn: Share = 0.0,
        dropout_local: Share = 0.0,
        dropout_global: Share = 0.5,
        positions: PositiveInt = 200,
        embedding_std: PositiveFloat | None = None,
    ) -> None:
        super().__init__(num_items, dim, embedding_std)
        require_positive(hops=hops, neighbours=neighbours, window=window, positions=positions)
        require_share(dropout_gcn=dropout_gcn, dropout_local=dropout_local, dropout_global=dropout_global)
        self.window, self.max_length = window, positions
        self.register_buffer("neighbour", torch.zeros(num_items + 1, neighbours, dtype=torch.int64))
        self.register_buffer("weight", torch.zeros(num_items + 1, neighbours))
        self.local = _LocalAttention(dim)
        self.hops = nn.ModuleList(_GlobalAttention(dim, dropout_gcn) for _ in range(hops))
        self.dropout_local, self.dropout_global = nn.Dropout(dropout_local), nn.Dropout(dropout_global)
        self.position = nn.Embedding(positions, dim)
        self.of_click = nn.Linear(2 * dim, dim, bias=False)
        self.of_positioned, self.of_mean = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)
        self.attention = nn.Linear(dim, 1, bias=False)
        self.reset_parameters()

    def prepare(self, catalogue: Catalogue, sessions: Sessions) -> None:
        """Make the graph of items."""
        found = global_neighbours(sessions, self.num_items, self.window, self.neighbour.shape[1])
        for buffer, values in zip((self.neighbour, self.weight), found, strict=True):
            buffer.copy_(values)

    def forward(self, items: Tensor, length: Tensor) -> Tensor:
        clicks = items.shape[1]
        if self.max_length is not None and clicks > self.max_length:
            raise UserError(f"positions: expected at least {clicks}, the clicks of a session, got {self.max_length}")
        graph = session_graph(items)
        nodes = self.embedding(graph.nodes)
        mean = self.embedding(items).sum(1) / length[:, None]  # padding's vectors are zero
        near = self.dropout_local(self.local(nodes, edge_types(graph)))
        hidden = _at(near + self.dropout_global(self._far(graph.nodes, nodes, mean)), graph.alias)
        real = (items > 0)[..., None]
        # Counted from the last click, which is 0: of a long and a short session the newest clicks are alike.
        position = (length[:, None] - 1 - torch.arange(clicks, device=items.device)).clamp(min=0)
        positioned = self.of_click(torch.cat([self.position(position), hidden], 2)).tanh()
        hidden_mean = (hidden * real).sum(1) / length[:, None]
        gate = (self.of_positioned(positioned) + self.of_mean(hidden_mean)[:, None]).sigmoid()
        return (self.attention(gate) * hidden * real).sum(1)

    def _far(self, items: Tensor, vectors: Tensor, mean: Tensor) -> Tensor:
        """What the graph of items tells of items (N, U) with vectors (N, U, d), to a session with that mean."""
        rings, near = [vectors], []
        for _ in self.hops:
            near.append((self.neighbour[items], self.weight[items]))
            items = near[-1][0].flatten(1)
            rings.append(self.embedding(items))
        for done, hop in enumerate(self.hops):
            rings = [hop(rings[i], rings[i + 1], *near[i], mean) for i in range(len(self.hops) - done)]
        return rings[0]


class _LocalAttention(nn.Module):
    """Softmax over the nodes of a session that are tied to a node, by the type of the edge."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.of_type = nn.Parameter(torch.empty(4, dim))

    def forward(self, nodes: Tensor, types: Tensor) -> Tensor:
        """nodes: (N, U, d). types: (N, U, U), see `edge_types`."""
        by_type = (nodes[:, None] * self.of_type[:, None]) @ nodes[:, None].transpose(2, 3)
        energy = by_type.gather(1, (types - 1).clamp(min=0)[:, None]).squeeze(1)
        return _masked_softmax(F.leaky_relu(energy, 0.2), types > 0) @ nodes


class _GlobalAttention(nn.Module):
    """Softmax over the neighbours of an item, by a session's mean, then a layer over the item and what was found."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.of_neighbour = nn.Linear(dim, dim, bias=False)
        self.of_weight = nn.Linear(1, dim, bias=False)
        self.attention = nn.Linear(dim, 1, bias=False)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(2 * dim, dim, bias=False)

    def forward(self, vectors: Tensor, others: Tensor, neighbour: Tensor, weight: Tensor, mean: Tensor) -> Tensor:
        """vectors: (N, M, d) of items. others: (N, M·C, d) of their neighbours. neighbour, weight: (N, M, C)."""
        others = others.view(*neighbour.shape, -1)
        hidden = self.of_neighbour(others * mean[:, None, None]) + self.of_weight(weight[..., None].to(mean.dtype))
        energy = self.attention(F.leaky_relu(hidden, 0.2)).squeeze(3)
        share = _masked_softmax(energy, neighbour > 0)
        found = (share[:, :, None] @ others).squeeze(2)
        return self.head(self.dropout(torch.cat([vectors, found], 2))).relu()


def _masked_softmax(energy: Tensor, real: Tensor) -> Tensor:
    """Softmax over the last axis of what is real; equal shares, and no NaN, where nothing is."""
    if energy.dtype in (torch.float16, torch.bfloat16):
        energy = energy.float()
    return energy.masked_fill(~real, -9e15).softmax(-1)
