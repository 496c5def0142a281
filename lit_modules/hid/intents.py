"""Hybrid intents: groups of the items' attributes that are clicked together (HID, section on intent learning)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveInt, Seed
from leanlight.contracts.sessions import Catalogue, Sessions
from lit_modules.hid.counts import neighbouring_clicks, place_within
from lit_modules.nn.checks import require_positive

_MOSTLY_ONE = 0.8  # share of the clicks that one intent may hold without a warning
_DENSE_BELOW = 1_000  # nodes of a graph up to which all its eigenvectors take a fraction of a second
_SVD_RANK = 32


class Intents(nn.Module):
    """Which items belong to which intents; the pairs of items that were never clicked in training are left out.

    It leaves nothing in a state dict, as its sizes are known only from data: checkpoints hold `data`.

    Args:
        item: (P,) int64 items from 1.
        intent: (P,) int64 intents from 0; with `item` the pairs, each once.
        num_intents: n.
        num_items: m.
    """

    item: Tensor
    intent: Tensor
    #: (m + 1, A) intents of each item, filled up with n.
    member: Tensor
    #: (n,) float, 1 over the items of each intent; 0 without any.
    share_of_one: Tensor

    def __init__(self, item: Tensor, intent: Tensor, num_intents: int, num_items: int) -> None:
        super().__init__()
        self.num_intents, self.num_items = num_intents, num_items
        count = torch.bincount(intent, minlength=num_intents)
        for name, value in {
            "item": item,
            "intent": intent,
            "member": _padded(item, intent, num_intents, num_items),
            "share_of_one": (count > 0) / count.clamp(min=1),
        }.items():
            self.register_buffer(name, value, persistent=False)

    @property
    def data(self) -> dict[str, Any]:
        """The arguments that make it, for a checkpoint."""
        return {
            "item": self.item.cpu(),
            "intent": self.intent.cpu(),
            "num_intents": self.num_intents,
            "num_items": self.num_items,
        }

    def centroids(self, table: Tensor) -> Tensor:
        """Eq. 2: mean over the items of each intent, (n, d), of a table (m + 1, d); zero for an intent without any."""
        # A sum of the whole table, row by row, into its intents is several times as fast as gathering an intent's rows.
        total = table.new_zeros(self.num_intents + 1, table.shape[1])
        for intent in self.member.T:
            total = total.index_add(0, intent, table)
        return total[:-1] * self.share_of_one[:, None]

    def ids(self, items: Tensor) -> Tensor:
        """Intents (N, A) of items (N,), filled up with n."""
        return self.member[items]

    def of(self, items: Tensor) -> Tensor:
        """Membership (N, n), bool, of items (N,)."""
        member = self.ids(items)
        return member.new_zeros(len(items), self.num_intents + 1, dtype=torch.bool).scatter_(1, member, True)[:, :-1]

    def share(self, weight: Tensor | None = None) -> Tensor:
        """Share (n,) of the items that belong to each intent, or of their `weight` (m + 1,), such as clicks."""
        weight = torch.ones(self.num_items + 1, device=self.item.device) if weight is None else weight.float()
        held = weight.new_zeros(self.num_intents).index_add_(0, self.intent, weight[self.item])
        return held / weight[1:].sum()


def _padded(item: Tensor, intent: Tensor, num_intents: int, num_items: int) -> Tensor:
    order = item.argsort(stable=True)
    item, intent = item[order], intent[order]
    count = torch.bincount(item, minlength=num_items + 1)
    place = torch.arange(len(item), device=item.device) - (count.cumsum(0) - count)[item]
    member = intent.new_full((num_items + 1, max(int(count.max()), 1)), num_intents)
    member[item, place] = intent
    return member


@dataclass(frozen=True)
class HybridIntents:
    """How intents come from the attributes of items, here their categories, and from training sessions.

    Args:
        n: intents, at least 1 and at most as many as there are categories; ``attribute`` has as many as categories.
        source: ``hybrid``: clusters of categories; ``attribute``: the categories themselves; ``random``: those of
            ``hybrid`` with their items shuffled, so that the sizes stay and the meaning goes; ``semantic``: clusters
            of pseudo-categories, which are clusters of items, for data without categories.
        laplacian: of the graph of categories: ``normalised`` is I - D^(-1/2) W D^(-1/2) (Eq. 1), ``plain`` is D - W
            (authors' code).
        eigenvectors: q that k-means sees; None: n.
        self_loops: count neighbouring clicks of the same category, too.
        top_neighbours: keep only an edge that is among so many strongest of one of its ends; None: all edges.
        drop_first: leave out the eigenvector of the smallest eigenvalue, and take one more (authors' code).
        row_normalise: bring the rows of eigenvectors to length 1 (Ng, Jordan and Weiss).
        pseudo_categories: of ``semantic``.
        restarts: of k-means; the best is kept.
        seed: of k-means, of the eigensolver and of shuffles.
    """

    n: PositiveInt = 200
    source: Literal["hybrid", "attribute", "random", "semantic"] = "hybrid"
    laplacian: Literal["normalised", "plain"] = "normalised"
    eigenvectors: PositiveInt | None = None
    self_loops: bool = False
    top_neighbours: PositiveInt | None = None
    drop_first: bool = False
    row_normalise: bool = False
    pseudo_categories: PositiveInt = 100
    restarts: PositiveInt = 10
    seed: Seed = 0

    def __post_init__(self) -> None:
        sizes = {"n": self.n, "pseudo_categories": self.pseudo_categories, "restarts": self.restarts}
        optional = {"eigenvectors": self.eigenvectors, "top_neighbours": self.top_neighbours}
        require_positive(**sizes, **{name: value for name, value in optional.items() if value is not None})
        for name, known in (
            ("source", ("hybrid", "attribute", "random", "semantic")),
            ("laplacian", ("normalised", "plain")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")

    def build(self, catalogue: Catalogue, sessions: Sessions, table: Tensor | None = None) -> Intents:
        """Learn the intents, once before training. The same on every process.

        Args:
            catalogue: items, their categories and clicks.
            sessions: of training, each once.
            table: (m + 1, d) trained embeddings from which ``semantic`` takes pseudo-categories; None: from clicks.

        Raises:
            UserError: no categories, or fewer than intents.
        """
        m = catalogue.num_items
        item, category = (each.cpu().numpy() for each in (catalogue.item, catalogue.category))
        transitions = item_transitions(sessions, m)
        if self.source == "semantic":
            item, category = np.arange(1, m + 1), self._pseudo(transitions, table)
        k = int(category.max()) + 1 if len(category) else 0
        if k == 0:
            raise UserError(f"source: expected semantic for items without categories, got {self.source}")
        if self.source == "attribute":
            label, n = np.arange(k), k
        else:
            label, n = self._clusters(category_graph(transitions, item, category, self.self_loops), k), self.n
        pairs = np.unique(np.stack([item, label[category]]), axis=1)
        if self.source == "random":
            pairs[0] = 1 + np.random.default_rng(self.seed).permutation(m)[pairs[0] - 1]
        pairs = pairs[:, catalogue.clicks.cpu().numpy()[pairs[0]] > 0]
        intents = Intents(torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1]), n, m)
        _warn_of_one(intents, catalogue)
        return intents

    def _clusters(self, graph: sp.csr_array, k: int) -> np.ndarray:
        """Intent (k,) of each category."""
        if self.n > k:
            raise UserError(f"n: expected at most {k} intents, as many as there are categories, got {self.n}")
        if self.top_neighbours is not None:
            graph = strongest(graph, self.top_neighbours)
        q = min(self.eigenvectors or self.n, k - self.drop_first)
        vectors = smallest_eigenvectors(graph, max(q, 1) + self.drop_first, self.laplacian == "normalised", self.seed)
        vectors = vectors[:, int(self.drop_first) :] if vectors.shape[1] > 1 else vectors
        return _kmeans(_unit(vectors) if self.row_normalise else vectors, self.n, self.restarts, self.seed)

    def _pseudo(self, transitions: sp.csr_array, table: Tensor | None) -> np.ndarray:
        """Pseudo-category (m,) of each item, by k-means on unit vectors."""
        from sklearn.utils.extmath import randomized_svd

        m, k = transitions.shape[0] - 1, self.pseudo_categories
        if k > m:
            raise UserError(f"pseudo_categories: expected at most {m}, the number of items, got {k}")
        if table is None:
            near = transitions[1:, 1:].copy()
            near.data = np.log1p(near.data)  # or a few pairs of very popular items would be all that a rank of 32 sees
            left, size, _ = randomized_svd(near, min(_SVD_RANK, m), random_state=self.seed)
            vectors = left * np.sqrt(size)
        else:
            vectors = table[1:].detach().double().cpu().numpy()
        return _kmeans(_unit(vectors), k, 1, self.seed)


def item_transitions(sessions: Sessions, num_items: int) -> sp.csr_array:
    """Symmetric (m + 1, m + 1) counts of neighbouring clicks: each pair counts in both directions."""
    one, other = neighbouring_clicks(sessions)
    counts = sp.coo_array((np.ones(len(one)), (one, other)), (num_items + 1, num_items + 1)).tocsr()
    return (counts + counts.T).tocsr()


def category_graph(transitions: sp.csr_array, item: np.ndarray, category: np.ndarray, loops: bool) -> sp.csr_array:
    """Weights W (k, k) between categories: of two neighbouring clicks every pair of categories counts once.

    Args:
        transitions: counts of `item_transitions`.
        item: (P,) with `category` (P,) the pairs of an item and a category.
        category: from 0.
        loops: keep the diagonal.
    """
    shape = (transitions.shape[0], int(category.max()) + 1)
    member = sp.csr_array((np.ones(len(item)), (item, category)), shape)
    graph = (member.T @ transitions @ member).tocsr()
    if not loops:
        graph.setdiag(0)
    graph.eliminate_zeros()
    return graph


def strongest(graph: sp.csr_array, count: int) -> sp.csr_array:
    """Keep the edges that are among the `count` strongest of one of their ends; of equal ones those to smaller ids."""
    coo = graph.tocoo()
    row, column = coo.coords
    kept = place_within(row, -coo.data, column) < count
    directed = sp.csr_array((coo.data[kept], (row[kept], column[kept])), graph.shape)
    return directed.maximum(directed.T).tocsr()


def smallest_eigenvectors(graph: sp.csr_array, q: int, normalised: bool, seed: int) -> np.ndarray:
    """Eigenvectors (k, q) of the q smallest eigenvalues of the Laplacian of symmetric weights W (k, k).

    A node without neighbours has eigenvalue 1 of the normalised Laplacian, as if its degree were 1: it counts neither
    as a cluster of its own nor takes an eigenvector from others, and k-means sees it at the origin.
    """
    k = graph.shape[0]
    degree = np.asarray(graph.sum(1), dtype=float).ravel()
    degree[degree == 0] = 1
    if normalised:
        scale = sp.diags_array(degree**-0.5)
        affinity = scale @ graph @ scale  # its largest eigenvalues are the Laplacian's smallest, and Lanczos is quick
    else:
        affinity = graph - sp.diags_array(degree)
    if k <= _DENSE_BELOW or q >= k - 1:
        return np.linalg.eigh(affinity.toarray())[1][:, ::-1][:, :q]
    start = np.random.default_rng(seed).standard_normal(k)
    basis = min(max(q + min(q + 1, 100), 20), k)  # ARPACK's own 2q + 1 is slow where q is large
    # The last of many eigenvalues lie close together: k-means does not mind a mixture of their vectors, Lanczos would
    # take three times as long to part them.
    tolerance = 1e-2 if q > 100 else 1e-6
    value, vector = sp.linalg.eigsh(affinity.tocsr(), q, which="LA", v0=start, ncv=basis, tol=tolerance)
    return vector[:, np.argsort(-value, kind="stable")]


def _kmeans(points: np.ndarray, clusters: int, restarts: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    return KMeans(clusters, n_init=restarts, random_state=seed % 2**32).fit_predict(points.astype(np.float32))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _warn_of_one(intents: Intents, catalogue: Catalogue) -> None:
    share = intents.share(catalogue.clicks.to(intents.item.device))
    largest = int(share.argmax())
    if share[largest] > _MOSTLY_ONE and intents.num_intents > 1:
        warnings.warn(
            f"intent {largest} holds {100 * share[largest].item():.0f} % of the clicks, so intents tell little apart; "
            f"more of them (n, now {intents.num_intents}) split it",
            stacklevel=3,
        )
