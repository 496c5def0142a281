"""What LoRA leaves alone and what it changes, against the base and against its own merged weights."""

import copy

import pytest
import torch
from squares import labelled

from leanlight.contracts import UserError
from lit_modules.falcon_eye import FullTuning, LoRATuning, SafetyEncoder

SAMPLES = [labelled(number) for number in range(4)]


@pytest.fixture(scope="module")
def batch(backbone):
    return SafetyEncoder(backbone).encode(SAMPLES, torch.arange(4), targets=True)


@pytest.fixture(scope="module")
def inputs(backbone, batch):
    return SafetyEncoder(backbone).batch_inputs(batch)


def adapted(backbone, dtype=torch.float32, **settings):
    """An adapter whose B is no longer 0, in evaluation mode, and its base as it was."""
    base = copy.deepcopy(backbone.model).to(dtype)
    network = LoRATuning(**{"rank": 4, "alpha": 8, "dropout": 0.0, **settings}).adapt(copy.deepcopy(base)).to(dtype)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return base.eval(), network.eval()


@pytest.mark.parametrize("targets", ["attention", "attention+mlp", "attention+mlp+merger", "attention+mlp+vision"])
def test_before_training_an_adapted_model_is_its_base_bit_for_bit(backbone, inputs, targets):
    expected = backbone.model(**inputs).logits
    network = LoRATuning(targets=targets, dropout=0.0).adapt(copy.deepcopy(backbone.model)).eval()
    assert torch.equal(network(**inputs).logits, expected)


def test_only_low_rank_changes_of_the_language_models_attention_train(backbone):
    network = LoRATuning(rank=3, targets="attention").adapt(copy.deepcopy(backbone.model))
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * 4 * 2  # A and B, four projections, two layers
    assert all("language_model" in name and "self_attn" in name for name in trained)
    hidden, narrow = 64, 32  # keys and values have two heads of 16
    expected = 2 * 3 * (2 * (hidden + hidden) + 2 * (hidden + narrow))
    assert sum(value.numel() for value in trained.values()) == expected


@pytest.mark.parametrize(
    ("targets", "layers"), [("attention+mlp", 14), ("attention+mlp+merger", 16), ("attention+mlp+vision", 26)]
)
def test_wider_targets_reach_further(backbone, targets, layers):
    network = LoRATuning(rank=2, targets=targets).adapt(copy.deepcopy(backbone.model))
    assert sum("lora_A" in name for name, _ in network.named_parameters()) == layers


def test_the_change_of_a_layer_is_alpha_over_rank_times_b_a_x(backbone):
    _, network = adapted(backbone, torch.float64, rank=4, alpha=2)
    layer = network.base_model.model.model.language_model.layers[0].self_attn.q_proj
    x = torch.randn(3, 64, dtype=torch.float64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = x @ layer.base_layer.weight.T + layer.base_layer.bias + 2 / 4 * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_merged_weights_give_the_logits_of_base_and_adapter(backbone, inputs, dtype, tolerance):
    base, network = adapted(backbone, dtype, targets="attention+mlp")
    expected = network(**inputs).logits
    assert (expected - base(**inputs).logits).abs().max() > 0.01
    merged = copy.deepcopy(network).merge_and_unload()
    assert (merged(**inputs).logits - expected).abs().max() < tolerance


def test_steps_leave_the_base_bit_for_bit_and_move_the_adapter(backbone, inputs):
    base, network = adapted(backbone)
    network.train()
    before = {name: value.clone() for name, value in network.named_parameters()}
    optimizer = torch.optim.AdamW([value for value in network.parameters() if value.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        network(**inputs).loss.backward()
        optimizer.step()
    moved = {name for name, value in network.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    originals = dict(base.named_parameters())
    for name, value in network.named_parameters():
        if "lora_" not in name:
            own = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, originals[own]), name


def test_the_vision_tower_may_rest_while_all_else_trains(backbone):
    network = FullTuning(vision=False).adapt(copy.deepcopy(backbone.model))
    trains = {name: value.requires_grad for name, value in network.named_parameters()}
    assert {value for name, value in trains.items() if "visual" in name} == {False}
    assert {value for name, value in trains.items() if "visual" not in name} == {True}
    assert all(value.requires_grad for value in FullTuning().adapt(network).parameters())


def test_the_authors_scale_is_a_thirty_second():
    assert LoRATuning().scale == 1 / 32
    assert LoRATuning(rank=8, alpha=16).scale == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "tuning.rank: expected at least 1, got 0"),
        ({"alpha": 0}, "tuning.alpha: expected at least 1"),
        ({"dropout": 1.0}, "tuning.dropout: expected a share"),
        ({"targets": "all"}, "tuning.targets: expected one of attention, .* got 'all'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, words):
    with pytest.raises(UserError, match=words):
        LoRATuning(**settings)


def test_a_model_without_such_layers_is_named():
    with pytest.raises(UserError, match=r"tuning.targets: expected layers that a Linear has"):
        LoRATuning().adapt(torch.nn.Linear(2, 2))
