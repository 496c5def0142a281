"""Pictures of prompts: bits, their share over training, and what they do to attention."""

from functools import partial

import pytest
import torch

from lit_modules.history import History
from lit_modules.nn import TimmNet
from lit_modules.spike_nvpt import (
    DensePrompts,
    LinearProbe,
    LoRA,
    PromptTuning,
    SpikingPrompts,
    TunedClassifier,
    pictures,
)

timm = pytest.importorskip("timm", reason="needs the extra vision")

SIZES = {"img_size": (8, 12), "patch_size": 2, "embed_dim": 24, "depth": 3, "num_heads": 2}
IMAGES = torch.rand(3, 1, 8, 12, generator=torch.Generator().manual_seed(7))


def tuned(tuning, name="vit_tiny_patch16_224", **options):
    torch.manual_seed(3)
    module = TunedClassifier(partial(TimmNet, name, 1, 10, options={**SIZES, **options}), tuning)
    with torch.no_grad():
        for parameter in module.network.net.parameters():  # a fresh network attends to everything alike
            parameter += 0.3 * torch.randn_like(parameter)
    return module


def of_timm(vit, run):
    """What timm's own attention of the last block, not fused, has for the class token: mean over heads (N, n)."""
    seen, attention = [], vit.blocks[-1]
    attention = getattr(attention, "block", attention).attn
    attention.fused_attn = False
    handle = attention.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        run()
    handle.remove()
    return seen[0][:, :, 0].mean(1)


def drawn(weights):
    """Attention to patches (N, 4 * 6), as the picture shows it in a tile of 112 x 168 pixels."""
    even = weights / weights.mean(1, keepdim=True)
    return (even / (1 + even)).reshape(-1, 1, 4, 6).repeat_interleave(28, 2).repeat_interleave(28, 3)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_attention_is_that_of_timm_with_prompts_and_of_the_plain_network_without(depth):
    network = tuned(PromptTuning(partial(SpikingPrompts, length=5), depth=depth, dropout=0.5)).network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    item = pictures.of_attention(network, IMAGES)["attention"]
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert item.images.shape == (9, 1, 112, 168)
    assert item.columns == 3
    assert torch.equal(item.images[:3, :, ::14, ::14], IMAGES)
    network.eval()
    with_prompts = of_timm(network.net.network, lambda: network(IMAGES))
    plain = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, **SIZES).eval()
    state = network.net.network.state_dict()
    plain.load_state_dict({name.replace(".block.", "."): value for name, value in state.items()})
    without = of_timm(plain, lambda: plain(network.net.prepare(IMAGES)))
    assert with_prompts.shape == (3, 1 + 5 + 24)
    torch.testing.assert_close(item.images[3:6], drawn(without[:, 1:]), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(item.images[6:], drawn(with_prompts[:, 6:]), rtol=1e-3, atol=1e-4)
    shares = [f"with prompts, which get {share:.0%}" for share in with_prompts[:, 1:6].sum(1).tolist()]
    assert item.captions == [""] * 3 + ["without prompts"] * 3 + shares


@pytest.mark.parametrize("rule", [LinearProbe(), LoRA(rank=2)])
def test_networks_without_prompts_show_their_attention_once(rule):
    if isinstance(rule, LoRA):
        pytest.importorskip("peft")
    item = pictures.of_attention(tuned(rule).network, IMAGES)["attention"]
    assert item.captions == [""] * 3 + ["attention"] * 3


def test_a_network_without_a_class_token_shows_none():
    network = tuned(LinearProbe(), class_token=False, global_pool="avg").network
    assert pictures.of_attention(network, IMAGES) == {}


def test_bits_are_drawn_layer_below_layer_and_their_share_over_epochs():
    prompts, history = SpikingPrompts(2, 16, 4, length=3), History()
    history.add(epoch=1, density=0.25, density_0=0.5, density_1=0.0, flips=4.0)
    assert pictures.of_prompts(prompts, history).keys() == {"prompts"}
    history.add(epoch=2, density=0.5, density_0=0.75, density_1=0.25, flips=2.0)
    items = pictures.of_prompts(prompts, history)
    assert torch.equal(items["prompts"].matrix, prompts().detach().reshape(6, 16))
    assert items["density"].series == {"all layers": [0.25, 0.5], "first layer": [0.5, 0.75], "last layer": [0.0, 0.25]}
    assert items["flips"].series == {"bits": [4.0, 2.0]}
    assert list(items["flips"].x) == [1, 2]


def test_dense_prompts_have_no_bits_to_count_and_other_rules_no_prompts():
    assert pictures.of_prompts(DensePrompts(2, 16, 4, length=3), History()).keys() == {"prompts"}
    assert pictures.of_prompts(None, History()) == {}
