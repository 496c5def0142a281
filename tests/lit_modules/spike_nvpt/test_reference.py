"""Prompts between wrapped blocks are those of a plain loop."""

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from lit_modules.nn import TimmNet
from lit_modules.spike_nvpt import DensePrompts, PromptTuning
from lit_modules.spike_nvpt.reference import PlainVPT


def transformer():
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
    return TimmNet("vit_tiny_patch16_224", in_channels=1, num_classes=5, options=options)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_logits_and_gradients_are_those_of_a_plain_loop(depth):
    network = PromptTuning(partial(DensePrompts, length=4), depth=depth).adapt(transformer())
    plain = PlainVPT(transformer(), network.prompts())
    image, label = torch.rand(6, 1, 16, 16), torch.arange(6) % 5
    both = network.train()(image), plain.train()(image)
    torch.testing.assert_close(*both, rtol=1e-6, atol=1e-6)
    for logits in both:
        cross_entropy(logits, label).backward()
    torch.testing.assert_close(network.prompts.latents.grad, plain.prompts.grad, rtol=1e-5, atol=1e-7)
    ours, theirs = (net.network.get_classifier().weight.grad for net in (network.net, plain.net))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    trained = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert trained == {"prompts", "net.network.head.weight", "net.network.head.bias"}
