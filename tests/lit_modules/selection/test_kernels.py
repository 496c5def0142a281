"""Kernels against what they stand for, written out."""

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

from leanlight.contracts import UserError
from lit_modules.selection import Cosine, GradientCloseness, GradientCosine, NegSquaredDistance, error_of
from lit_modules.selection import kernels as module


def items(count=30, classes=4, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, classes, generator=generator)
    return logits, torch.randint(classes, (count,), generator=generator), torch.rand(count, width, generator=generator)


def gradients(logits, label, embedding, double_softmax=False):
    """(N, K (1 + D)) gradients of each item's loss in the last layer, by autograd; delta h^T must be what they are."""
    rows = []
    for z, y, h in zip(logits.double(), label, embedding.double(), strict=True):
        # A layer whose outputs are these logits: its weights are 0 and its bias is z.
        weight = torch.zeros(len(z), len(h), dtype=torch.float64, requires_grad=True)
        bias = z.clone().requires_grad_()
        out = weight @ h + bias
        loss = cross_entropy((out.softmax(0) if double_softmax else out)[None], y[None])
        parts = torch.autograd.grad(loss, (bias, weight))
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def all_rows(kernel):
    return kernel.rows(torch.arange(len(kernel))).double()


@pytest.mark.parametrize("double_softmax", [False, True])
def test_the_factorised_cosine_is_that_of_the_gradients(double_softmax):
    logits, label, embedding = items()
    explicit = gradients(logits, label, embedding, double_softmax)
    want = 0.5 + 0.5 * cosine_similarity(explicit[:, None], explicit[None], dim=2)
    error = error_of(logits, label, double_softmax)
    assert torch.allclose(error, explicit[:, : logits.shape[1]], atol=1e-12)
    assert torch.allclose(all_rows(GradientCosine(error, embedding)), want, atol=2**-24)


def test_the_closeness_of_gradients_falls_as_their_distance_rises():
    logits, label, embedding = items()
    kernel, explicit = GradientCloseness(error_of(logits, label), embedding), gradients(logits, label, embedding)
    total = all_rows(kernel) + torch.cdist(explicit, explicit)
    assert torch.allclose(total, total[0, 0].expand_as(total), atol=4 * kernel.grid)
    assert torch.allclose(total[0, 0], 2 * explicit.norm(dim=1).max(), atol=kernel.grid)


def test_cosines_and_distances_of_vectors():
    x = items()[2] - 0.5
    assert torch.allclose(all_rows(Cosine(x)), 0.5 + 0.5 * cosine_similarity(x[:, None], x[None], dim=2).double(), 1e-5)
    x = x.double() + 100
    kernel = NegSquaredDistance(x)
    assert torch.allclose(all_rows(kernel), -(x[:, None] - x[None]).square().sum(2), atol=kernel.grid)
    assert float(all_rows(kernel).min()) >= kernel.lowest


def every_kernel():
    logits, label, embedding = items()
    error = error_of(logits, label)
    return [
        Cosine(embedding),
        GradientCosine(error, embedding),
        NegSquaredDistance(embedding),
        GradientCloseness(error, embedding),
    ]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("table", [0, 1000])
def test_parts_rows_and_sums_of_a_kernel_agree(number, table, monkeypatch):
    monkeypatch.setattr(module, "TABLE_ITEMS", table)
    kernel = every_kernel()[number]
    whole, some = all_rows(kernel), torch.tensor([7, 3, 20, 11])
    assert torch.equal(whole, whole.T)
    part = kernel.take(some)
    assert torch.equal(all_rows(part), whole[some][:, some])
    assert torch.equal(all_rows(part.take(torch.tensor([2, 0]))), whole[[20, 7]][:, [20, 7]])
    for each, rows in ((kernel, whole), (part, whole[some][:, some])):
        assert torch.allclose(each.column_sums(), rows.sum(0), atol=len(rows) * kernel.grid)


@pytest.mark.parametrize("number", range(4))
def test_similarities_are_multiples_of_a_grid_so_that_sums_are_exact(number):
    kernel = every_kernel()[number]
    steps = all_rows(kernel) / kernel.grid
    assert torch.equal(steps, steps.round())
    assert float(steps.abs().max()) <= 2**24
    sums = kernel.column_sums() / kernel.grid
    assert torch.equal(sums, sums.round())


def test_vectors_of_length_0_and_almost_perfect_fits_give_numbers():
    error = error_of(torch.tensor([[80.0, 0.0], [0.0, 80.0], [0.0, 0.0], [1e4, 0.0]]), torch.tensor([0, 0, 0, 0]))
    rows = all_rows(GradientCosine(error, torch.zeros(4, 3)))
    assert rows[0, 1] == rows[0, 2] == 1.0  # an error of 1e-35 has a direction
    assert torch.equal(rows[3], torch.full((4,), 0.5).double())  # none has not
    assert torch.equal(all_rows(NegSquaredDistance(torch.ones(3, 2))), torch.zeros(3, 3).double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_refused(bad):
    x = torch.zeros(5, 2)
    x[1], x[3, 0] = bad, bad
    with pytest.raises(UserError, match="features: expected numbers, got NaN or infinity in 2 items"):
        Cosine(x)
    with pytest.raises(UserError, match="features: logits: expected numbers, got NaN or infinity in 2 items"):
        error_of(x, torch.zeros(5, dtype=torch.int64))
