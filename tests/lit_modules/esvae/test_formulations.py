"""Three formulations of one training step give the same losses, gradients and running statistics."""

import pytest
import torch
import torch.nn.functional as F

from lit_modules.esvae.networks import ESVAE, to_signed
from lit_modules.esvae.reference import Folded, TimeLast


def step(losses):
    torch.manual_seed(1)
    reconstruction, divergence = losses()
    (reconstruction + 0.1 * divergence).backward()
    return reconstruction.item(), divergence.item()


@pytest.mark.parametrize("reference", [TimeLast, Folded])
@pytest.mark.parametrize("surrogate", ["rect", "rect_zero"])
def test_losses_gradients_and_statistics_are_the_same(reference, surrogate):
    torch.manual_seed(0)
    network = ESVAE(2, 16, (8, 16), 6, 5, surrogate_gradient=surrogate).double()
    other = reference(network)
    image = torch.rand(7, 2, 16, 16, dtype=torch.float64)

    def ours():
        code = network.encode(to_signed(image))
        return F.mse_loss(network.decode(code.z), to_signed(image)), code.divergence

    assert step(ours) == pytest.approx(step(lambda: other.losses(image)), rel=1e-12)
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    largest = max(float(parameter.grad.abs().max()) for parameter in network.parameters())
    assert gradients.keys() == {name for name, _ in network.named_parameters()}
    for name, parameter in network.named_parameters():
        expected = gradients[name].view_as(parameter)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-10 * largest)
    statistics = dict(other.named_buffers())
    for name, value in network.named_buffers():
        if "running" in name:
            torch.testing.assert_close(value, statistics[name], rtol=1e-12, atol=1e-12)
