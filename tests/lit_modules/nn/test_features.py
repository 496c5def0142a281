"""Features by timm's names: the head of the features is the network, and before its last layer they are vectors."""

import pytest
import torch
from torch import nn

from leanlight.contracts import UserError
from lit_modules import nn as networks
from lit_modules.nn import pooled_features

MAKERS = [
    (lambda: networks.ConvNet(width=8), 8 * 16),
    (lambda: networks.VGG11(width=4), 32),
    (lambda: networks.AlexNet(), 192 * 16),
    (lambda: networks.ResNet18(width=4), 32),
    (lambda: networks.ResNet50(width=4), 128),
    (lambda: networks.CifarResNet(depth=8), 64),
    (lambda: networks.WideResNet(depth=10, widen_factor=1), 64),
    (lambda: networks.MLP(3, 10, (20, 30), image_size=32), 30),
    (lambda: networks.LinearClassifier(3, image_size=32), 3 * 32 * 32),
    (lambda: networks.SpikingConvNet(3, width=8, image_size=32), 8 * 16),
    (lambda: networks.TimmNet("resnet10t"), 512),
    (lambda: networks.TimmNet("vit_tiny_patch16_224", options={"img_size": 32}), 192),
]


def last_linear_input(network, image):
    """What enters the network's last linear layer, seen from outside."""
    seen = []
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    handle = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    network(image)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(("make", "size"), MAKERS)
def test_the_head_of_the_features_is_the_network_and_its_last_layer_sees_the_pooled_ones(make, size):
    torch.manual_seed(0)
    network, image = make().eval(), torch.rand(3, 3, 32, 32)
    features = network.forward_features(image)
    assert torch.equal(network.forward_head(features), network(image))
    pooled = pooled_features(network, image)
    assert pooled.shape == (3, size)
    assert torch.equal(pooled, last_linear_input(network, image))


def test_feature_maps_are_not_pooled_yet():
    assert networks.ConvNet(width=8).forward_features(torch.rand(2, 3, 32, 32)).shape == (2, 8, 4, 4)
    assert networks.ResNet18(width=4).forward_features(torch.rand(2, 3, 32, 32)).shape == (2, 32, 4, 4)


def test_firing_rates_are_the_features_of_a_spiking_network():
    network = networks.SpikingConvNet(3, width=8, image_size=32, time_steps=4)
    rates = pooled_features(network, torch.rand(2, 3, 32, 32))
    assert torch.equal(rates * 4, (rates * 4).round())
    assert rates.max() > 0


def test_a_network_of_timm_gives_timms_own_features():
    timm = pytest.importorskip("timm", reason="needs the extra vision")
    network, image = timm.create_model("resnet10t", num_classes=7).eval(), torch.rand(2, 3, 64, 64)
    expected = network.forward_head(network.forward_features(image), pre_logits=True)
    assert torch.equal(pooled_features(network, image), expected)
    ours = networks.TimmNet("resnet10t", num_classes=7, mean=0.0, std=1.0).eval()
    ours.network.load_state_dict(network.state_dict())
    assert torch.equal(pooled_features(ours, image), expected)


def test_gradients_reach_the_image_through_the_features():
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    pooled_features(networks.ConvNet(width=8), image).square().sum().backward()
    assert image.grad.abs().sum() > 0


def test_a_network_without_features_or_pooling_is_refused_in_one_line():
    timm = pytest.importorskip("timm", reason="needs the extra vision")
    for network, words in (
        (nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), "forward_features"),
        (timm.create_model("resnet10t", num_classes=0, global_pool=""), "global pooling"),
    ):
        with pytest.raises(UserError, match=rf"^network: .*{words}") as caught:
            pooled_features(network, torch.rand(2, 3, 32, 32))
        assert "\n" not in str(caught.value)
