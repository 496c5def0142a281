import csv

import lightning.pytorch as pl
import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

from callbacks import EnergyMeter, ExactResume
from callbacks.energy import LayerOps, count_operations

TIME = 3


class TwoLayers(nn.Module):
    """Direct encoding: convolution once or at every step, spikes, then a linear layer on time folded into the batch."""

    def __init__(self, once=True):
        super().__init__()
        self.once = once
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.BatchNorm2d(2)
        self.fire = neuron.LIFNode(step_mode="m")
        self.conv2 = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        self.head = nn.Linear(3 * 2 * 2, 5)

    def forward(self, image):
        functional.reset_net(self)
        if self.once:
            current = self.norm(self.conv(image)).expand(TIME, *(len(image), 2, 4, 4))
        else:
            current = self.norm(self.conv(image.repeat(TIME, 1, 1, 1))).unflatten(0, (TIME, -1))
        self.spikes = self.fire(8 * current.abs())
        features = self.conv2(self.spikes.flatten(0, 1))
        return self.head(features.flatten(1)).unflatten(0, (TIME, -1)).mean(0)


def synapses(spikes):
    """How many weights of conv2 the spikes meet, counted one by one."""
    met = 0
    for row, column in spikes.nonzero()[:, -2:].tolist():
        for out_row in range(2):
            for out_column in range(2):
                inside = abs(2 * out_row - row) <= 1 and abs(2 * out_column - column) <= 1
                met += 3 * inside
    return met


@pytest.fixture
def image():
    torch.manual_seed(0)
    return torch.rand(6, 1, 4, 4) + 0.01


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("repeats", [True, False])
def test_counts_equal_those_made_by_hand(image, once, repeats):
    network = TwoLayers(once).eval()
    layers = {layer.name: layer for layer in count_operations(network, image, first_layer_repeats=repeats)}
    assert network.spikes.sum() > 20, "the test needs spikes"
    times = 1 if once and not repeats else TIME
    assert layers["conv"] == LayerOps("conv", macs=times * 4 * 4 * 2 * 9, acs=0)
    assert layers["conv2"] == LayerOps("conv2", macs=0, acs=synapses(network.spikes) / len(image))
    assert layers["head"] == LayerOps("head", macs=TIME * 12 * 5, acs=0)


def test_linear_layer_adds_once_for_every_spike_and_output():
    spikes = torch.tensor([[1.0, 0, 1, 1], [0, 0, 0, 1]])
    assert count_operations(nn.Linear(4, 7), spikes) == [LayerOps("", macs=0, acs=4 * 7 / 2)]


def test_attention_counts_the_same_as_one_kernel_and_written_out():
    class Attention(nn.Module):
        def forward(self, x):
            return nn.functional.scaled_dot_product_attention(x, x[..., :7, :], x[..., 3:, :])

    tokens = torch.rand(2, 4, 10, 8)  # (N, heads, tokens, width)
    (fused,) = count_operations(Attention(), tokens)
    with sdpa_kernel(SDPBackend.MATH):
        (written_out,) = count_operations(Attention(), tokens)
    assert fused.macs == written_out.macs == 4 * 10 * 7 * (8 + 8)
    assert fused.acs == written_out.acs == 0


def test_energy_is_that_of_45_nm():
    assert LayerOps("x", macs=10, acs=100).energy_pj == pytest.approx(10 * 4.6 + 100 * 0.9)


def test_counts_do_not_depend_on_gradient_mode_or_leave_anything_behind(image):
    network = TwoLayers().eval()
    outside = count_operations(network, image)
    with torch.inference_mode():
        assert count_operations(network, image) == outside
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_two_networks_of_one_class_stay_apart():
    both = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 3)), "b": nn.Sequential(nn.Linear(3, 4))})
    both.forward = lambda x: both["b"](both["a"](x))
    assert [(layer.name, layer.macs) for layer in count_operations(both, torch.randn(5, 2))] == [
        ("a.0", 6),
        ("b.0", 12),
    ]


class Evaluated(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = TwoLayers()

    def test_step(self, batch, batch_idx):
        self.network(batch)


def test_meter_logs_sums_and_writes_a_table_by_layer(tmp_path, image):
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        callbacks=[EnergyMeter(batches=2), ExactResume()],
        enable_progress_bar=False,
    )
    module = Evaluated()
    (logged,) = trainer.test(module, DataLoader([image, image[:2], image + 5], batch_size=None), verbose=False)
    module.network.eval()
    layers = count_operations(module.network, torch.cat([image, image[:2]]))
    with open(tmp_path / "artifacts" / "energy.csv") as file:
        table = {row["layer"]: row for row in csv.DictReader(file)}
    assert {f"network.{layer.name}" for layer in layers} | {"total"} == table.keys()
    for layer in layers:
        assert float(table[f"network.{layer.name}"]["macs"]) == pytest.approx(layer.macs)
        assert float(table[f"network.{layer.name}"]["acs"]) == pytest.approx(layer.acs)
    assert logged["test/macs"] == pytest.approx(sum(layer.macs for layer in layers))
    assert logged["test/acs"] == pytest.approx(sum(layer.acs for layer in layers))
    assert logged["test/energy_pj"] == pytest.approx(float(table["total"]["energy_pj"]), rel=1e-5)
