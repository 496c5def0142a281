"""Networks of different widths: parameter counts, an explicit simulation step by step, and the energy of two forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from callbacks.energy import count_operations
from lit_modules.sfedhifi.decomposition import DecomConv, basis_keys, fold_network
from lit_modules.sfedhifi.networks import (
    FactorisedCNN,
    FactorisedResNet18,
    FactorisedSpikingCNN,
    FactorisedSpikingResNet18,
)
from lit_modules.sfedhifi.reference import chunk_by_chunk

WIDTHS = (0.25, 0.5, 0.75, 1.0)


def parameters(network):
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("make", [FactorisedSpikingResNet18, FactorisedResNet18])
@pytest.mark.parametrize(
    ("classes", "counts"),
    [(10, (530_858, 1_219_594, 2_362_986, 3_956_810)), (100, (542_468, 1_242_724, 2_397_636, 4_002_980))],
)
def test_resnet_has_the_papers_parameters(make, classes, counts):
    networks = [make(width, num_classes=classes) for width in WIDTHS]
    assert tuple(map(parameters, networks)) == counts
    for network in networks:
        assert sum(network.state_dict()[key].numel() for key in basis_keys(network)) == 294_912


@pytest.mark.parametrize("make", [FactorisedSpikingCNN, FactorisedCNN])
def test_four_layer_network_has_the_papers_parameters(make):
    assert tuple(parameters(make(width)) for width in WIDTHS) == (33_482, 63_498, 97_610, 135_818)


@pytest.mark.parametrize(
    ("spiking", "twin"), [(FactorisedSpikingCNN, FactorisedCNN), (FactorisedSpikingResNet18, FactorisedResNet18)]
)
def test_a_twin_has_the_same_parameters_and_layers(spiking, twin):
    one, other = spiking(0.5), twin(0.5)
    assert {k: v.shape for k, v in one.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert one.spiking
    assert not other.spiking


class Fire:
    """A neuron as its equations: IF, or LIF with decayed input (tau 0.5), hard reset to 0."""

    def __init__(self, leaky, threshold):
        self.leaky, self.threshold, self.v = leaky, threshold, 0.0

    def __call__(self, current):
        h = self.v + (current - self.v) / 2 if self.leaky else self.v + current
        spikes = (h >= self.threshold).to(current)
        self.v = h * (1 - spikes)
        return spikes


def simulated_cnn(network, image, leaky, threshold, inner_threshold):
    """The network step by step, from its weights alone."""
    w = dict(network.named_parameters())
    inner = [Fire(False, inner_threshold) for _ in range(2)]
    fire = [Fire(leaky, threshold) for _ in range(4)]
    outputs = []
    for _ in range(network.time_steps):
        x = fire[0](F.conv2d((image - 0.1307) / 0.3081, w["stem.0.weight"], w["stem.0.bias"], padding=1))
        x = F.max_pool2d(fire[1](chunk_by_chunk(x, w["conv1.basis"], w["conv1.factor"], inner=inner[0])), 2)
        x = F.max_pool2d(fire[2](chunk_by_chunk(x, w["conv2.basis"], w["conv2.factor"], inner=inner[1])), 2)
        outputs.append(fire[3](F.linear(x.flatten(1), w["head.weight"], w["head.bias"])))
    return torch.stack(outputs)


@pytest.mark.parametrize("size", [8, 28])
def test_spikes_are_those_of_an_explicit_simulation(size):
    torch.manual_seed(0)
    channels = (8, 16, 16)
    network = FactorisedSpikingCNN(0.5, image_size=size, channels=channels, time_steps=6, inner_threshold=0.75).double()
    image = torch.rand(5, 1, size, size, dtype=torch.float64)
    expected = simulated_cnn(network, image, leaky=False, threshold=0.5, inner_threshold=0.75)
    outputs = network.forward_steps(image)
    assert 0.05 < outputs.mean() < 0.95, "the test needs spikes and silence"
    assert torch.equal(outputs, expected)
    assert torch.equal(network(image), expected.mean(0))


def simulated_resnet(network, image):
    """The residual network step by step in evaluation mode, from its layers without neurons."""
    neurons = {}

    def fire(name, current):
        return neurons.setdefault(name, Fire(True, 1.0))(current)

    def convolve(conv, x):
        return chunk_by_chunk(x, conv.basis, conv.factor, conv.stride)

    outputs = []
    for _ in range(network.time_steps):
        x = fire("stem", network.stem((image - 0.5) / 0.5))
        for i, block in enumerate(block for stage in network.stages for block in stage):
            y = fire((i, 1), block.norm1(convolve(block.conv1, x)))
            x = fire((i, 2), block.norm2(convolve(block.conv2, y)) + block.shortcut(x))
        outputs.append(fire("out", network.head(x)))
    return torch.stack(outputs)


def lively(network):
    """Gains and a head that make small networks with random weights fire."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(2.0)
                module.bias.normal_(0.3)
            if isinstance(module, nn.Linear):
                module.weight.mul_(8.0)
    return network


def test_residual_spikes_are_those_of_an_explicit_simulation():
    torch.manual_seed(0)
    network = FactorisedSpikingResNet18(
        0.5, channels=(8, 16, 16, 32), basis_fraction=0.25, time_steps=5, mean=0.5, std=0.5
    )
    network = lively(network).double().eval()
    image = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    outputs = network.forward_steps(image)
    assert 0.02 < outputs.mean() < 0.98, "the test needs spikes and silence"
    assert torch.equal(outputs, simulated_resnet(network, image))


def test_a_forward_starts_at_rest_and_holds_nothing():
    torch.manual_seed(0)
    network = FactorisedSpikingCNN(image_size=8, channels=(8, 8, 8), time_steps=3)
    image = torch.rand(2, 1, 8, 8)
    first = network(image)
    assert torch.equal(network(image), first)
    network(image[:1])  # another batch size
    assert all(module.v == 0.0 for module in network.modules() if hasattr(module, "v_threshold"))


def test_gradients_reach_every_parameter_of_a_fresh_network():
    torch.manual_seed(0)
    for network in (
        FactorisedSpikingCNN(0.25),
        FactorisedSpikingResNet18(0.25, in_channels=1, time_steps=4, mean=0.5, std=0.5),
    ):
        network.forward_steps(torch.rand(4, 1, 28, 28)).sum().backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_the_batch_norm_of_a_residual_network_sees_all_steps_as_one_batch():
    torch.manual_seed(0)
    network = FactorisedSpikingResNet18(0.5, channels=(8, 8, 8, 8), basis_fraction=0.25, time_steps=4)
    seen = []
    norm = network.stages[0][0].norm1
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    network.forward_steps(torch.rand(3, 3, 8, 8))
    (x,) = seen
    assert x.shape[:2] == (4 * 3, 4)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.mean((0, 2, 3)))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.var((0, 2, 3)))


# ---- energy: a network of two layers, by hand ----


class TwoLayers(nn.Module):
    """Factorised 3x3 convolution on given spikes, then a linear layer on its real output."""

    def __init__(self):
        super().__init__()
        self.conv = DecomConv(4, 6, 2, 3)
        self.head = nn.Linear(6 * 16, 5)

    def forward(self, spikes):
        return self.head(self.conv(spikes).flatten(1))


def touched(spikes):
    """Weights of a 3x3 kernel that the spikes meet, in an image of side 4 with a border of zeros: 4, 6 or 9 each."""
    reach = [2, 3, 3, 2]
    return sum(reach[row] * reach[column] for *_, row, column in spikes.nonzero().tolist())


def test_energy_of_both_forms_of_a_factorised_convolution():
    torch.manual_seed(0)
    network, spikes = TwoLayers().eval(), (torch.rand(3, 4, 4, 4) < 0.4).float()
    counts = {layer.name: layer for layer in count_operations(network, spikes)}
    # run-time form: 3 filters a spike add; the 1x1 convolution of 2 groups x 3 filters multiplies
    assert counts["conv"].acs == pytest.approx(3 * touched(spikes) / 3)
    assert counts["conv"].macs == 16 * 6 * 6
    assert counts["head"].macs == 6 * 16 * 5
    folded = {layer.name: layer for layer in count_operations(fold_network(network), spikes)}
    # folded form: 6 outputs a spike add, nothing multiplies
    assert folded["conv"].acs == pytest.approx(6 * touched(spikes) / 3)
    assert folded["conv"].macs == 0
    assert counts["conv"].energy_pj == pytest.approx(0.9 * touched(spikes) + 4.6 * 16 * 36)


def test_an_inner_neuron_turns_both_stages_into_additions():
    torch.manual_seed(0)
    network = FactorisedSpikingCNN(0.5, image_size=8, channels=(8, 16, 16), time_steps=3, inner_threshold=0.5).eval()
    counts = {layer.name: layer for layer in count_operations(network, torch.rand(4, 1, 8, 8))}
    assert counts["conv1"].macs == counts["conv2"].macs == counts["head"].macs == 0
    assert counts["conv1"].acs > 0
    assert counts["stem.0"].macs == 8 * 8 * 8 * 9
    assert math.isclose(counts["stem.0"].acs, 0)


def test_scaled_convolutions_send_on_as_much_as_the_widest_in_training_alone():
    torch.manual_seed(0)
    network = FactorisedCNN(0.5, image_size=8, channels=(8, 16, 16), factorised=False, scaler=True).double()
    image = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    trained, evaluated = (network.train(mode)(image) - network.head.bias for mode in (True, False))
    torch.testing.assert_close(trained, evaluated / 0.5**3)  # three convolutions, whose biases begin as 0
