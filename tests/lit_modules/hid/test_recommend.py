"""Lists in original ids: the best scores, nothing that is left out, and one line for what is not known."""

import pytest
import torch
from session_networks import ITEMS, catalogue, make

from leanlight.contracts import UserError
from lit_modules.hid.recommend import ItemFacts, recommend

NAMES = catalogue().names


@pytest.fixture(scope="module")
def asked():
    """Network, facts, and sessions of several lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 1, 7, 2, 2, 5, 1]
    sessions = [[NAMES[i] for i in torch.randint(0, ITEMS, (n,), generator=generator).tolist()] for n in lengths]
    return make("STAMP"), ItemFacts(catalogue()), sessions


def best(network, session, k, allowed):
    """By sorting the scores of one session at a time."""
    items = torch.tensor([[NAMES.index(name) + 1 for name in session]])
    with torch.no_grad():
        scores = network(items)[0].tolist()
    order = sorted((name for name in NAMES if name in allowed), key=lambda name: -scores[NAMES.index(name)])
    return order[:k]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_each_list_is_the_best_of_its_own_session_whatever_is_asked_beside_it(asked, batch_size):
    network, facts, sessions = asked
    lists = recommend(network, facts, sessions, 4, batch_size=batch_size)
    assert [[one.item for one in found] for found in lists] == [best(network, s, 4, NAMES) for s in sessions]
    for found in lists:
        assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)


def test_what_was_clicked_is_left_out_and_other_categories_are(asked):
    network, facts, sessions = asked
    items = catalogue()
    hats = {NAMES[i - 1] for i in items.item[items.category == 1].tolist()}
    lists = recommend(network, facts, sessions, 3, exclude_seen=True, category="hats")
    assert [[one.item for one in found] for found in lists] == [best(network, s, 3, hats - set(s)) for s in sessions]
    assert all("hats" in one.category.split(";") for found in lists for one in found)
    for one in (one for found in lists for one in found):
        assert one.head == bool(items.head[NAMES.index(one.item) + 1])


def test_a_list_is_shorter_where_less_is_left(asked):
    network, facts, _ = asked
    (found,) = recommend(network, facts, [NAMES[:25]], ITEMS, exclude_seen=True)
    assert sorted(one.item for one in found) == sorted(NAMES[25:])


@pytest.mark.parametrize(
    ("sessions", "options", "words"),
    [
        ([["p99", "p1000"]], {}, r"^session: item 'p1000' is none of the 30 .*did you mean 'p"),
        ([["p99"]], {"k": 31}, r"^k: expected 1 to 30, the items of the catalogue, got 31"),
        ([["p99"]], {"k": 0}, r"^k: expected 1 to 30"),
        ([["p99"]], {"k": 12, "category": "hats"}, r"^k: expected 1 to 10, the items of the category 'hats', got 12"),
        (
            [["p99"]],
            {"category": "hat"},
            r"^category: expected one of 3 categories, got 'hat' \(did you mean 'hats'\?\)",
        ),
        ([["p99"], []], {}, r"^session: expected one item at least"),
    ],
)
def test_what_is_not_known_is_refused_in_one_line(asked, sessions, options, words):
    network, facts, _ = asked
    with pytest.raises(UserError, match=words):
        recommend(network, facts, sessions, **options)
