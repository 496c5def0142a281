"""CMI's term against a double loop, and the ring of features that it looks back at."""

import copy
import math

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.dda.contrastive import Contrastive, ContrastiveMemory, contrastive_loss


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("current", [3, 7])
def test_the_loss_is_that_of_a_double_loop(current):
    local, whole = (torch.randn(7, 5, generator=seeded(seed), dtype=torch.double) for seed in (0, 1))
    losses = []
    for i in range(7):
        similarity = [
            sum(float(a) * float(b) for a, b in zip(local[i], whole[j], strict=True))
            / math.sqrt(sum(float(a) ** 2 for a in local[i]) * sum(float(b) ** 2 for b in whole[j]))
            for j in range(7)
        ]
        total = sum(math.exp(s / 0.2) for s in similarity)
        losses.append(-math.log(math.exp(similarity[i] / 0.2) / total))
    expected = sum(losses[:current]) / current
    if current < 7:
        expected += sum(losses[current:]) / (7 - current)
    assert float(contrastive_loss(local, whole, current, 0.2)) == pytest.approx(expected, rel=1e-12)


def test_gradients_pass_through_local_views_alone():
    local, whole = (torch.randn(4, 3, generator=seeded(seed), requires_grad=True) for seed in (0, 1))
    contrastive_loss(local, whole, 4, 0.2).backward()
    assert local.grad.abs().min() > 0
    assert whole.grad is None


def memory(seed=0, **settings):
    return ContrastiveMemory(Contrastive(**{"rows": 5, "width": 4, **settings}), [2, 3, 1], 1e-2, seed)


def test_the_ring_keeps_the_newest_rows():
    kept = memory(layers=[0])
    rows = torch.arange(14.0).view(7, 2)
    kept.remember(rows[:3], rows[:3] + 100)
    assert len(kept) == 3
    kept.remember(rows[3:], rows[3:] + 100)
    assert len(kept) == 5
    held = {tuple(row) for row in kept._ring.tolist()}
    assert held == {(*row, *(value + 100 for value in row)) for row in rows[2:].tolist()}


def test_features_are_those_of_the_chosen_layers():
    means = [torch.full((2, channels), float(channels)) for channels in (2, 3, 1)]
    assert memory().features(means).tolist() == [[2, 2, 3, 3, 3, 1]] * 2
    assert memory(layers=[2, 0]).features(means).tolist() == [[1, 2, 2]] * 2


def test_earlier_images_are_drawn_by_the_generator_and_no_more_than_asked_for():
    kept = memory(rows=50, sampled=8)
    kept.remember(*torch.randn(2, 30, 6, generator=seeded(3)))
    local, whole = torch.randn(2, 4, 6, generator=seeded(4))
    first, again, other = (kept.loss(local, whole, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    rows = torch.randperm(30, generator=seeded(0))[:8]
    views = [torch.cat([x, part[rows]]) for x, part in zip((local, whole), kept._ring.chunk(2, 1), strict=True)]
    expected = contrastive_loss(kept.head(views[0]), kept.head(views[1]), 4, 0.2)
    torch.testing.assert_close(first, expected)


def test_the_state_brings_back_ring_projection_and_optimiser():
    def advance(one):
        local, whole = torch.randn(2, 4, 6, generator=seeded(len(one)))
        one.optimizer.zero_grad()
        one.loss(local, whole, seeded(9)).backward()
        one.optimizer.step()
        one.remember(local, whole)

    first = memory()
    advance(first)
    other = memory(seed=7)
    assert not torch.equal(other.head[0].weight, first.head[0].weight)
    other.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(3):
        advance(first)
        advance(other)
    assert torch.equal(first._ring, other._ring)
    assert torch.equal(first.head[2].weight, other.head[2].weight)


def test_a_projection_is_a_function_of_its_seed_and_draws_nothing_from_the_process():
    before = torch.get_rng_state()
    assert torch.equal(memory(3).head[0].weight, memory(3).head[0].weight)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": 0}, "contrastive.rows: expected an integer of at least 1, got 0"),
        ({"temperature": 0.0}, "contrastive.temperature: expected a positive number, got 0.0"),
        (
            {"layers": [0, 3]},
            r"contrastive.layers: expected positions of the 3 batch norms .* got \[0, 3\]",
        ),
        ({"layers": []}, r"contrastive.layers: .* got \[\]"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        memory(**settings)
