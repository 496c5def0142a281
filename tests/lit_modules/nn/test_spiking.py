"""Spiking layers against hand-written recursions in float64 and against torch's own layers."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from leanlight.contracts import UserError
from lit_modules.nn import (
    LeakyReadout,
    SpikingConvNet,
    ThresholdBatchNorm,
    fold_time,
    lif,
    repeat_time,
    reset,
    unfold_time,
)

SURROGATES = {
    "rect": lambda u, threshold: float(abs(u - threshold) < 0.5),
    "rect_zero": lambda u, threshold: float(abs(u) < 0.5),
    "atan": lambda u, threshold: 1.0 / (1.0 + (np.pi * (u - threshold)) ** 2),  # alpha = 2
}


def by_hand(current, upstream, tau, threshold, surrogate, detach):
    """Spikes of one neuron and the gradient of sum(upstream * spikes), by back-propagation on plain floats."""
    steps, u, potentials, spikes = len(current), 0.0, [], []
    fired = 0.0
    for value in current:
        u = tau * u * (1 - fired) + value
        fired = float(u >= threshold)
        potentials.append(u)
        spikes.append(fired)
    gradient, later = np.zeros(steps), 0.0
    for t in reversed(range(steps)):
        to_spike = upstream[t] - (0.0 if detach else later * tau * potentials[t])
        later = to_spike * SURROGATES[surrogate](potentials[t], threshold) + later * tau * (1 - spikes[t])
        gradient[t] = later
    return spikes, gradient


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("tau", [0.25, 0.9])
def test_lif_spikes_and_gradients_follow_the_recursion(surrogate, detach, tau):
    generator = torch.Generator().manual_seed(0)
    current = torch.randn(7, 50, dtype=torch.float64, generator=generator).mul(0.6).requires_grad_()
    upstream = torch.randn(7, 50, dtype=torch.float64, generator=generator)
    neuron = lif(tau, 0.2, surrogate, detach)
    spikes = neuron(current)
    (spikes * upstream).sum().backward()
    for i in range(50):
        expected, gradient = by_hand(current[:, i].tolist(), upstream[:, i].tolist(), tau, 0.2, surrogate, detach)
        assert spikes[:, i].tolist() == expected
        np.testing.assert_allclose(current.grad[:, i].numpy(), gradient, rtol=1e-9, atol=1e-12)


def test_float32_gives_the_same_spikes_and_gradients_as_float64():
    current = torch.randn(5, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for dtype in (torch.float64, torch.float32):
        x = current.to(dtype, copy=True).requires_grad_()
        spikes = lif(0.5, 0.3, "atan")(x)
        (spikes * torch.arange(5.0, dtype=dtype)[:, None]).sum().backward()
        results.append((spikes.double(), x.grad.double()))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5)


def test_a_constant_input_that_settles_below_the_threshold_never_fires():
    # 0.149 settles at 0.149 / (1 - 0.25) = 0.1987 < 0.2; 0.17 reaches 0.17 * 1.25 = 0.2125 at the second step.
    quiet = lif(0.25, 0.2)(torch.full((200, 1), 0.149))
    firing = lif(0.25, 0.2)(torch.full((4, 1), 0.17))
    assert quiet.sum() == 0
    assert firing.flatten().tolist() == [0, 1, 0, 1]


def test_reset_forgets_the_potential():
    neuron = lif(0.9, 1.0)
    current = torch.full((1, 1), 0.6)
    assert neuron(current).item() == 0
    assert neuron(current).item() == 1  # 0.9 * 0.6 + 0.6
    neuron(current)
    reset(neuron)
    assert neuron(current).item() == 0


@pytest.mark.parametrize(("tau", "threshold", "name"), [(0.0, 1, "tau"), (1.0, 1, "tau"), (0.5, 0, "v_threshold")])
def test_lif_refuses_constants_that_make_no_neuron(tau, threshold, name):
    with pytest.raises(UserError, match=name):
        lif(tau, threshold)


@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (6, 3)])
def test_threshold_batch_norm_is_batch_norm_with_a_scaled_weight(shape):
    torch.manual_seed(0)
    reference = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(3)
    ours = ThresholdBatchNorm(3, v_threshold=0.2, alpha=2.0, dims=2 if len(shape) == 4 else 0)
    with torch.no_grad():
        for norm in (reference, ours.norm):
            norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0]))
            norm.bias.copy_(torch.tensor([0.0, 0.3, -1.0]))
        reference.weight.mul_(0.4)
    for _ in range(3):
        x = torch.randn(shape) * 3 + 1
        torch.testing.assert_close(ours(x), reference(x))
    torch.testing.assert_close(ours.norm.running_var, reference.running_var)
    torch.testing.assert_close(ours.eval()(x), reference.eval()(x))
    ours(x).sum().backward()
    assert ours.norm.weight.grad is not None


def test_threshold_batch_norm_keeps_its_factor_as_a_synchronised_norm():
    ours = ThresholdBatchNorm(3, v_threshold=0.2).eval()
    x = torch.randn(4, 3, 2, 2)
    expected = ours(x)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(ours)
    assert isinstance(synchronised.norm, nn.SyncBatchNorm)
    torch.testing.assert_close(synchronised(x), expected)


def test_statistics_of_a_repeated_input_do_not_depend_on_the_number_of_repeats():
    x = torch.randn(8, 3, 4, 4)
    once, often = ThresholdBatchNorm(3), ThresholdBatchNorm(3)
    torch.testing.assert_close(repeat_time(once(x), 5), unfold_time(often(fold_time(repeat_time(x, 5))), 5))


def test_repeating_over_time_copies_nothing_and_folding_is_undone_by_unfolding():
    x = torch.randn(4, 3, 2, 2)
    repeated = repeat_time(x, 6)
    assert repeated.shape == (6, 4, 3, 2, 2)
    assert repeated.data_ptr() == x.data_ptr()
    y = torch.randn(6, 4, 3)
    assert torch.equal(unfold_time(fold_time(y), 6), y)
    assert torch.equal(fold_time(y)[4 + 1], y[1, 1])


@pytest.mark.parametrize("decay", [0.8, 0.0, 1.0])
def test_leaky_readout_of_a_constant_is_the_geometric_sum(decay):
    y = torch.full((16, 2, 3), 0.7, dtype=torch.float64)
    total = 0.7 * (16 if decay == 1 else (1 - decay**16) / (1 - decay))
    torch.testing.assert_close(LeakyReadout(decay)(y), torch.full((2, 3), total, dtype=torch.float64))


def test_leaky_readout_weighs_the_last_step_fully():
    y = torch.randn(5, 3, dtype=torch.float64)
    potential = torch.zeros(3, dtype=torch.float64)
    for step in y:
        potential = 0.8 * potential + step
    torch.testing.assert_close(LeakyReadout(0.8)(y), potential)
    with pytest.raises(UserError, match="decay"):
        LeakyReadout(1.5)


def step_by_step(network, image):
    """The same network, one time step after the other, nothing shared between steps, logits averaged at the end."""
    potentials = [0.0] * len(network.neurons)
    outputs = []
    for _ in range(network.time_steps):
        signal = network.normalize(image)
        for i, (layer, neuron) in enumerate(zip(network.currents, network.neurons, strict=True)):
            potentials[i] = (1 - 1 / neuron.tau) * potentials[i] + layer(signal)
            signal = (potentials[i] >= neuron.v_threshold).float()
            potentials[i] = potentials[i] * (1 - signal)
        outputs.append(network.head(signal.flatten(1)))
    return torch.stack(outputs).mean(0)


def test_spiking_convnet_equals_a_plain_loop_over_time():
    torch.manual_seed(0)
    network = SpikingConvNet(width=6, depth=2, time_steps=5, tau=0.4, image_size=12)
    for _ in range(5):
        network(torch.rand(16, 1, 12, 12))
    network.eval()
    image = torch.rand(8, 1, 12, 12)
    torch.testing.assert_close(network(image), step_by_step(network, image))


def test_spiking_convnet_computes_the_first_convolution_once():
    network = SpikingConvNet(width=4, depth=2, time_steps=6, image_size=8)
    sizes = []
    for layer in network.currents:
        layer[0].register_forward_hook(lambda module, given, out: sizes.append(len(given[0])))
    network(torch.rand(3, 1, 8, 8))
    assert sizes == [3, 18]


def test_spiking_convnet_sends_binary_spikes_and_holds_no_state_between_images():
    network = SpikingConvNet(width=4, depth=2, image_size=8)
    seen = []
    for neuron in network.neurons:
        neuron.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
    image = torch.rand(3, 1, 8, 8)
    network(image).sum().backward()
    copy.deepcopy(network)  # fails where a neuron still holds the graph of the last forward
    network.eval()
    assert torch.equal(network(image), network(image))
    assert all(set(spikes.unique().tolist()) <= {0.0, 1.0} for spikes in seen)
    assert 0 < seen[0].mean() < 1
