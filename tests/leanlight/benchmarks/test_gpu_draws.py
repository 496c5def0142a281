"""On another device the draws of the CPU: shown with `meta`, whose tensors hold no values, and with seeds."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leanlight.benchmarks.gpu import draws
from leanlight.benchmarks.gpu.draws import draws_of_the_cpu

GENERATOR = torch.Generator().manual_seed(3)
CALLS = {
    "rand": lambda like: torch.rand(3, 2, device=like.device),
    "rand_like": lambda like: torch.rand_like(like),
    "randn": lambda like: torch.randn((4,), device=like.device),
    "randint": lambda like: torch.randint(5, (7,), device=like.device),
    "randperm": lambda like: torch.randperm(9, device=like.device),
    "bernoulli": lambda like: torch.bernoulli(torch.full_like(like, 0.5)),
    "uniform_": lambda like: torch.empty_like(like).uniform_(-1, 1),
    "normal_": lambda like: nn.init.normal_(torch.empty_like(like)),
    "dropout": lambda like: F.dropout(like, 0.5),
    "dropout2d": lambda like: nn.Dropout2d(0.5)(like[None]),
}


@pytest.fixture(autouse=True)
def ones_for_tensors_without_values(monkeypatch):
    here = draws._Twins.here

    def with_values(self, value):
        no_values = isinstance(value, torch.Tensor) and value.device.type == "meta"
        return torch.ones(value.shape) if no_values else here(self, value)

    monkeypatch.setattr(draws._Twins, "here", with_values)


def after(call, device):
    """A number that the CPU's generator gives after a call on a device: it tells what the call has consumed."""
    torch.manual_seed(0)
    call(torch.ones(3, 4, 5, device=device))
    return torch.rand(()).item()


def test_a_draw_on_another_device_takes_as_many_numbers_from_the_cpu():
    for name, call in CALLS.items():
        expected = after(call, "cpu")
        assert expected != after(lambda like: None, "cpu"), name
        assert after(call, "meta") != expected, name  # without, another device leaves the CPU's generator alone
        with draws_of_the_cpu():
            assert after(call, "meta") == expected, name


def test_it_changes_nothing_on_the_cpu_and_leaves_nothing_behind():
    before = [torch.rand, F.dropout, torch.Tensor.normal_]
    for name, call in CALLS.items():
        torch.manual_seed(0)
        expected = call(torch.ones(3, 4, 5))
        with draws_of_the_cpu():
            torch.manual_seed(0)
            assert torch.equal(call(torch.ones(3, 4, 5)), expected), name
    assert [torch.rand, F.dropout, torch.Tensor.normal_] == before
    assert "normal_" not in vars(torch.Tensor)


def test_what_is_drawn_lies_on_the_device_asked_for():
    with draws_of_the_cpu():
        for name, call in CALLS.items():
            assert call(torch.ones(3, 4, 5, device="meta")).device.type == "meta", name


class _Elsewhere(torch.Generator):
    """A generator that says it lives on another device."""

    device = torch.device("meta")


def test_a_generator_elsewhere_is_one_here_with_its_seed():
    twins = draws._Twins()
    far = _Elsewhere()
    far.manual_seed(7)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(7))
    first = torch.rand(2, generator=twins.here(far))
    assert torch.equal(torch.cat([first, torch.rand(2, generator=twins.here(far))]), expected)
    far.manual_seed(8)
    assert torch.equal(
        torch.rand(4, generator=twins.here(far)), torch.rand(4, generator=torch.Generator().manual_seed(8))
    )
    assert twins.here(GENERATOR) is GENERATOR
