"""Shared networks: sizes against published or derived figures, shapes, and one-line errors."""

import pytest
import torch
from torch import nn

from leanlight.contracts import MissingExtraError, UserError
from lit_modules import nn as networks


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def on_meta(make):
    with torch.device("meta"):
        return make()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: networks.ConvNet(), 320_010),  # the figure of the dataset-distillation papers for CIFAR-10
        (lambda: networks.CifarResNet(depth=20), 269_722),  # published: 0.27 M, exact with shortcuts of option A
        (lambda: networks.CifarResNet(depth=56), 853_018),  # published: 0.85 M
        (lambda: networks.WideResNet(depth=28, widen_factor=10), 36_479_194),  # published: 36.5 M
        (lambda: networks.WideResNet(depth=40, widen_factor=2), 2_243_546),  # published: 2.2 M
        (lambda: networks.LinearClassifier(), 28 * 28 * 10 + 10),
        (lambda: networks.MLP(hidden=[100, 50]), 784 * 100 + 100 + 100 * 50 + 50 + 50 * 10 + 10),
    ],
)
def test_parameter_counts_are_the_published_ones(make, expected):
    assert parameters(on_meta(make)) == expected


@pytest.mark.parametrize("name", ["ResNet18", "ResNet34", "ResNet50"])
def test_small_image_resnets_are_torchvisions_with_another_stem(name):
    from torchvision import models

    reference = on_meta(lambda: getattr(models, name.lower())(num_classes=10))
    ours = on_meta(getattr(networks, name))
    stem_7x7, stem_3x3 = 3 * 64 * 49, 3 * 64 * 9
    assert parameters(ours) == parameters(reference) - stem_7x7 + stem_3x3


@pytest.mark.parametrize(("size", "poolings"), [(32, 3), (64, 4)])
def test_vgg11_with_average_pooling_is_that_of_data_free_distillation(size, poolings):
    """torchvision's layers, maps of 4x4 at both sizes, and one linear layer for 512 means."""
    from torchvision import models

    ours = on_meta(lambda: networks.VGG11(norm="batch", image_size=size, pool="average"))
    reference = on_meta(models.vgg11_bn)
    assert parameters(ours) == parameters(reference.features) + 512 * 10 + 10
    layers = list(ours.features)
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in layers) == poolings
    places = [i for i, layer in enumerate(reference.features) if isinstance(layer, nn.MaxPool2d)][:poolings]
    assert [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)] == places
    with torch.device("meta"):
        assert ours.forward_features(torch.rand(2, 3, size, size)).shape == (2, 512, 4, 4)


def test_vgg11_takes_small_images_where_it_averages():
    assert networks.VGG11(1, width=4, image_size=8, pool="average")(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(UserError, match="image_size: expected at least 32"):
        networks.VGG11(1, width=4, image_size=8)


@pytest.mark.parametrize(("width", "depth", "channels", "size"), [(32, 3, 1, 28), (16, 2, 3, 32), (8, 1, 1, 8)])
def test_convnet_size_follows_the_closed_form(width, depth, channels, size):
    network = networks.ConvNet(channels, 7, width, depth, image_size=size)
    side = size // 2**depth
    convolutions = channels * 9 * width + width + (depth - 1) * (9 * width**2 + width)
    assert parameters(network) == convolutions + depth * 2 * width + width * side**2 * 7 + 7


@pytest.mark.parametrize(
    "make",
    [
        lambda: networks.ConvNet(width=8),
        lambda: networks.ConvNet(width=8, norm="none"),
        lambda: networks.VGG11(width=8),
        lambda: networks.VGG11(width=8, pool="average"),
        lambda: networks.AlexNet(),
        lambda: networks.ResNet18(width=8, norm="group"),
        lambda: networks.ResNet34(width=4),
        lambda: networks.ResNet50(width=8, norm="instance"),
        lambda: networks.CifarResNet(depth=8),
        lambda: networks.WideResNet(depth=10, widen_factor=1, dropout=0.3),
        lambda: networks.MLP(3, 10, image_size=32),
        lambda: networks.SpikingConvNet(3, width=8, image_size=32),
        lambda: networks.TimmNet("resnet10t", mean=[0.5, 0.4, 0.3]),
    ],
)
def test_every_network_maps_images_to_logits_and_trains_all_its_parameters(make):
    network = make()
    logits = network(torch.rand(4, 3, 32, 32))
    assert logits.shape == (4, 10)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("make", [lambda norm: networks.ConvNet(norm=norm), lambda norm: networks.ResNet18(norm=norm)])
def test_instance_norm_makes_items_independent_of_their_batch_and_batch_norm_does_not(make):
    images = torch.rand(4, 3, 32, 32)
    alone, together = (lambda n: n(images[:1])), (lambda n: n(images)[:1])
    independent, dependent = make("instance").train(), make("batch").train()
    torch.testing.assert_close(alone(independent), together(independent), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(together(dependent), dependent(images[[0, 1]])[:1], atol=1e-3)


def test_option_a_shortcut_halves_the_image_and_pads_channels_with_zeros():
    block = next(m for m in networks.CifarResNet(depth=8).modules() if getattr(m, "downsample", None) is not None)
    x = torch.rand(2, 16, 8, 8)
    shortcut = block.downsample(x)
    assert shortcut.shape == (2, 32, 4, 4)
    torch.testing.assert_close(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert shortcut[:, :8].abs().max() == shortcut[:, 24:].abs().max() == 0


def test_mean_and_std_travel_with_the_weights():
    given = networks.ConvNet(width=4, mean=[0.1, 0.2, 0.3], std=0.2)
    other = networks.ConvNet(width=4)
    other.load_state_dict(given.state_dict())
    image = torch.full((1, 3, 32, 32), 0.5)
    torch.testing.assert_close(other.normalize(image)[0, :, 0, 0], torch.tensor([2.0, 1.5, 1.0]))


def test_grey_images_are_not_taken_for_colour_ones():
    with pytest.raises(ValueError, match="3 channels"):
        networks.ConvNet(width=4)(torch.rand(2, 1, 32, 32))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: networks.ConvNet(width=-3), ["width", "-3"]),
        (lambda: networks.ConvNet(depth=6), ["image_size", "64", "32"]),
        (lambda: networks.ConvNet(mean=[0.1, 0.2]), ["mean", "3", "2"]),
        (lambda: networks.ConvNet(std=0.0), ["std", "positive"]),
        (lambda: networks.CifarResNet(depth=21), ["depth", "6n + 2", "21"]),
        (lambda: networks.WideResNet(depth=20), ["depth", "6n + 4", "20"]),
        (lambda: networks.MLP(hidden=[10, 0]), ["hidden", "0"]),
        (lambda: networks.TimmNet("resnet18x"), ["resnet18x", "did you mean", "resnet18"]),
        (lambda: networks.SpikingConvNet(time_steps=0), ["time_steps", "0"]),
    ],
)
def test_a_wrong_size_is_one_line_that_names_the_argument(make, words):
    with pytest.raises(UserError) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words)


def test_a_missing_timm_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"timm.*leanlight\[vision\]"):
        networks.TimmNet("resnet18")


def test_every_exported_name_resolves_and_an_unknown_one_does_not():
    assert all(hasattr(networks, name) for name in networks.__all__)
    assert issubclass(networks.ConvNet, nn.Module)
    with pytest.raises(AttributeError, match="ConvNot"):
        networks.ConvNot  # noqa: B018
