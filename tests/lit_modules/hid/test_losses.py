"""ICLoss equals its formula, summed up in float64 by loops."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from leanlight.contracts import UserError
from leanlight.contracts.sessions import SessionBatch
from lit_modules.hid.intents import Intents
from lit_modules.hid.losses import ICLoss

NUM_ITEMS, NUM_INTENTS, DIM = 30, 6, 7


def pairs(several=False):
    """Intents of items 1 to 30: one each, or up to three; item 30 has none."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for item in range(1, NUM_ITEMS):
        count = 1 + item % 3 if several else 1
        found += [(item, intent) for intent in torch.randperm(NUM_INTENTS, generator=generator)[:count].tolist()]
    return found


def made(found):
    item, intent = torch.tensor(found).T
    return Intents(item, intent, NUM_INTENTS, NUM_ITEMS)


def a_batch(count=9, seed=0, target=None):
    generator = torch.Generator().manual_seed(seed)
    length = torch.randint(1, 6, (count,), generator=generator)
    items = torch.randint(1, NUM_ITEMS + 1, (count, 5), generator=generator)
    items[torch.arange(5) >= length[:, None]] = 0
    target = torch.randint(1, NUM_ITEMS + 1, (count,), generator=generator) if target is None else target
    session = torch.randn(count, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(NUM_ITEMS + 1, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
    return session, SessionBatch(items, length, target, torch.arange(count)), table


def cosine(one, other):
    return (one @ other) / (one.norm() * other.norm())


def variance(values):
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / len(values)


def centroid(table, found, intent):
    return torch.stack([table[item] for item, its in found if its == intent]).mean(0)


def paper(session, batch, table, found, sigma, lam, eta, inside=True, constraint="both"):
    """Eq. 14, one session after the other."""
    of = [{intent for item, intent in found if item == target} for target in batch.target.tolist()]
    centroids = {intent: centroid(table, found, intent) for intent in set().union(*of)}
    terms = []
    for s, own in zip(session, of, strict=True):
        noise = [cosine(s, centroids[v]) for v in sorted(set().union(*of) - own)]
        if not own or (not noise and constraint != "longtail"):
            continue
        positive = sum(cosine(s, centroids[c]) for c in own) / len(own)
        if constraint == "longtail":
            terms.append(-positive / sigma)
            continue
        excess = (variance(noise) - eta).clamp(min=0)
        inner = sum((cos / sigma).exp() for cos in noise)
        if constraint == "accuracy":
            terms.append((1 + lam * excess / (1 + excess)).log() + inner.log())
            continue
        inner = inner + (positive / sigma).exp() if inside else inner
        terms.append(-((positive / sigma).exp() / ((1 + lam * excess / (1 + excess)) * inner)).log())
    return sum(terms) / len(terms)


def released(session, batch, table, found, sigma, lam, eta, inside=True):
    """The authors' code of 2026, one anchor after the other."""
    of = [{intent for item, intent in found if item == target} for target in batch.target.tolist()]
    rows = [row for row in range(len(session)) if of[row]]
    unit = lambda vector: vector / vector.norm()  # noqa: E731
    own = [unit(sum(unit(centroid(table, found, c)) for c in sorted(of[row]))) for row in rows]
    anchors = [unit(session[row]) for row in rows] + own
    kinds = [of[row] for row in rows] * 2
    half = len(rows)
    spread = torch.stack([variance([a @ b for b in anchors]) for a in anchors])
    scaled = (spread - spread.min()) / (spread.max() - spread.min() + 1e-7)
    terms = []
    for i, a in enumerate(anchors):
        if not inside and all(kinds[i] & kind for kind in kinds):
            continue  # the logarithm of nothing
        positive = ((a @ anchors[(i + half) % (2 * half)]) / sigma).exp()
        inner = positive if inside else 0
        for j, b in enumerate(anchors):
            if not kinds[i] & kinds[j]:
                inner = inner + ((a @ b) / sigma).exp()
        terms.append(-(positive / (inner * (1 + lam * (scaled[i] - eta).clamp(min=0)))).log())
    return sum(terms) / len(terms)


def check(loss, expected, session, table):
    """Value and both gradients."""
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    ours = torch.autograd.grad(loss, (session, table), allow_unused=True)
    theirs = torch.autograd.grad(expected, (session, table), allow_unused=True)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(("form", "formula"), [("paper", paper), ("released", released)])
def test_both_forms_are_their_formulas_with_their_gradients(form, formula, inside, several):
    found = pairs(several)
    target = torch.tensor([1, 2, 5, 5, 7, NUM_ITEMS, 11, 12, 13])  # the items of one target have no intent
    session, batch, table = a_batch(target=target)
    numbers = {"sigma": 0.3, "penalty": 2.0, "threshold": 0.02}
    loss = ICLoss(form, **numbers, positive_in_denominator=inside)(session, batch, table, made(found))
    check(loss, formula(session, batch, table, found, *numbers.values(), inside), session, table)


@pytest.mark.parametrize("constraint", ["longtail", "accuracy"])
def test_a_single_constraint_has_its_own_summands_alone(constraint):
    found, (session, batch, table) = pairs(), a_batch(seed=1)
    loss = ICLoss(constraint=constraint)(session, batch, table, made(found))
    check(loss, paper(session, batch, table, found, 0.5, 1.0, 0.01, constraint=constraint), session, table)


def test_each_form_has_defaults_of_its_own():
    found, (session, batch, table) = pairs(), a_batch(seed=2)
    check(
        ICLoss()(session, batch, table, made(found)), paper(session, batch, table, found, 0.5, 1, 0.01), session, table
    )
    loss = ICLoss("released")(session, batch, table, made(found))
    check(loss, released(session, batch, table, found, 0.14, 0.3, 0.2), session, table)


@pytest.mark.parametrize(("form", "formula"), [("paper", paper), ("released", released)])
def test_against_last_items_a_session_has_the_mean_of_its_last_three_clicks_as_its_intent(form, formula):
    session, batch, table = a_batch(seed=4)
    loss = ICLoss(form, 0.3, 1.0, 0.01, against="last_items")(session, batch, table, None)
    # The same formula over a catalogue of these means, item i being that of session i.
    own = [table[items[max(0, n - 3) : n]].mean(0) for items, n in zip(batch.items, batch.length.tolist(), strict=True)]
    means = torch.cat([torch.zeros(1, DIM), torch.stack(own)])
    numbered = SessionBatch(batch.items, batch.length, torch.arange(1, len(batch) + 1), batch.index)
    found = [(number, number) for number in range(1, len(batch) + 1)]
    check(loss, formula(session, numbered, means, found, 0.3, 1.0, 0.01), session, table)


def test_three_intents_give_the_closed_form():
    table = torch.zeros(4, 3)
    table[1:] = torch.eye(3)
    intents = Intents(torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2]), 3, 3)
    batch = SessionBatch(torch.ones(3, 1).long(), torch.ones(3).long(), torch.tensor([1, 2, 3]), torch.arange(3))
    loss = ICLoss(sigma=0.5, penalty=1.0, threshold=0.0)(5 * torch.eye(3), batch, table, intents)
    assert loss.item() == pytest.approx(math.log(1 + 2 * math.exp(-2)))


def test_the_loss_falls_as_a_session_goes_to_the_centroid_of_its_intent():
    found, (session, batch, table) = pairs(), a_batch(seed=5, target=torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    intents = made(found)
    own = F.normalize(intents.centroids(table)[intents.ids(batch.target)[:, 0]], dim=1)
    for form in ("paper", "released"):
        loss = ICLoss(form, penalty=0.0)  # which of its variances is small or great, a penalty sees and this does not
        steps = [loss(F.normalize(session, dim=1) + t * own, batch, table, intents).item() for t in range(4)]
        assert steps == sorted(steps, reverse=True)
        assert steps[0] > steps[-1] + 0.1


def test_the_penalty_is_nothing_below_its_threshold_and_grows_above_it():
    found, (session, batch, table) = pairs(), a_batch(seed=6)
    of = lambda **options: ICLoss(**options)(session, batch, table, made(found)).item()  # noqa: E731
    assert of(penalty=5.0, threshold=1.0) == of(penalty=0.0, threshold=1.0)
    assert of(penalty=5.0, threshold=0.0) > of(penalty=1.0, threshold=0.0) > of(penalty=0.0, threshold=0.0)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_gradients_reach_the_items_of_the_intents_in_the_batch_alone(form):
    found = pairs()
    held = {intent: [item for item, its in found if its == intent] for intent in range(NUM_INTENTS)}
    target = torch.tensor([held[1][0], held[4][0], held[1][-1]])
    session, batch, table = a_batch(3, target=target)
    ICLoss(form)(session, batch, table, made(found)).backward()
    assert table.grad.abs().sum(1).nonzero()[:, 0].tolist() == sorted(held[1] + held[4])
    frozen = ICLoss(form, detach_intents=True)(session, batch, table, made(found))
    assert torch.autograd.grad(frozen, (session, table), allow_unused=True)[1] is None


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("constraint", ["both", "accuracy", "longtail"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("target", [[1, 1, 1], [NUM_ITEMS] * 3, [1]])
def test_a_batch_with_one_intent_or_none_has_finite_loss_and_gradients(form, inside, constraint, target):
    session, batch, table = a_batch(len(target), target=torch.tensor(target))
    loss = ICLoss(form, positive_in_denominator=inside, constraint=constraint)(session, batch, table, made(pairs()))
    with torch.autograd.detect_anomaly(check_nan=True):  # a NaN on the way is one too, though a mask may hide it
        gradients = torch.autograd.grad(loss, (session, table))
    assert loss.isfinite()
    assert all(each.isfinite().all() for each in gradients)
    if (form, constraint) == ("paper", "both") or target[0] == NUM_ITEMS:
        assert loss == 0
        assert all((each == 0).all() for each in gradients)


def test_the_loss_stays_in_float32_under_autocast():
    found, (session, batch, table) = pairs(), a_batch(seed=7)
    session, table = (session.detach().float(), table.detach().float())
    plain = ICLoss(sigma=0.01)(session, batch, table, made(found))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ICLoss(sigma=0.01)(session, batch, table, made(found))
    assert mixed.dtype == torch.float32
    assert mixed == plain
    assert plain.isfinite()


@pytest.mark.parametrize("against", ["intents", "last_items"])
@pytest.mark.parametrize("form", ["paper", "released"])
def test_no_shape_depends_on_the_numbers(form, against):
    found, (session, batch, table) = pairs(several=True), a_batch(seed=8)
    intents = made(found)
    loss = ICLoss(form, against=against)
    with FakeTensorMode(allow_non_fake_inputs=True):  # there are no numbers in there: whatever asks for one raises
        assert loss(session, batch, table, intents).shape == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "printed"}, "icloss.form: expected one of paper, released, got 'printed'"),
        ({"sigma": 0.0}, "icloss.sigma: expected a positive number, got 0.0"),
        ({"penalty": -1.0}, "icloss.penalty: expected a number of at least 0, got -1.0"),
        ({"constraint": "none"}, "icloss.constraint: expected one of both, longtail, accuracy, got 'none'"),
        ({"against": "all"}, "icloss.against: expected one of intents, last_items, got 'all'"),
    ],
)
def test_settings_that_make_no_sense_are_named(options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        ICLoss(**options)


def test_intents_are_asked_for_where_they_are_missing():
    session, batch, table = a_batch()
    with pytest.raises(UserError, match=r"^intents: expected the items' intents"):
        ICLoss()(session, batch, table, None)
