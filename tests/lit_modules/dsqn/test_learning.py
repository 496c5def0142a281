"""Targets and losses item by item."""

import pytest
import torch
from torch import nn

from lit_modules.dsqn.learning import chosen, convergent_loss, next_values, td_loss, td_target, update_target


def test_targets_item_by_item():
    torch.manual_seed(0)
    reward, discount = torch.randn(20), torch.rand(20)
    terminal, target, online = torch.rand(20) < 0.5, torch.randn(20, 4), torch.randn(20, 4)
    plain = td_target(reward, discount, terminal, next_values(target))
    double = td_target(reward, discount, terminal, next_values(target, online))
    for i in range(20):
        future = 0.0 if terminal[i] else float(discount[i]) * max(target[i].tolist())
        assert float(plain[i]) == pytest.approx(float(reward[i]) + future, abs=1e-6)
        best = online[i].tolist().index(max(online[i].tolist()))
        future = 0.0 if terminal[i] else float(discount[i]) * float(target[i, best])
        assert float(double[i]) == pytest.approx(float(reward[i]) + future, abs=1e-6)


def test_the_value_of_the_action_taken():
    values = torch.arange(12.0).view(3, 4)
    assert chosen(values, torch.tensor([0, 3, 1])).tolist() == [0.0, 7.0, 9.0]


def test_huber_is_quadratic_inside_and_linear_outside():
    error = torch.tensor([0.0, 0.5, -1.0, 3.0])
    assert td_loss(error, torch.zeros(4)).tolist() == pytest.approx([0.0, 0.125, 0.5, 2.5])
    assert td_loss(error, torch.zeros(4), "mse").tolist() == pytest.approx([0.0, 0.25, 1.0, 9.0])


def test_the_convergent_loss_is_the_larger_and_gradient_reaches_the_residual_target():
    value, residual = torch.zeros(2, requires_grad=True), torch.tensor([0.1, 2.0], requires_grad=True)
    loss = convergent_loss(value, torch.ones(2), residual, "mse")
    assert loss.tolist() == pytest.approx([1.0, 4.0])
    loss.sum().backward()
    assert residual.grad.tolist() == pytest.approx([0.0, 4.0])


def test_the_target_network_follows():
    online, target = nn.Linear(3, 2), nn.Linear(3, 2)
    before = target.weight.clone()
    update_target(target, online, 0.25)
    torch.testing.assert_close(target.weight, 0.75 * before + 0.25 * online.weight)
    update_target(target, online)
    assert torch.equal(target.weight, online.weight)
    assert torch.equal(target.bias, online.bias)
