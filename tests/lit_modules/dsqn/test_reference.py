"""The forms of a DSQN that others compute give its values and gradients."""

import pytest
import torch

from lit_modules.dsqn import DSQN
from lit_modules.dsqn.reference import Published, StepByStep


@pytest.mark.parametrize("form", [Published, StepByStep])
def test_values_and_gradients_are_those_of_the_network(form):
    torch.manual_seed(0)
    layers = {"history": 2, "frame_size": 12, "convolutions": [[6, 4, 2], [8, 3, 1]], "hidden": 16}
    network = DSQN(3, **layers, time_steps=9, init_gain=8.0).double()
    reference = form(network)
    state = torch.rand(5, 2, 12, 12, dtype=torch.float64)
    weight = torch.randn(5, 3, dtype=torch.float64)
    values, expected = network(state), reference(state)
    assert expected.std(0).min() > 0
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad((values * weight).sum(), list(network.parameters())),
        torch.autograd.grad((expected * weight).sum(), list(reference.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(reference(state), expected)  # a call leaves no state behind
