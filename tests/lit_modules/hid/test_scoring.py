"""Scores and their loss against float64 by hand, pieces against the whole, the best against a sort in Python."""

import math

import pytest
import torch
import torch.nn.functional as F

from leanlight.contracts import UserError
from lit_modules.hid.scoring import Scoring, top_k


def sides(n=6, m=23, d=5, dtype=torch.double, seed=0):
    generator = torch.Generator().manual_seed(seed)
    session = torch.randn(n, d, generator=generator, dtype=dtype)
    table = torch.randn(m + 1, d, generator=generator, dtype=dtype)
    table[0] = 0
    return session, table, torch.randint(1, m + 1, (n,), generator=generator)


def by_hand(kind, session, table):
    """Scores as nested lists."""
    rows = []
    for s in session.tolist():
        row = []
        for v in table.tolist()[1:]:
            score = sum(a * b for a, b in zip(s, v, strict=True))
            if kind == "cosine":
                score *= 13 / math.sqrt(sum(a * a for a in s) * sum(b * b for b in v))
            row.append(score)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.double)


@pytest.mark.parametrize("kind", ["dot", "cosine"])
def test_scores_are_those_of_a_double_loop_and_leave_padding_out(kind):
    session, table, _ = sides()
    scores = Scoring(kind)(session, table)
    assert scores.shape == (6, 23)
    torch.testing.assert_close(scores, by_hand(kind, session, table), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["dot", "cosine"])
@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
def test_the_loss_in_pieces_is_that_of_the_whole_and_so_are_its_gradients(kind, chunk):
    session, table, target = sides()
    expected = -by_hand(kind, session, table).log_softmax(1)[torch.arange(6), target - 1].mean()
    gradients = []
    for pieces in (None, chunk):
        here = [session.clone().requires_grad_(), table.clone().requires_grad_()]
        loss = Scoring(kind, chunk=pieces).loss(*here, target)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        (3 * loss).backward()
        gradients.append([side.grad for side in here])
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)
    assert not gradients[1][1][0].any(), "padding learns"


def test_gradients_in_pieces_are_those_of_finite_differences():
    session, table, target = sides(n=3, m=7, d=2)
    inputs = session.requires_grad_(), table.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, t: Scoring(chunk=3).loss(s, t, target), inputs)


def test_pieces_hold_no_scores_of_all_items():
    session, table, target = sides()
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        Scoring(chunk=4).loss(session.requires_grad_(), table.requires_grad_(), target)
    assert max(kept) < 6 * 23 <= table.numel() + session.numel()
    assert max(kept) <= table.numel()


@pytest.mark.parametrize("kind", ["dot", "cosine"])
def test_half_precision_in_pieces_is_near_that_of_the_whole(kind):
    session, table, target = sides(m=300, dtype=torch.float32)
    gradients = []
    for pieces in (None, 64):
        here = [session.clone().requires_grad_(), table.clone().requires_grad_()]
        with torch.autocast("cpu", torch.bfloat16):
            loss = Scoring(kind, chunk=pieces).loss(*here, target)
        assert loss.dtype == torch.float32
        loss.backward()
        gradients.append([loss.detach(), *(side.grad for side in here)])
    for whole, piece in zip(*gradients, strict=True):
        assert piece.dtype == torch.float32
        assert (whole - piece).abs().max() <= 0.02 * whole.abs().max()


def test_scores_far_apart_stay_finite():
    session, table, target = sides(dtype=torch.float32)
    whole, piece = (Scoring(chunk=chunk).loss(1e4 * session, table, target) for chunk in (None, 5))
    assert whole.isfinite()
    torch.testing.assert_close(piece, whole)


@pytest.mark.parametrize("values", [2, 5, 1000])
@pytest.mark.parametrize("k", [1, 4, 20])
def test_the_best_come_first_and_ties_go_to_the_smaller_number(values, k):
    generator = torch.Generator().manual_seed(values + k)
    scores = torch.randint(values, (40, 20), generator=generator) / 7
    scores[0] = -torch.inf
    scores[1, ::2] = -0.0
    items, found = top_k(scores, k)
    for row, got, score in zip(scores.tolist(), items.tolist(), found.tolist(), strict=True):
        expected = sorted(range(1, 21), key=lambda item: (-row[item - 1], item))[:k]
        assert got == expected
        assert score == [row[item - 1] for item in expected]


def test_bad_values_are_one_line():
    with pytest.raises(UserError, match="k: expected from 1 to 3, the items of the catalogue, got 4"):
        top_k(torch.zeros(2, 3), 4)
    for values, name in (({"kind": "l2"}, "kind"), ({"scale": 0}, "scale"), ({"chunk": 0}, "chunk")):
        with pytest.raises(UserError, match=f"scoring.{name}: expected"):
            Scoring(**values)


def test_the_session_is_left_as_it_is():
    session, table, target = sides()
    before = session.clone(), table.clone()
    scoring = Scoring("cosine", chunk=3)
    scoring(session, table)
    scoring.loss(session, table, target)
    assert torch.equal(session, before[0])
    assert torch.equal(table, before[1])
    assert not torch.equal(F.normalize(session), session)
