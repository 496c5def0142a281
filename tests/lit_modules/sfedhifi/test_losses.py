"""Losses: against their formulas, one number at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from waits import waits

from lit_modules.sfedhifi.decomposition import DecomConv, basis_keys
from lit_modules.sfedhifi.losses import mask_absent, mean_output_loss, orthogonality, tet_loss
from lit_modules.sfedhifi.networks import FactorisedSpikingResNet18


def cross_entropy(row, label):
    return math.log(sum(math.exp(value) for value in row)) - row[label]


def test_tet_loss_is_its_formula():
    torch.manual_seed(0)
    outputs, label = torch.randn(4, 3, 5, dtype=torch.float64), torch.tensor([4, 0, 2])
    rows = [(outputs[t, n].tolist(), int(label[n])) for t in range(4) for n in range(3)]
    steps = sum(cross_entropy(row, k) for row, k in rows) / 12
    level = sum((value - 0.8) ** 2 for row, _ in rows for value in row) / 60
    torch.testing.assert_close(tet_loss(outputs, label, weight=0.1, target=0.8).item(), 0.9 * steps + 0.1 * level)
    mean = [[sum(outputs[t, n, k].item() for t in range(4)) / 4 for k in range(5)] for n in range(3)]
    expected = sum(cross_entropy(row, int(k)) for row, k in zip(mean, label, strict=True)) / 3
    assert mean_output_loss(outputs, label).item() == pytest.approx(expected)


@pytest.mark.parametrize(("classes", "floor"), [(10, 1.461), (100, 3.622)])
def test_binary_outputs_have_a_floor_far_above_zero(classes, floor):
    label = torch.arange(classes)
    best = torch.eye(classes).expand(3, classes, classes)
    assert tet_loss(best, label, weight=0.0).item() == pytest.approx(floor, abs=1e-3)
    assert tet_loss(best, label, weight=0.0).item() == pytest.approx(math.log(math.e + classes - 1) - 1)


def test_the_orthogonality_term_is_zero_at_the_start_and_pulls_a_perturbed_basis_back():
    torch.manual_seed(0)
    network = FactorisedSpikingResNet18(0.25)
    bases = [network.get_parameter(key) for key in basis_keys(network)]
    assert orthogonality(bases).item() < 1e-10
    basis = DecomConv(4, 4, 2, 8).basis
    disturbed = (basis + 0.1 * torch.randn_like(basis)).detach().requires_grad_()
    values = []
    for _ in range(300):
        loss = orthogonality([disturbed])
        values.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, disturbed)
        disturbed = (disturbed - 1.0 * gradient).detach().requires_grad_()
    assert values[0] > 1e-3
    assert values[-1] < 1e-4 * values[0]


def test_the_orthogonality_term_is_a_mean_over_entries_summed_over_bases():
    torch.manual_seed(0)
    bases = [torch.randn(3, 2, 3, 3, dtype=torch.float64), torch.randn(5, 4, 1, 1, dtype=torch.float64)]
    expected = 0.0
    for basis in bases:
        rows = basis.flatten(1).tolist()
        products = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]
        errors = [(products[i][j] - (i == j)) ** 2 for i in range(len(rows)) for j in range(len(rows))]
        expected += sum(errors) / len(errors)
    assert orthogonality(bases).item() == pytest.approx(expected)


def test_outputs_of_absent_classes_count_as_zero_and_get_no_gradient():
    logits, label = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 2, 0])
    loss = F.cross_entropy(mask_absent(logits, torch.tensor([True, False, True])), label)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[:, 1].abs().max() == 0
    rows = [[row[0], 0.0, row[2]] for row in logits.tolist()]
    assert loss.item() == pytest.approx(
        sum(cross_entropy(row, int(k)) for row, k in zip(rows, label, strict=True)) / 4, rel=1e-5
    )


def test_orthogonality_makes_nothing_on_another_device():
    assert waits(orthogonality, [torch.rand(2, 3, 3, 3), torch.rand(4, 2, 3, 3)]) == 0
