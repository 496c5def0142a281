"""Plug-ins do what loops over sessions, walks and items do."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from leanlight.contracts import UserError
from leanlight.contracts.sessions import Catalogue, SessionBatch, Sessions
from lit_modules.hid.plugins import LAPSR, LOAM, Plugin, TailNet
from lit_modules.hid.scoring import Scoring

M, DIM, HEAD = 25, 6, 5


def training(count=120, seed=0):
    """Sessions of items of which smaller numbers are more popular, and their catalogue."""
    torch.manual_seed(seed)
    popular = torch.distributions.Categorical(1 / torch.arange(1, M + 1.0))
    lists = [(popular.sample((int(torch.randint(2, 7, (1,))),)) + 1).tolist() for _ in range(count)]
    whole = Sessions(torch.tensor(sum(lists, start=[])), torch.tensor([0, *map(len, lists)]).cumsum(0))  # noqa: RUF017
    clicks = torch.bincount(whole.items, minlength=M + 1)
    head = torch.zeros(M + 1, dtype=torch.bool)
    head[clicks.argsort(descending=True, stable=True)[:HEAD]] = True
    none = torch.zeros(0, dtype=torch.int64)
    return lists, whole, Catalogue(tuple(map(str, range(1, M + 1))), (), none, none, clicks, head)


def prepared(plugin):
    lists, whole, catalogue = training()
    plugin.prepare(catalogue, whole)
    return plugin, lists, catalogue


def a_batch(count=30, width=5, seed=1):
    torch.manual_seed(seed)
    length = torch.randint(1, width + 1, (count,))
    items = torch.randint(1, M + 1, (count, width)) * (torch.arange(width) < length[:, None])
    return SessionBatch(items, length, torch.randint(1, M + 1, (count,)), torch.arange(count))


def vectors(batch, seed=2):
    torch.manual_seed(seed)
    return torch.randn(len(batch), DIM, requires_grad=True), torch.randn(M + 1, DIM, requires_grad=True)


def predecessors(lists, batch, catalogue):
    """Of each item, within the batch, the least clicked first; without a limit on edges."""
    inside = set(batch.items.flatten().tolist()) | set(batch.target.tolist())
    found = {item: set() for item in range(1, M + 1)}
    for clicks in lists:
        for one, other in itertools.pairwise(clicks):
            if one in inside:
                found[other].add(one)
    return {item: sorted(its, key=lambda i: (int(catalogue.clicks[i]), i)) for item, its in found.items()}


def test_a_plugin_of_its_own_changes_nothing():
    plugin, *_ = prepared(Plugin())
    batch = a_batch()
    session, table = vectors(batch)
    scores = session @ table[1:].T
    assert plugin.augment(batch, torch.Generator()) is batch
    assert plugin.loss(session, batch, table, Scoring()) == {}
    assert plugin.rescore(scores, session, batch.items, batch.length, table) is scores


def test_without_chance_walks_go_to_the_least_clicked_predecessor():
    plugin, lists, catalogue = prepared(LOAM(alpha=0.0, steps=6, head_edges=1000))
    batch = a_batch(8)
    before = predecessors(lists, batch, catalogue)
    path, steps = plugin.walk(batch, 20, torch.Generator().manual_seed(0))
    assert path.shape == (100, 7)
    assert len({*path[:, 0].tolist()}) > 3
    for walked, count in zip(path.tolist(), steps.tolist(), strict=True):
        expected = [walked[0]]
        while len(expected) <= 6 and before[expected[-1]]:
            expected.append(before[expected[-1]][0])
        assert walked == expected + [0] * (7 - len(expected))
        assert count == len(expected) - 1


def test_with_chance_walks_go_to_every_predecessor_in_the_batch_alike():
    plugin, lists, catalogue = prepared(LOAM(alpha=1.0, steps=1, walks=4000, head_edges=1000))
    batch = a_batch(1, seed=3)
    target = next(item for item in range(1, M + 1) if catalogue.head[item])
    batch = SessionBatch(torch.arange(1, 13)[None], torch.tensor([12]), torch.tensor([target]), torch.arange(1))
    allowed = predecessors(lists, batch, catalogue)[target]
    assert 3 < len(allowed) < 13
    path, _ = plugin.walk(batch, 1, torch.Generator().manual_seed(0))
    seen = torch.bincount(path[:, 1], minlength=M + 1)
    assert seen.nonzero()[:, 0].tolist() == sorted(allowed)
    assert (seen[allowed] - 4000 / len(allowed)).abs().max() < 5 * math.sqrt(4000 / len(allowed))


def test_items_of_the_head_keep_a_sample_of_their_transitions_and_others_keep_all():
    plugin, lists, catalogue = prepared(LOAM(head_edges=3))
    target = torch.repeat_interleave(torch.arange(M + 1), plugin.begin.diff())
    kept = {*zip(plugin.predecessor.tolist(), target.tolist(), strict=True)}
    edges = {pair for clicks in lists for pair in itertools.pairwise(clicks)}
    assert kept < edges
    for item in range(1, M + 1):
        own = {pair for pair in edges if pair[0] == item}
        here = {pair for pair in kept if pair[0] == item}
        assert len(here) == min(3, len(own)) if catalogue.head[item] else here == own
    again, *_ = prepared(LOAM(head_edges=3))
    assert torch.equal(again.predecessor, plugin.predecessor)
    other, *_ = prepared(LOAM(head_edges=3, seed=1))
    assert not torch.equal(other.predecessor, plugin.predecessor)


def test_a_walk_read_backwards_is_a_session_whose_target_is_its_start():
    plugin, lists, catalogue = prepared(LOAM(steps=7))
    batch = a_batch(30, width=4)
    more = plugin.augment(batch, torch.Generator().manual_seed(5))
    assert torch.equal(plugin.augment(batch, torch.Generator().manual_seed(5)).items, more.items)
    assert len(more) == 33
    assert more.items.shape[1] == 7
    assert torch.equal(more.items[:30, :4], batch.items)
    assert not more.items[:30, 4:].any()
    assert torch.equal(more.select(torch.arange(30)).target, batch.target)
    assert more.index.tolist() == [*range(30), -1, -1, -1]
    before = predecessors(lists, batch, catalogue)
    made = (each[30:].tolist() for each in (more.items, more.length, more.target))
    for items, length, target in zip(*made, strict=True):
        assert length >= 2
        assert items[length:] == [0] * (7 - length)
        path = [*items[:length], target]
        assert target in batch.target.tolist()
        assert all(one in before[other] for one, other in itertools.pairwise(path))


def test_no_walk_no_session():
    plugin, lists, _ = prepared(LOAM())
    repeated = {one for clicks in lists for one, other in itertools.pairwise(clicks) if one == other}
    alone = max(set(range(1, M + 1)) - repeated)  # no predecessor in a batch of its own
    batch = SessionBatch(torch.full((10, 1), alone), torch.ones(10).long(), torch.full((10,), alone), torch.arange(10))
    assert plugin.augment(batch, torch.Generator().manual_seed(0)).index.tolist() == [*range(10)]
    assert plugin.augment(a_batch(9), torch.Generator()).index.tolist() == [*range(9)]  # a tenth of nine is none


def test_tail_sessions_are_mixed_with_the_most_similar_other_one():
    plugin, _, catalogue = prepared(LOAM(own=0.7))
    batch = a_batch(20)
    walks = SessionBatch(batch.items[:4], batch.length[:4], batch.target[:4], torch.full((4,), -1))
    batch = SessionBatch(*(torch.cat([getattr(each, f) for each in (batch, walks)]) for f in vars(batch)))
    session, table = vectors(batch)
    terms = plugin.loss(session, batch, table, Scoring())
    expected = []
    for row in range(20):
        if catalogue.head[batch.target[row]]:
            continue
        partner = max((other for other in range(20) if other != row), key=lambda o: (session[o] @ session[row]).item())
        mixed = 0.7 * session[row] + 0.3 * session[partner]
        expected.append(F.cross_entropy(table[1:] @ mixed, batch.target[row] - 1))
    assert 0 < len(expected) < 20
    (loss,) = terms.values()
    wanted = torch.stack(expected).mean()
    torch.testing.assert_close(loss, wanted)
    for got, right in zip(*(torch.autograd.grad(x, (session, table)) for x in (loss, wanted)), strict=True):
        torch.testing.assert_close(got, right)


def test_a_batch_without_a_tail_target_has_no_mixture_and_a_gradient():
    plugin, _, catalogue = prepared(LOAM())
    batch = a_batch(3)
    head = catalogue.head.nonzero()[:3, 0]
    batch = SessionBatch(batch.items, batch.length, head, batch.index)
    session, table = vectors(batch)
    loss = plugin.loss(session, batch, table, Scoring())["mixup"]
    assert loss == 0
    assert (torch.autograd.grad(loss, session)[0] == 0).all()


def test_tailnet_asks_as_a_loop_over_sessions_does_and_shares_probabilities():
    plugin, _, catalogue = prepared(TailNet(DIM))
    batch = a_batch()
    session, table = vectors(batch)
    scores = session @ table[1:].T
    asks = plugin.asks_for_head(session, batch.items, table)[:, 0]
    got = plugin.rescore(scores, session, batch.items, batch.length, table)
    literal, *_ = prepared(TailNet(DIM, "scores"))
    literal.load_state_dict(plugin.state_dict())
    as_published = literal.rescore(scores, session, batch.items, batch.length, table)
    for row in range(len(batch)):
        total = torch.zeros(DIM)
        for item in batch.items[row, : batch.length[row]]:
            state = table[item] + float(catalogue.head[item])
            weight = plugin.weight(torch.tanh(plugin.key(state) + plugin.query(session[row])))
            total = total + weight * state
        to_head = torch.sigmoid(plugin.preference(torch.cat([total, session[row]])))
        torch.testing.assert_close(torch.sigmoid(asks[row]), to_head[0])
        factor = torch.where(catalogue.head[1:], to_head, 1 - to_head)
        shared = scores[row].softmax(0) * factor
        torch.testing.assert_close(got[row].softmax(0), shared / shared.sum())
        torch.testing.assert_close(as_published[row], scores[row] * factor)
    F.cross_entropy(got, batch.target - 1).backward()
    assert all(each.grad.abs().sum() > 0 for each in plugin.parameters())
    assert plugin.trains


@pytest.mark.parametrize("candidates", [8, 1000])
def test_lapsr_scores_as_a_loop_over_sessions_and_items_does(candidates):
    plugin, _, catalogue = prepared(LAPSR(0.4, 0.2, candidates))
    batch = a_batch()
    session, table = (each.detach() for each in vectors(batch))
    scores = session @ table[1:].T
    got = plugin.rescore(scores, session, batch.items, batch.length, table)
    cosine = lambda one, other: float(F.cosine_similarity(table[one], table[other], 0))  # noqa: E731
    for row in range(len(batch)):
        z = (scores[row] - scores[row].mean()) / scores[row].std()
        clicked = batch.items[row, : batch.length[row]].tolist()
        pairs = [cosine(a, b) for i, a in enumerate(clicked) for b in clicked[:i]]
        diversity = 1 - sum(pairs) / len(pairs) if pairs else 0
        best = (scores[row].argsort(descending=True) + 1)[:candidates].tolist()
        expected = {
            item: float(z[item - 1])
            + 0.4 * diversity * (not catalogue.head[item])
            + 0.2 * sum(cosine(item, other) for other in clicked) / len(clicked)
            for item in best
        }
        torch.testing.assert_close(got[row][[item - 1 for item in best]], torch.tensor([*expected.values()]))
        others = [item - 1 for item in range(1, M + 1) if item not in best]
        assert not others or got[row][others].max() < min(expected.values())
    assert not plugin.trains
    assert not [*plugin.parameters()]


@pytest.mark.parametrize("plugin", [TailNet(DIM), LAPSR(0.4, 0.2, 8)])
def test_more_padding_changes_no_score(plugin):
    plugin, *_ = prepared(plugin)
    batch = a_batch()
    session, table = vectors(batch)
    scores = session @ table[1:].T
    wider = F.pad(batch.items, (0, 3))
    one, other = (plugin.rescore(scores, session, items, batch.length, table) for items in (batch.items, wider))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LOAM(alpha=1.5), "plugin.alpha: expected a number in [0, 1], got 1.5"),
        (lambda: LOAM(walks=0), "plugin.walks: expected an integer of at least 1, got 0"),
        (lambda: TailNet(0), "plugin.dim: expected an integer of at least 1, got 0"),
        (lambda: TailNet(4, "all"), "plugin.multiply: expected one of probabilities, scores, got 'all'"),
        (lambda: LAPSR(-1), "plugin.tail_weight: expected a number of at least 0, got -1"),
    ],
)
def test_settings_that_make_no_sense_are_named(make, message):
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == message
