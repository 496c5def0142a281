"""Frequencies of the planted sessions."""

import numpy as np
import pytest

from datamodules import Planted
from leanlight.contracts import UserError


def test_sessions_follow_the_planted_rules():
    raw = Planted(train_sessions=60_000, test_sessions=500).make()
    assert (len(raw.items.names), len(raw.items.categories), len(raw.train), len(raw.test)) == (2400, 96, 60_000, 500)
    lengths = np.bincount(raw.train.lengths)[3:] / 60_000
    assert np.abs(lengths - np.full(6, 1 / 6)).max() < 0.01
    weight = np.arange(1, 26) ** -1.2
    popularity = np.tile(weight / weight.sum(), 96) / 8  # of an item in its intent
    first = np.bincount(raw.train.items[raw.train.offsets[:-1]], minlength=2400) / 60_000
    assert np.abs(first - popularity / 12).max() < 0.001

    # Steps against their probabilities, for the items with most: 20 % jumps, 30 % draws, 12.5 % each successor.
    steps = np.zeros((2400, 2400))
    ends = np.zeros(len(raw.train.items), bool)
    ends[raw.train.offsets[1:] - 1] = True
    np.add.at(steps, (raw.train.items[:-1][~ends[:-1]], raw.train.items[1:][~ends[:-1]]), 1)
    busy = np.flatnonzero(steps.sum(1) >= 500)
    assert len(busy) > 50
    intent = np.arange(2400) // 200
    expected = popularity * (0.2 / 12 + 0.3 * (intent[busy, None] == intent))
    total = steps[busy].sum(1, keepdims=True)
    successors = np.argsort(steps[busy] - total * expected)[:, -4:]
    assert (intent[successors] == intent[busy, None]).all()
    assert (successors != busy[:, None]).all()
    np.put_along_axis(expected, successors, np.take_along_axis(expected, successors, 1) + 0.125, 1)
    common = total * expected > 20
    deviation = (steps[busy] - total * expected)[common] / np.sqrt(total * expected * (1 - expected))[common]
    assert abs(deviation.mean()) < 0.1
    assert deviation.std() == pytest.approx(1, abs=0.1)


def test_names_say_intent_category_and_rank():
    items = Planted().make().items
    assert items.names[1 * 200 + 2 * 25 + 3] == "1.2.3"
    assert items.categories[items.category[1 * 200 + 2 * 25 + 3]] == "1.2"


def test_its_own_seed_alone_makes_the_sessions():
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    one, same, other = Planted().make(), Planted().make(), Planted(seed=1).make()
    assert np.array_equal(one.train.items, same.train.items)
    assert not np.array_equal(one.test.lengths, other.test.lengths)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


def test_successors_are_different_items_of_the_intent():
    planted = Planted(intents=5, categories=2, items=3, successors=5)
    found = planted._successors(np.random.default_rng(0))
    for item, others in enumerate(found.tolist()):
        own = range(item // 6 * 6, item // 6 * 6 + 6)
        assert sorted(others) == [other for other in own if other != item]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"items": 0}, "planted.items: expected at least 1, got 0"),
        ({"min_length": 9}, "planted.min_length: expected at most max_length"),
        ({"jump": 0.6}, "planted.follow: expected jump and follow from 0, in all at most 1"),
        ({"categories": 1, "items": 4}, "planted.successors: expected fewer than the other items"),
    ],
)
def test_impossible_settings_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        Planted(**arguments)
