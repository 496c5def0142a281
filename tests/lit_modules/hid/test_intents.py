"""Intents are the clusters that scikit-learn finds, those that were planted, and counts of a plain loop."""

import itertools
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.metrics import adjusted_rand_score

from leanlight.contracts import UserError
from leanlight.contracts.sessions import Catalogue, Sessions
from lit_modules.hid.intents import (
    HybridIntents,
    Intents,
    category_graph,
    item_transitions,
    smallest_eigenvectors,
    strongest,
)

GROUPS, CATEGORIES, ITEMS = 5, 6, 4  # planted intents, categories of each, items of a category


def whole(lists):
    return Sessions(
        torch.tensor([*itertools.chain(*lists)]), torch.tensor([0, *np.cumsum([len(each) for each in lists])])
    )


def a_catalogue(pairs, m, clicks=None):
    item, category = torch.tensor(sorted(pairs)).T
    clicks = torch.ones(m + 1, dtype=torch.int64) if clicks is None else clicks
    names = tuple(f"c{number}" for number in range(int(category.max()) + 1))
    return Catalogue(tuple(map(str, range(1, m + 1))), names, item, category, clicks, clicks > 1)


def planted(seed=0, sessions=600, jump=0.15):
    """Sessions that mostly stay within a group of categories; catalogue; group of each item (m,)."""
    rng = np.random.default_rng(seed)
    m = GROUPS * CATEGORIES * ITEMS
    category = rng.permutation(np.arange(m) // ITEMS)
    group = rng.permutation(np.arange(GROUPS * CATEGORIES) // CATEGORIES)[category]
    inside = [1 + np.flatnonzero(group == each) for each in range(GROUPS)]
    lists = []
    for _ in range(sessions):
        now, clicks = rng.integers(GROUPS), []
        for _ in range(rng.integers(3, 9)):
            now = rng.integers(GROUPS) if rng.random() < jump else now
            clicks.append(int(rng.choice(inside[now])))
        lists.append(clicks)
    found = whole(lists)
    clicks = torch.bincount(found.items, minlength=m + 1)
    return found, a_catalogue([(i + 1, int(c)) for i, c in enumerate(category)], m, clicks), group


def labels(intents):
    return intents.ids(torch.arange(1, intents.num_items + 1))[:, 0].numpy()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_intents_are_found_exactly(seed):
    sessions, catalogue, group = planted(seed)
    assert adjusted_rand_score(group, labels(HybridIntents(GROUPS).build(catalogue, sessions))) == 1.0


@pytest.mark.parametrize(
    "options",
    [
        {"laplacian": "plain", "drop_first": True},
        {"row_normalise": True},
        {"self_loops": True},
        {"top_neighbours": 4},
        {"eigenvectors": GROUPS + 2},
    ],
)
def test_planted_intents_are_found_under_every_switch(options):
    sessions, catalogue, group = planted(4)
    assert adjusted_rand_score(group, labels(HybridIntents(GROUPS, **options).build(catalogue, sessions))) == 1.0


def test_clusters_are_those_of_scikit_learn():
    sessions, catalogue, _ = planted(5, jump=0.35)  # no longer those that were planted
    transitions = item_transitions(sessions, catalogue.num_items)
    graph = category_graph(transitions, catalogue.item.numpy(), catalogue.category.numpy(), loops=False)
    theirs = SpectralClustering(
        4, affinity="precomputed", n_init=20, random_state=0, assign_labels="kmeans", eigen_solver="arpack"
    ).fit_predict(graph.toarray())
    # scikit-learn divides rows of eigenvectors by the root of the degree; Eq. 1 does not, rows of length 1 cannot tell.
    vectors = smallest_eigenvectors(graph, 4, normalised=True, seed=0)
    scaled = vectors / np.sqrt(graph.sum(1))[:, None]
    assert adjusted_rand_score(theirs, KMeans(4, n_init=20, random_state=0).fit_predict(scaled)) == 1.0


@pytest.mark.parametrize("normalised", [True, False])
def test_lanczos_finds_the_eigenvectors_of_the_dense_laplacian(normalised, monkeypatch):
    sessions, catalogue, _ = planted(6)
    transitions = item_transitions(sessions, catalogue.num_items)
    graph = category_graph(transitions, catalogue.item.numpy(), catalogue.category.numpy(), loops=False)
    dense = graph.toarray()
    degree = dense.sum(1)
    laplacian = np.diag(degree) - dense
    laplacian = laplacian / np.sqrt(np.outer(degree, degree)) if normalised else laplacian
    value, vector = np.linalg.eigh(laplacian)
    wanted = vector[:, :7] @ vector[:, :7].T  # of a subspace, whatever the signs
    assert value[7] - value[6] > 1e-3
    for dense_below in (1000, 0):
        monkeypatch.setattr("lit_modules.hid.intents._DENSE_BELOW", dense_below)
        got = smallest_eigenvectors(graph, 7, normalised, seed=1)
        np.testing.assert_allclose(got @ got.T, wanted, atol=1e-4)


def test_the_graph_of_categories_counts_each_session_once_and_both_directions():
    lists = [[1, 2, 2, 3], [4], [3, 1], [2, 4, 1, 2]]
    categories = {1: [0], 2: [1, 2], 3: [0, 2], 4: [3]}
    wanted = Counter()
    for clicks in lists:
        for one, other in itertools.pairwise(clicks):
            for a in categories[one]:
                for b in categories[other]:
                    wanted[a, b] += 1
                    wanted[b, a] += 1
    pairs = [(item, category) for item, its in categories.items() for category in its]
    item, category = np.array(pairs).T
    graph = category_graph(item_transitions(whole(lists), 4), item, category, loops=True).toarray()
    assert {tuple(map(int, at)): graph[tuple(at)] for at in np.argwhere(graph)} == wanted
    without = category_graph(item_transitions(whole(lists), 4), item, category, loops=False).toarray()
    np.testing.assert_array_equal(without, graph - np.diag(graph.diagonal()))


def test_the_strongest_edges_of_either_end_stay():
    weights = np.zeros((4, 4))
    for one, other, weight in ((0, 1, 5), (0, 2, 3), (0, 3, 1), (1, 2, 3)):
        weights[one, other] = weights[other, one] = weight
    kept = strongest(csr_array(weights), 1).toarray()
    # 0 and 1 choose each other, 2 the smaller of two equals, 3 its only neighbour.
    expected = weights.copy()
    expected[1, 2] = expected[2, 1] = 0
    np.testing.assert_array_equal(kept, expected)


def test_a_category_that_is_never_beside_another_takes_no_cluster_from_the_others():
    sessions, catalogue, group = planted(7)
    m, k = catalogue.num_items, len(catalogue.categories)
    alone = [(m + 1, k), (m + 2, k + 1)]
    pairs = [*zip(catalogue.item.tolist(), catalogue.category.tolist(), strict=True), *alone]
    more = a_catalogue(pairs, m + 2)
    found = labels(HybridIntents(GROUPS).build(more, sessions))
    assert adjusted_rand_score(group, found[:m]) == 1.0
    assert found[m] == found[m + 1]


def test_centroids_are_means_over_the_items_that_were_clicked():
    pairs = [(1, 0), (2, 0), (2, 1), (3, 1), (4, 2)]
    clicks = torch.tensor([0, 3, 1, 2, 0])
    intents = HybridIntents(source="attribute").build(a_catalogue(pairs, 4, clicks), whole([[1, 2, 3]]))
    table = torch.randn(5, 3, requires_grad=True)
    centroids = intents.centroids(table)
    wanted = torch.stack([(table[1] + table[2]) / 2, (table[2] + table[3]) / 2, torch.zeros(3)])
    torch.testing.assert_close(centroids, wanted)
    assert intents.of(torch.tensor([2, 1, 4, 3])).tolist() == [
        [True, True, False],
        [True, False, False],
        [False, False, False],
        [False, True, False],
    ]
    centroids.sum().backward()
    torch.testing.assert_close(table.grad[:, 0], torch.tensor([0, 0.5, 1, 0.5, 0]))
    torch.testing.assert_close(intents.share(), torch.tensor([2, 2, 0]) / 4)
    torch.testing.assert_close(intents.share(clicks), torch.tensor([4, 3, 0]) / 6)


def test_intents_come_back_from_a_checkpoint(tmp_path):
    sessions, catalogue, _ = planted(8)
    intents = HybridIntents(GROUPS).build(catalogue, sessions)
    assert not intents.state_dict()
    torch.save(intents.data, tmp_path / "intents.pt")
    again = Intents(**torch.load(tmp_path / "intents.pt", weights_only=True))
    table = torch.randn(catalogue.num_items + 1, 3)
    assert torch.equal(again.centroids(table), intents.centroids(table))
    assert torch.equal(again.member, intents.member)


def test_random_intents_have_the_sizes_of_hybrid_ones_and_not_their_meaning():
    sessions, catalogue, group = planted(9)
    hybrid, random = (HybridIntents(GROUPS, source).build(catalogue, sessions) for source in ("hybrid", "random"))
    assert torch.equal(hybrid.share(), random.share())
    assert abs(adjusted_rand_score(group, labels(random))) < 0.1


def test_attributes_alone_are_intents_of_their_own():
    sessions, catalogue, _ = planted(10)
    intents = HybridIntents(n=1, source="attribute").build(catalogue, sessions)
    assert intents.num_intents == GROUPS * CATEGORIES
    assert torch.equal(intents.ids(catalogue.item)[:, 0], catalogue.category)


@pytest.mark.parametrize("embedded", [False, True])
def test_semantic_intents_need_no_categories(embedded):
    sessions, catalogue, group = planted(11, sessions=2000, jump=0.05)
    bare = Catalogue(catalogue.names, (), catalogue.item[:0], catalogue.item[:0], catalogue.clicks, catalogue.head)
    generator = torch.Generator().manual_seed(0)
    places = torch.randn(GROUPS, 8, generator=generator)[torch.from_numpy(group)]
    noise = 0.05 * torch.randn(len(group), 8, generator=generator)
    table = torch.cat([torch.zeros(1, 8), places + noise]) if embedded else None
    rule = HybridIntents(GROUPS, "semantic", pseudo_categories=20)
    assert adjusted_rand_score(group, labels(rule.build(bare, sessions, table))) > 0.9


def test_the_same_seed_gives_the_same_intents():
    sessions, catalogue, _ = planted(12, jump=0.5)
    one, two = (HybridIntents(4, seed=3).build(catalogue, sessions).member for _ in range(2))
    assert torch.equal(one, two)


def test_one_warning_when_an_intent_holds_nearly_all_clicks():
    sessions, catalogue, _ = planted(13)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        HybridIntents(GROUPS).build(catalogue, sessions)
        assert not caught
        clicks = catalogue.clicks.clone()
        clicks[1] = 50 * clicks.sum()
        HybridIntents(GROUPS).build(replace(catalogue, clicks=clicks), sessions)
    assert [str(each.message)[:6] for each in caught] == ["intent"]
    assert "holds 98 % of the clicks" in str(caught[0].message)


def test_bad_settings_are_named_in_one_line():
    sessions, catalogue, _ = planted(14)
    with pytest.raises(UserError, match=r"^n: expected at most 30 intents, as many as there are categories, got 31$"):
        HybridIntents(31).build(catalogue, sessions)
    bare = Catalogue(catalogue.names, (), catalogue.item[:0], catalogue.item[:0], catalogue.clicks, catalogue.head)
    with pytest.raises(UserError, match=r"^source: expected semantic for items without categories, got hybrid$"):
        HybridIntents(4).build(bare, sessions)
    with pytest.raises(UserError, match=r"^pseudo_categories: expected at most 120, the number of items, got 121$"):
        HybridIntents(4, "semantic", pseudo_categories=121).build(bare, sessions)
    with pytest.raises(UserError, match=r"^laplacian: expected one of normalised, plain, got 'none'$"):
        HybridIntents(4, laplacian="none")
    with pytest.raises(UserError, match=r"^n: expected an integer of at least 1, got 0$"):
        HybridIntents(0)
