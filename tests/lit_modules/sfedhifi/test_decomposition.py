"""Factorised convolution: against explicit sums, the published chunk-by-chunk form, and its folded convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leanlight.contracts import UserError
from lit_modules.sfedhifi import decomposition
from lit_modules.sfedhifi.decomposition import (
    DecomConv,
    composed_weight,
    fold_groups,
    fold_network,
    group_responses,
)
from lit_modules.sfedhifi.networks import FactorisedResNet18, FactorisedSpikingCNN, FactorisedSpikingResNet18
from lit_modules.sfedhifi.reference import chunk_by_chunk

TINY = {"channels": (8, 16, 16, 32), "basis_fraction": 0.25}


def summed_weight(basis, factor):
    """W[d, i·a1 + c] = Σ_j M[d, i·a2 + j] B[j, c], one number at a time."""
    filters, channels, size, _ = basis.shape
    groups = factor.shape[1] // filters
    weight = torch.zeros(len(factor), groups * channels, size, size, dtype=basis.dtype)
    for d in range(len(factor)):
        for i in range(groups):
            for c in range(channels):
                for j in range(filters):
                    weight[d, i * channels + c] += factor[d, i * filters + j, 0, 0] * basis[j, c]
    return weight


def gradients(function, *tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return (out, *torch.autograd.grad((out * probe).sum(), leaves))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize("groups", [1, 3])
def test_values_and_gradients_are_those_of_the_summed_weight(stride, kernel_size, groups):
    torch.manual_seed(0)
    conv = DecomConv(2 * groups, 5, 2, 2, kernel_size, stride).double()
    x = torch.randn(3, 2 * groups, 7, 7, dtype=torch.float64)

    def ours(x, basis, factor):
        return torch.func.functional_call(conv, {"basis": basis, "factor": factor}, (x,))

    def two_stages(x, basis, factor):  # evaluation never composes
        return torch.func.functional_call(conv.eval(), {"basis": basis, "factor": factor}, (x,))

    def in_the_batch(x, basis, factor):  # what runs on a GPU
        return F.conv2d(fold_groups(x, basis, stride), factor)

    def published(x, basis, factor):
        return chunk_by_chunk(x, basis, factor, stride)

    def plain(x, basis, factor):
        return F.conv2d(x, composed_weight(basis, factor), stride=stride, padding=kernel_size // 2)

    torch.testing.assert_close(composed_weight(conv.basis, conv.factor), summed_weight(conv.basis, conv.factor))
    expected = gradients(plain, x, conv.basis, conv.factor)
    for formulation in (ours, two_stages, in_the_batch, published):
        torch.testing.assert_close(gradients(formulation, x, conv.basis, conv.factor), expected)


def test_both_ways_to_train_are_taken_and_evaluation_takes_one(monkeypatch):
    taken = []
    monkeypatch.setattr(decomposition, "composed_weight", lambda *a: taken.append("composed") or composed_weight(*a))
    monkeypatch.setattr(decomposition, "group_responses", lambda *a: taken.append("stages") or group_responses(*a))
    narrow, wide = DecomConv(16, 16, 8, 16), DecomConv(512, 512, 64, 128)
    narrow(torch.rand(8, 16, 8, 8))
    narrow.eval()(torch.rand(8, 16, 8, 8))
    wide(torch.rand(8, 512, 4, 4))
    assert taken == ["composed", "stages", "stages"]


def test_a_non_linearity_stands_between_basis_and_factor():
    torch.manual_seed(0)
    conv = DecomConv(4, 3, 2, 5, inner=nn.ReLU())
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(conv(x), chunk_by_chunk(x, conv.basis, conv.factor, inner=nn.ReLU()))
    assert not torch.allclose(conv(x), F.conv2d(x, composed_weight(conv.basis, conv.factor), padding=1), atol=1e-3)
    with pytest.raises(UserError, match="inner_neuron: false"):
        conv.fold()


@pytest.mark.parametrize("width", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(
    "make",
    [
        lambda width: FactorisedResNet18(width, **TINY),
        lambda width: FactorisedSpikingResNet18(width, time_steps=3, output_neuron=False, **TINY),
        lambda width: FactorisedSpikingCNN(
            width,
            in_channels=3,
            image_size=8,
            channels=(8, 16, 16),
            time_steps=3,
            inner_neuron=False,
            basis_fraction=0.25,
        ),
    ],
    ids=["resnet", "spiking resnet", "spiking cnn"],
)
def test_a_folded_network_answers_alike_and_leaves_the_original_alone(make, width):
    torch.manual_seed(0)
    network = make(width).double().eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = fold_network(network)
    image = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    outputs = network.forward_steps(image)
    torch.testing.assert_close(folded.forward_steps(image), outputs)
    assert outputs.abs().sum() > 0, "the test needs a network that answers"
    assert not any(isinstance(module, DecomConv) for module in folded.modules())
    assert before.keys() == network.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


def test_networks_with_inner_neurons_cannot_be_folded():
    with pytest.raises(UserError, match="inner_neuron: false"):
        fold_network(FactorisedSpikingCNN(0.5))


def test_bases_start_orthonormal_within_a_block_and_each_is_registered_once():
    torch.manual_seed(0)
    network = FactorisedSpikingResNet18(0.5)
    for stage in network.stages:
        for block in stage:
            rows = torch.cat([block.conv1.basis, block.conv2.basis]).flatten(1)
            torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
    keys = [key for key in network.state_dict() if "basis" in key]
    assert len(keys) == 16
    assert len({network.state_dict()[key].data_ptr() for key in keys}) == 16


def test_bases_have_one_shape_for_all_widths():
    shapes = [
        {key: value.shape for key, value in FactorisedSpikingResNet18(width).state_dict().items() if "basis" in key}
        for width in (0.25, 0.5, 0.75, 1.0)
    ]
    assert all(each == shapes[0] for each in shapes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 0.0}, "width"),
        ({"width": 1.5}, "width"),
        ({"width": 0.3}, "basis_fraction"),
        ({"n_basis": 2.0}, "n_basis"),
        ({"basis_fraction": 0.001}, "basis_fraction"),
        ({"image_size": 3}, "image_size"),
        ({"channels": (8, 8)}, "channels"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(wrong, message):
    with pytest.raises(UserError, match=message) as error:
        FactorisedSpikingCNN(**wrong)
    assert "\n" not in str(error.value)
