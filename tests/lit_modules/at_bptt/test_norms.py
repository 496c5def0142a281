"""Norms with written-out second derivatives against PyTorch's own."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from lit_modules.at_bptt.norms import GroupNorm, twice_differentiable


def norms(groups, channels=6):
    """PyTorch's layer and ours, with the same random weights, in float64."""
    plain = nn.GroupNorm(groups, channels).double()
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    return plain, twice_differentiable(copy.deepcopy(plain))


def derivatives(function, inputs):
    """Values, first derivatives, and second ones of a random combination of the first."""
    generator = torch.Generator().manual_seed(1)
    value = function(*inputs)
    factor = torch.randn(value.shape, generator=generator).double()
    first = torch.autograd.grad((value**3 * factor).sum(), inputs, create_graph=True)
    mixed = sum((part * torch.randn(part.shape, generator=generator).double()).sum() for part in first)
    return [value, *first, *torch.autograd.grad(mixed, inputs)]


def assert_same(got, expected):
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [(3, 6, 4, 5), (2, 6, 7), (5, 6, 2, 2, 3)])
def test_values_and_two_derivatives_are_those_of_pytorch(groups, shape):
    plain, ours = norms(groups)
    x = 2 + 3 * torch.randn(shape).double().requires_grad_()
    results = []
    for norm in (plain, ours):
        inputs = [x.detach().requires_grad_(), norm.weight, norm.bias]
        results.append(derivatives(lambda x, *_, norm=norm: norm(x), inputs))
    assert isinstance(ours, GroupNorm)
    assert_same(*results[::-1])


def test_they_are_so_for_many_networks_at_once():
    plain, ours = norms(3)
    inputs = [torch.randn(4, *shape).double().requires_grad_() for shape in ((3, 6, 4, 4), (6,), (6,))]
    results = []
    for norm in (plain, ours):

        def one(x, weight, bias, norm=norm):
            return functional_call(norm, {"weight": weight, "bias": bias}, (x,))

        results.append(derivatives(vmap(one), inputs))
    assert_same(*results[::-1])


def test_only_affine_group_norms_change():
    class Own(nn.GroupNorm):
        pass

    network = nn.Sequential(nn.GroupNorm(2, 4), nn.GroupNorm(2, 4, affine=False), Own(2, 4), nn.BatchNorm1d(4))
    kinds = [type(module) for module in twice_differentiable(network)]
    assert kinds == [GroupNorm, nn.GroupNorm, Own, nn.BatchNorm1d]


def test_a_third_derivative_is_refused():
    norm, x = norms(2)[1], torch.randn(2, 6, 3, 3).double().requires_grad_()
    (first,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()
