"""Prompts between the blocks of timm's transformers, against plain VPT written as a loop over those blocks."""

import copy
import functools

import lightning.pytorch as pl
import pytest
import torch
from torch._dynamo.utils import counters

from datamodules import ImageDataModule
from leanlight.contracts import UserError
from lit_modules.nn import TimmNet
from lit_modules.spike_nvpt import (
    SSF,
    Adapter,
    BitFit,
    DensePrompts,
    FullTuning,
    LinearProbe,
    LoRA,
    PartialTuning,
    PromptTuning,
    RandomBits,
    SpikingPrompts,
    TunedClassifier,
)
from lit_modules.spike_nvpt.layers import AdaptedLayer, ScaledLayer
from lit_modules.spike_nvpt.vit import PromptedBlock

timm = pytest.importorskip("timm", reason="needs the extra vision")

LENGTH, BLOCKS, PATCHES = 3, 4, 16
SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": BLOCKS, "num_heads": 2}
NETWORKS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "average, no class token": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "deit": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "norm before blocks": ("vit_base_patch32_clip_224", {}),
}
DEPTHS = {
    "deep": ({"depth": "deep"}, 0, BLOCKS),
    "shallow": ({"depth": "shallow"}, 0, 1),
    "first": ({"depth": "first", "blocks": 2}, 0, 2),
    "last": ({"depth": "last", "blocks": 2}, 2, 2),
}
spiking = functools.partial(SpikingPrompts, length=LENGTH)
KINDS = {
    "spiking": spiking,
    "rate": functools.partial(spiking, use_sdu=False),
    "binary": functools.partial(spiking, use_sfl=False),
    "real": functools.partial(spiking, use_sfl=False, use_sdu=False),
    "dense": functools.partial(DensePrompts, length=LENGTH, init_range=1.0),
    "random bits": functools.partial(RandomBits, length=LENGTH),
}
RULES = {
    "linear": LinearProbe(),
    "full": FullTuning(),
    "bitfit": BitFit(),
    "lora": LoRA(rank=2),
    "partial": PartialTuning(2),
    "adapter": Adapter(bottleneck=6),
    "ssf": SSF(),
    **{name: PromptTuning(spiking, **options) for name, (options, _, _) in DEPTHS.items()},
}


def made(network="class token", **options):
    """A network of five classes with weights that no block leaves its input with."""
    name, own = NETWORKS[network]
    torch.manual_seed(0)
    net = TimmNet(name, 3, 5, options={**SIZES, **own, **options})
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def images(n=4):
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def plain_vpt(net, image, prompts, start):
    """VPT with the prompts (K, L, D) before block `start` and the next, block after block."""
    vit, length = net.network, prompts.shape[1]
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(net.prepare(image))))
    special = vit.num_prefix_tokens
    for i, block in enumerate(vit.blocks):
        if start <= i < start + len(prompts):
            patches = x[:, special:] if i == start else x[:, special + length :]
            x = torch.cat([x[:, :special], prompts[i - start].expand(len(x), -1, -1), patches], 1)
        x = block(x)
    x = torch.cat([x[:, :special], x[:, special + length :]], 1)
    return vit.forward_head(vit.norm(x))


def tuned(rule, network="class token", **options):
    return RULES[rule].adapt(made(network, **options))


def settled(net):
    """A network that prompts find in evaluation mode, as its copy for a test by hand must be."""
    return copy.deepcopy(net).eval()


# ---- values ----


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_logits_and_gradients_are_those_of_plain_vpt(network, depth):
    options, start, count = DEPTHS[depth]
    net = made(network)
    by_hand = settled(net)
    tuning = PromptTuning(KINDS["dense"], **options).adapt(net)
    prompts = tuning.prompts.latents.detach().clone().requires_grad_()
    assert prompts.shape == (count, LENGTH, 32)
    got, expected = tuning(images()), plain_vpt(by_hand, images(), prompts, start)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - by_hand(images())).abs().max() > 0.01
    for logits in (got, expected):
        logits.square().sum().backward()
    torch.testing.assert_close(tuning.prompts.latents.grad, prompts.grad, rtol=1e-4, atol=1e-4)
    assert (prompts.grad != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_prompt_goes_the_way_of_vpt(kind):
    net = made()
    by_hand = settled(net)
    tuning = PromptTuning(KINDS[kind]).adapt(net)
    expected = plain_vpt(by_hand, images(), tuning.prompts().detach(), 0)
    torch.testing.assert_close(tuning(images()), expected, rtol=1e-5, atol=1e-5)
    features = tuning.forward_features(images())
    torch.testing.assert_close(tuning.forward_head(features), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_sequences_keep_their_length_from_the_first_prompts_to_the_last_block(network, depth):
    options, start, _ = DEPTHS[depth]
    tuning = PromptTuning(spiking, **options).adapt(made(network))
    seen = []
    for block in tuning.net.network.blocks:
        inner = block.block if isinstance(block, PromptedBlock) else block
        inner.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    features = tuning.forward_features(images())
    tokens = tuning.net.network.num_prefix_tokens + PATCHES
    assert seen == [tokens] * start + [tokens + LENGTH] * (BLOCKS - start)
    assert features.shape == (4, tokens, 32)


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_order_of_prompts_in_a_set_does_not_matter(depth):
    options, _, count = DEPTHS[depth]
    tuning = PromptTuning(KINDS["dense"], **options).adapt(made())
    before = tuning(images())
    with torch.no_grad():
        for layer in tuning.prompts.latents:
            layer.copy_(layer[torch.tensor([2, 0, 1])])
    torch.testing.assert_close(tuning(images()), before, rtol=1e-5, atol=1e-5)
    if count > 1:  # unlike the order of the sets
        with torch.no_grad():
            tuning.prompts.latents.copy_(tuning.prompts.latents.flip(0))
        assert (tuning(images()) - before).abs().max() > 0.01


@pytest.mark.parametrize("rule", RULES)
def test_only_a_probe_and_changes_of_the_last_blocks_leave_something_to_store(rule):
    assert tuned(rule).stores == (rule in ("linear", "partial", "last"))
    assert tuned(rule, "distilled").stores == (rule in ("partial", "last"))  # its two last layers see different vectors


@pytest.mark.parametrize("rule", ["linear", "partial", "last"])
@pytest.mark.parametrize("network", [name for name in NETWORKS if name != "distilled"])
def test_what_is_stored_and_what_follows_make_the_whole_pass(rule, network):
    tuning = tuned(rule, network)
    with torch.no_grad():
        stored = tuning.prefix(images())
    assert torch.equal(tuning.suffix(stored), tuning(images()))  # to the bit: the same operations
    tuning.suffix(stored).sum().backward()
    assert all(parameter.grad is not None for parameter in tuning.parameters() if parameter.requires_grad)


def test_a_pass_leaves_no_tokens_even_after_an_error():
    tuning = tuned("deep")
    state = tuning.state_dict().keys()
    tuning(images())
    with pytest.raises((RuntimeError, AssertionError)):
        tuning(torch.rand(1, 3, 20, 20))
    assert tuning.state_dict().keys() == state
    assert not [name for name in state if name.endswith("tokens")]


# ---- without what was added ----


def trained_a_little(tuning):
    """What is 0 at first, away from it."""
    with torch.no_grad():
        for name, parameter in tuning.named_parameters():
            if "lora_B" in name or "adapter.2" in name or "gamma" in name or "beta" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return tuning.eval()


@pytest.mark.parametrize("rule", RULES)
def test_a_folded_network_has_the_same_logits_and_nothing_that_trains_or_spikes(rule):
    tuning = trained_a_little(tuned(rule))
    folded = tuning.folded()
    rounding = 1e-5 if rule in ("lora", "ssf") else 0.0  # merged weights are rounded once more
    torch.testing.assert_close(folded(images()), tuning(images()), rtol=rounding, atol=rounding)
    names = {type(module).__name__ for module in folded.modules()}
    assert not names & {"FusedIFNode", "SpikingPrompts", "ScaledLayer"}
    assert not [name for name in names if "ora" in name]
    assert not [name for name, parameter in folded.named_parameters() if parameter.requires_grad]
    assert not [name for name in folded.state_dict() if "latents" in name or "lora" in name or "gamma" in name]


@pytest.mark.parametrize("network", [*NETWORKS, "no bias"])
@pytest.mark.parametrize("rule", ["lora", "ssf", "adapter"])
def test_merged_layers_do_what_they_did_apart(rule, network):
    bare = {"qkv_bias": False, "qk_norm": True} if network == "no bias" else {}
    tuning = trained_a_little(tuned(rule, "class token" if bare else network, **bare))
    torch.testing.assert_close(tuning.folded()(images()), tuning(images()), rtol=1e-4, atol=1e-5)
    assert (tuning(images()) - made("class token" if bare else network, **bare).eval()(images())).abs().max() > 0.01


def test_scales_and_shifts_are_by_channel_and_begin_near_one_and_zero():
    torch.manual_seed(0)
    for layer, x in (
        (torch.nn.Linear(8, 400, bias=False), torch.rand(3, 5, 8)),
        (torch.nn.Conv2d(3, 400, 2), torch.rand(3, 3, 4, 4)),
        (torch.nn.LayerNorm(400), torch.rand(3, 5, 400)),
    ):
        scaled, axis = ScaledLayer(layer), 1 if isinstance(layer, torch.nn.Conv2d) else -1
        expected = layer(x).movedim(axis, -1) * scaled.gamma + scaled.beta
        torch.testing.assert_close(scaled(x).movedim(axis, -1), expected)
        torch.testing.assert_close(scaled.merged()(x), scaled(x), rtol=1e-5, atol=1e-5)
        for values, mean in ((scaled.gamma, 1), (scaled.beta, 0)):
            assert values.mean().item() == pytest.approx(mean, abs=0.005)
            assert values.std().item() == pytest.approx(0.02, abs=0.004)


def test_an_adapter_begins_as_nothing_and_is_a_bottleneck_behind_the_mlp():
    net = made()
    untouched = settled(net)
    tuning = RULES["adapter"].adapt(net)
    assert torch.equal(tuning(images()), untouched(images()))
    block, plain = net.network.blocks[0], untouched.network.blocks[0]
    assert type(block.mlp) is AdaptedLayer
    down, _, up = block.mlp.adapter
    with torch.no_grad():
        up.weight.normal_()
        up.bias.normal_()
    x = torch.rand(2, 17, 32)
    behind_attention = x + plain.attn(plain.norm1(x))
    y = plain.mlp(plain.norm2(behind_attention))
    gelu = torch.nn.functional.gelu(y @ down.weight.T + down.bias)
    torch.testing.assert_close(block(x), behind_attention + y + gelu @ up.weight.T + up.bias, rtol=1e-4, atol=1e-5)


def test_a_merged_change_is_the_product_of_its_matrices():
    net = made()
    before = net.network.blocks[1].attn.qkv.weight.detach().clone()
    tuning = LoRA(rank=2, alpha=6).adapt(net)
    layer = net.network.blocks[1].attn.qkv
    with torch.no_grad():
        layer.lora_B.default.weight.normal_()
    change = 6 / 2 * layer.lora_B.default.weight @ layer.lora_A.default.weight
    merged = tuning.folded().network.blocks[1].attn.qkv
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged.weight, before + change, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.base_layer.weight, before)


# ---- modes, types, compilation ----


@pytest.mark.parametrize("rule", RULES)
def test_dropout_of_a_frozen_network_never_acts(rule):
    torch.manual_seed(0)
    tuning = tuned(rule, proj_drop_rate=0.5, drop_path_rate=0.3, pos_drop_rate=0.2)
    for _ in range(2):
        tuning.train()
        assert torch.equal(tuning(images()), tuning(images())) == (rule != "full")
        tuning.eval()
        assert torch.equal(tuning(images()), tuning(images()))


@pytest.mark.parametrize("rule", [PromptTuning(spiking, dropout=0.5), LoRA(rank=2, dropout=0.5)])
def test_dropout_of_what_was_added_acts_in_training_alone(rule):
    torch.manual_seed(0)
    tuning = rule.adapt(made())
    with torch.no_grad():
        for name, parameter in tuning.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tuning.train()
    assert not torch.equal(tuning(images()), tuning(images()))
    tuning.eval()
    assert torch.equal(tuning(images()), tuning(images()))


class Modes(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        network = pl_module.network
        block = network.net.network.blocks[0]
        self.seen.append((network.training, block.dropout.training, block.block.training, network.net.training))


def test_lightning_keeps_the_modes_before_and_after_a_validation():
    network = functools.partial(TimmNet, "vit_tiny_patch16_224", 1, None, options={**SIZES, "img_size": 8})
    module = TunedClassifier(network, PromptTuning(spiking, dropout=0.1))
    modes = Modes()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=1,
        val_check_interval=1,
        callbacks=[modes],
        **quiet,
    )
    trainer.fit(module, ImageDataModule(dataset="digits", batch_size=16))
    assert modes.seen == [(True, True, False, False)] * 4


def test_under_autocast_bits_and_their_tokens_are_those_of_float32():
    tuning = tuned("deep")
    bits = tuning.prompts.bits()
    block, seen = tuning.net.network.blocks[1], []
    block.block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 1 : 1 + LENGTH]))
    with torch.autocast("cpu", torch.bfloat16):
        tuning(images())
        assert torch.equal(tuning.prompts.bits(), bits)
    assert torch.equal(seen[0].bool(), bits[1].expand(4, -1, -1))


@pytest.mark.parametrize(
    ("depth", "prompts"),
    [
        ("deep", spiking),
        ("last", spiking),
        ("deep", functools.partial(spiking, sigma=0.1, time_mode="across_iterations", levels=3)),
    ],
)
def test_it_compiles_once_for_all_steps(depth, prompts):
    tuning = PromptTuning(prompts, **DEPTHS[depth][0]).adapt(made())
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(tuning, backend="aot_eager", fullgraph=True)
    optimizer = torch.optim.Adam([p for p in tuning.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        expected = copy.deepcopy(tuning)(images())
        logits = compiled(images())
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        optimizer.zero_grad()
        logits.square().sum().backward()
        optimizer.step()
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


# ---- what is no such network ----


@pytest.mark.parametrize("name", ["resnet10t", "mixer_s16_224", "eva02_tiny_patch14_224"])
def test_prompts_for_another_kind_of_network_are_one_line(name):
    with pytest.raises(UserError, match="network: expected a vision transformer of timm with blocks in a row"):
        PromptTuning(spiking).adapt(TimmNet(name, 3, 5))


@pytest.mark.parametrize("rule", [LinearProbe(), FullTuning(), BitFit()])
def test_rules_without_prompts_take_any_network_of_timm(rule):
    tuning = rule.adapt(TimmNet("resnet10t", 3, 5))
    assert tuning(torch.rand(2, 3, 32, 32)).shape == (2, 5)
    if tuning.stores:
        assert torch.equal(tuning.suffix(tuning.prefix(images())), tuning(images()))


def test_the_scale_of_fresh_prompts_drops_out_where_blocks_begin_with_a_norm():
    """Norms divide tokens by their size, and what a block makes of a prompt, scale and all, the next one replaces."""
    logits = {}
    for depth in ("deep", "shallow"):
        for scale in (1.0, 5.0):
            torch.manual_seed(2)
            network = PromptTuning(functools.partial(spiking, scale=scale), depth=depth).adapt(made()).double().eval()
            logits[depth, scale] = network(images().double())
    assert torch.allclose(logits["deep", 1.0], logits["deep", 5.0], atol=1e-4)
    assert not torch.allclose(logits["shallow", 1.0], logits["shallow", 5.0], atol=1e-2)
