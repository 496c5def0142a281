"""What each rule of tuning trains, and that it trains nothing else."""

import functools

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.nn import TimmNet
from lit_modules.optim import parameter_groups
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

timm = pytest.importorskip("timm", reason="needs the extra vision")

D, BLOCKS, CLASSES, L = 32, 4, 5, 3
HEAD = D * CLASSES + CLASSES
BIASES = BLOCKS * (3 * D + D + 4 * D + D + 2 * D) + 2 * D  # qkv, proj, both of the MLP, both norms; patches, last norm
BLOCK = 12 * D * D + 13 * D
CHANNELS = BLOCKS * 11 * D + 2 * D  # behind qkv, proj, both of the MLP and both norms; patches, last norm
spiking = functools.partial(SpikingPrompts, length=L)
RULES = {
    "linear": (LinearProbe(), 0),
    "bitfit": (BitFit(), BIASES),
    "lora": (LoRA(rank=2), BLOCKS * 2 * (D + 3 * D)),
    "lora of two layers": (LoRA(rank=2, targets=("qkv", "fc1")), BLOCKS * 2 * (D + 3 * D + D + 4 * D)),
    "last block": (PartialTuning(), BLOCK + 2 * D),
    "last two blocks": (PartialTuning(2), 2 * BLOCK + 2 * D),
    "adapter": (Adapter(bottleneck=6), BLOCKS * (D * 6 + 6 + 6 * D + D)),
    "ssf": (SSF(), 2 * CHANNELS),
    "deep": (PromptTuning(spiking), BLOCKS * L * D),
    "shallow": (PromptTuning(spiking, "shallow"), L * D),
    "first": (PromptTuning(spiking, "first", 2), 2 * L * D),
    "last": (PromptTuning(spiking, "last", 3), 3 * L * D),
    "dense": (PromptTuning(functools.partial(DensePrompts, length=L)), BLOCKS * L * D),
    "random bits": (PromptTuning(functools.partial(RandomBits, length=L)), 0),
    "learned scales": (PromptTuning(functools.partial(spiking, scale_mode="learned_by_layer")), BLOCKS * (L * D + 1)),
}
OPTIONS = {"img_size": 16, "patch_size": 4, "embed_dim": D, "depth": BLOCKS, "num_heads": 2}
images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def made(classes=CLASSES, name="vit_tiny_patch16_224"):
    torch.manual_seed(0)
    return TimmNet(name, 3, classes, options=OPTIONS)


def steps(network, lr=0.01, n=3):
    """Real steps with everything an optimiser might do to a parameter that it holds."""
    network.train()
    optimizer = torch.optim.AdamW(parameter_groups(network, {"prompts": {"lr": 0.1}}), lr=lr, weight_decay=0.1)
    for _ in range(n):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("classes", [CLASSES, None])
def test_so_many_numbers_train_as_the_formula_says(rule, classes):
    tuning, added = RULES[rule]
    network = tuning.adapt(made(classes))
    network.follow_classes(CLASSES)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == added + HEAD
    groups = parameter_groups(network, {"prompts": {"lr": 0.1}})
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in trained}


@pytest.mark.parametrize("rule", RULES)
def test_what_trains_changes_and_all_else_stays_to_the_bit(rule):
    net = made()
    before = {name: (value, value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    network = RULES[rule][0].adapt(net)
    added = {name: value.detach().clone() for name, value in network.named_parameters() if value.requires_grad}
    steps(network)
    trained = {"network.head.weight", "network.head.bias"}
    if rule == "bitfit":
        trained |= {name for name in before if name.endswith("bias")}
    for block in {"last block": (3,), "last two blocks": (2, 3)}.get(rule, ()):
        own = (f"network.blocks.{block}.", "network.norm.")
        trained |= {name for name in before if name.startswith(own)}
    for name, (value, old) in before.items():
        assert torch.equal(value, old) == (name not in trained), name
        assert (value.grad is None) == (name not in trained), name
    for name, value in network.named_parameters():
        if name in added:
            assert not torch.equal(value, added[name]), name


def test_a_full_tuning_trains_every_parameter():
    net = made()
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    network = FullTuning().adapt(net)
    assert all(parameter.requires_grad for parameter in network.parameters())
    steps(network)
    changed = [name for name, value in net.named_parameters() if not torch.equal(value, before[name])]
    assert changed == list(before)


def test_both_last_layers_of_a_distilled_network_train():
    network = LinearProbe().adapt(made(name="deit_tiny_distilled_patch16_224"))
    trained = {name for name, parameter in network.net.network.named_parameters() if parameter.requires_grad}
    assert trained == {f"{head}.{kind}" for head in ("head", "head_dist") for kind in ("weight", "bias")}


def test_prompts_are_a_group_of_their_own_with_their_rate():
    network = PromptTuning(spiking).adapt(made())
    prompts, rest = steps(network).param_groups
    assert prompts["lr"] == 0.1
    assert [id(p) for p in prompts["params"]] == [id(network.prompts.latents)]
    assert rest["lr"] == 0.01
    assert sum(p.numel() for p in rest["params"]) == HEAD


@pytest.mark.parametrize("latent", [-0.45, 0.1, 0.6, 1.45])
def test_every_latent_between_the_thresholds_learns_from_the_loss(latent):
    network = PromptTuning(spiking).adapt(made())
    with torch.no_grad():
        network.prompts.latents.fill_(latent)
        network.prompts.latents.add_(0.04 * torch.rand_like(network.prompts.latents))
    network(images)[:, 0].sum().backward()
    assert (network.prompts.latents.grad != 0).all()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: PromptTuning(depth="deeper"), "depth: expected one of deep, shallow, first, last, got 'deeper'"),
        (lambda: PromptTuning(depth="last"), "blocks: expected a number with depth first or last alone, got None"),
        (lambda: PromptTuning(blocks=2), "blocks: expected a number with depth first or last alone, got 2"),
        (lambda: PromptTuning(depth="first", blocks=0), "blocks: expected an integer of at least 1, got 0"),
        (lambda: PromptTuning(depth="last", blocks=5).adapt(made()), "blocks: expected at most the 4 of the network"),
        (lambda: PromptTuning(dropout=1.0), r"dropout: expected a number in \[0, 1\), got 1.0"),
        (lambda: PartialTuning(0), "blocks: expected an integer of at least 1, got 0"),
        (lambda: PartialTuning(5).adapt(made()), "blocks: expected at most the 4 of the network, got 5"),
        (lambda: Adapter(0), "bottleneck: expected an integer of at least 1, got 0"),
        (lambda: LoRA(rank=0), "rank: expected an integer of at least 1, got 0"),
        (lambda: LoRA(dropout=-0.1), r"dropout: expected a number in \[0, 1\), got -0.1"),
        (lambda: LoRA(targets=("query",)).adapt(made()), "targets: expected names of linear layers .*, got query"),
        (lambda: LoRA(targets=("norm1",)).adapt(made()), "targets: expected names of linear layers .*, got norm1"),
        (lambda: TunedClassifier(torch.nn.Identity), "network: expected a lit_modules.nn.TimmNet, got a Identity"),
    ],
)
def test_bad_input_is_one_line(make, line):
    with pytest.raises(UserError, match=line) as error:
        make()
    assert "\n" not in str(error.value)
