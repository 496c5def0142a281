"""Floors give what plain loops over the sessions give."""

import math

import pytest
import torch

from leanlight.contracts.sessions import Catalogue, Sessions
from lit_modules.hid.floors import ItemKNN, Popularity, SessionPopularity

M = 40


def sessions(count=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draws = torch.distributions.Categorical(1 / torch.arange(1, M + 1.0))
    torch.manual_seed(seed)
    lists = [(draws.sample((int(torch.randint(2, 8, (1,), generator=generator)),)) + 1).tolist() for _ in range(count)]
    sizes = torch.tensor([0, *map(len, lists)]).cumsum(0)
    return lists, Sessions(torch.tensor([item for each in lists for item in each]), sizes)


def prepared(floor, whole):
    clicks = torch.bincount(whole.items, minlength=M + 1)
    none = torch.zeros(0, dtype=torch.int64)
    catalogue = Catalogue(tuple(map(str, range(1, M + 1))), (), none, none, clicks, clicks > clicks.median())
    floor.prepare(catalogue, whole)
    return floor, clicks


def batch(lists):
    length = torch.tensor([len(each) for each in lists])
    items = torch.zeros(len(lists), int(length.max()), dtype=torch.int64)
    for row, each in zip(items, lists, strict=True):
        row[: len(each)] = torch.tensor(each)
    return items, length


def ranking(scores):
    """Items from the best, equal ones by number."""
    return [sorted(range(1, M + 1), key=lambda item: (-row[item - 1], item)) for row in scores.tolist()]


def test_popularity_ranks_by_clicks_whatever_the_session():
    lists, whole = sessions()
    floor, clicks = prepared(Popularity(M), whole)
    expected = sorted(range(1, M + 1), key=lambda item: (-int(clicks[item]), item))
    assert ranking(floor.scores(*batch(lists[:3]))) == [expected] * 3


def test_session_popularity_breaks_ties_by_clicks_in_training():
    lists, whole = sessions()
    floor, clicks = prepared(SessionPopularity(M), whole)
    for case, got in zip(lists, ranking(floor.scores(*batch(lists))), strict=True):
        key = lambda item, case=case: (-case.count(item), -int(clicks[item]), item)  # noqa: E731
        assert got == sorted(range(1, M + 1), key=key)


@pytest.mark.parametrize("neighbours", [3, 100])
def test_item_knn_has_the_cosines_over_sessions_of_a_plain_loop(neighbours):
    lists, whole = sessions()
    floor, clicks = prepared(ItemKNN(M, neighbours), whole)
    held = {item: {number for number, each in enumerate(lists) if item in each} for item in range(1, M + 1)}
    scores = floor.scores(*batch(lists))
    order = ranking(scores)
    for case, row, got in zip(lists, scores, order, strict=True):
        own = held[case[-1]]
        cosine = {
            item: len(own & its) / math.sqrt(len(own) * len(its))
            for item, its in held.items()
            if item != case[-1] and own & its
        }
        near = sorted(cosine, key=lambda item: (-cosine[item], item))[:neighbours]
        rest = sorted(set(held) - set(near), key=lambda item: (-int(clicks[item]), item))
        assert got[: len(near)] == near or neighbours == 100  # cosines that are equal up to a rounding may swap
        torch.testing.assert_close(row[[i - 1 for i in near]], torch.tensor([cosine[i] for i in near]))
        assert got[len(near) :] == rest
        assert (row[[i - 1 for i in rest]] < 0).all()


@pytest.mark.parametrize("kind", [Popularity, SessionPopularity, ItemKNN])
def test_what_is_counted_is_in_the_state_dict(kind):
    lists, whole = sessions()
    floor, _ = prepared(kind(M), whole)
    assert not floor.trains
    assert not [*floor.parameters()]
    again = kind(M)
    again.load_state_dict(floor.state_dict())
    assert torch.equal(again.scores(*batch(lists)), floor.scores(*batch(lists)))
