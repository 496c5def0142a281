"""Partitions of a federation: who gets what, against the recipes that name them."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from datamodules import IID, ClassesPerClient, ClassImbalance, Dirichlet, QuantitySkew, Shards
from datamodules.clients.partition import class_matrix
from leanlight.contracts import UserError

LABELS = load_digits().target
SCHEMES = [
    IID(),
    Dirichlet(0.3),
    Dirichlet(0.3, capped=False),
    QuantitySkew(0.5),
    QuantitySkew(0.5, guarantee_all_classes=True),
    ClassesPerClient(2),
    Shards(2),
    ClassImbalance(3.0, 0.3),
    ClassImbalance(3.0, 0.3, spread="quantity"),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_parts_are_disjoint_sorted_and_a_function_of_the_seed(scheme):
    parts = scheme.split(LABELS, 20, seed=3)
    everything = np.concatenate(parts)
    assert len(parts) == 20
    assert len(np.unique(everything)) == len(everything)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert all(len(part) for part in parts)
    again, other = scheme.split(LABELS, 20, seed=3), scheme.split(LABELS, 20, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))
    assert np.array_equal(class_matrix(LABELS, parts, 10), [[(LABELS[p] == c).sum() for c in range(10)] for p in parts])


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if not isinstance(s, ClassImbalance)], ids=repr)
def test_every_item_has_an_owner(scheme):
    assert sum(map(len, scheme.split(LABELS, 20, seed=0))) == len(LABELS)


def test_iid_parts_have_equal_size():
    sizes = {len(part) for part in IID().split(LABELS, 20, seed=0)}
    assert max(sizes) - min(sizes) <= 1


def test_a_dirichlet_partition_is_more_skewed_the_smaller_alpha_is():
    def largest_share(alpha):
        shares = []
        for seed in range(10):
            counts = class_matrix(LABELS, Dirichlet(alpha, capped=False).split(LABELS, 10, seed), 10)
            shares.append((counts / counts.sum(0)).max(0).mean())
        return np.mean(shares)

    # The largest of n Dirichlet(a) parts, averaged: by simulation of the distribution itself.
    generator = np.random.default_rng(0)
    for alpha in (0.1, 1.0, 100.0):
        expected = generator.dirichlet(np.full(10, alpha), 20_000).max(1).mean()
        assert largest_share(alpha) == pytest.approx(expected, abs=0.07)


def test_a_capped_dirichlet_client_takes_no_class_after_it_has_its_share():
    labels = np.repeat(np.arange(10), 100)
    for seed in range(5):
        held = np.zeros(8, int)
        counts = class_matrix(labels, Dirichlet(0.1).split(labels, 8, seed), 10)
        for label in range(10):
            assert (counts[held >= 1000 / 8, label] == 0).all()
            held += counts[:, label]


def test_a_dirichlet_client_has_at_least_the_smallest_size():
    assert min(map(len, Dirichlet(0.1, min_size=10).split(LABELS, 40, seed=0))) >= 10


def test_an_uncapped_dirichlet_partition_may_leave_clients_empty():
    assert min(map(len, Dirichlet(0.01, min_size=0, capped=False).split(LABELS, 100, seed=0))) == 0


def test_a_client_owns_its_own_class_and_others_in_even_pieces():
    counts = class_matrix(LABELS, ClassesPerClient(3).split(LABELS, 20, seed=1), 10)
    assert ((counts > 0).sum(1) == 3).all()
    assert all(counts[client, client % 10] > 0 for client in range(20))
    for label in range(10):
        pieces = counts[counts[:, label] > 0, label]
        assert pieces.max() - pieces.min() <= 1


def test_two_shards_hold_few_classes():
    counts = class_matrix(LABELS, Shards(2).split(LABELS, 20, seed=1), 10)
    assert ((counts > 0).sum(1) <= 4).all()  # a shard of 45 items of about 180 a class spans two at most
    assert (counts.sum(1) >= 2 * (len(LABELS) // 40)).all()


def test_quantity_skew_guarantees_all_classes_on_demand():
    counts = class_matrix(LABELS, QuantitySkew(0.1, guarantee_all_classes=True).split(LABELS, 20, seed=1), 10)
    assert (counts > 0).all()
    sizes = np.sort(counts.sum(1))
    assert sizes[-1] > 5 * sizes[0]


@pytest.mark.parametrize("spread", ["label", "quantity"])
def test_class_imbalance_keeps_a_third_of_the_later_classes(spread):
    counts = class_matrix(LABELS, ClassImbalance(3.0, 0.5, spread).split(LABELS, 20, seed=1), 10).sum(0)
    full = np.bincount(LABELS)
    assert np.array_equal(counts[:5], full[:5])
    assert np.array_equal(counts[5:], np.round(full[5:] / 3).astype(int))


@pytest.mark.parametrize(
    ("scheme", "clients", "words"),
    [
        (IID(), 2000, "clients: 2000"),
        (Dirichlet(0.0), 5, "alpha"),
        (Dirichlet(0.05, min_size=40), 40, "lower min_size"),
        (ClassesPerClient(11), 5, "classes: expected 1 to 10, got 11"),
        (Shards(0), 5, "shards"),
        (ClassImbalance(0.5), 5, "ratio"),
    ],
)
def test_what_cannot_be_split_is_said_in_one_line(scheme, clients, words):
    with pytest.raises(UserError, match=words):
        scheme.split(LABELS, clients, seed=0)


def test_an_impossible_split_is_found_after_few_draws(monkeypatch):
    draws, draw = [], Dirichlet._draw
    monkeypatch.setattr(Dirichlet, "_draw", lambda *given: draws.append(1) or draw(*given))
    labels = np.arange(3000) % 10
    with pytest.raises(UserError, match="clients were short at best; lower min_size"):
        Dirichlet(0.3).split(labels, 1000, seed=0)
    assert len(draws) <= 10
