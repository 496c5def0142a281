import lightning.pytorch as pl
import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn
from torch.utils.data import DataLoader

from callbacks import ExactResume, SpikeStatistics

BATCHES = [torch.tensor([[0.4, 1.2], [2.0, 0.0]]), torch.tensor([[0.6, 0.6]])]


class Spiking(pl.LightningModule):
    """Two neurons see the input at 4 steps; integrate-and-fire with threshold 1 makes the count plain arithmetic."""

    def __init__(self):
        super().__init__()
        self.first = neuron.IFNode(step_mode="m", v_reset=None)
        self.second = neuron.IFNode(step_mode="s")
        self.readout = neuron.NonSpikingIFNode() if hasattr(neuron, "NonSpikingIFNode") else nn.Identity()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        functional.reset_net(self)
        spikes = self.first((self.weight * x).expand(4, *x.shape))
        return torch.stack([self.second(2 * step) for step in spikes])

    def training_step(self, batch, batch_idx):
        self.hooks_in_training = len(self.first._forward_hooks)
        return self(batch).sum() * self.weight

    def validation_step(self, batch, batch_idx):
        self(batch)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def spikes_by_hand():
    """Spikes at each of the first neurons; each makes the second, which gets 2, fire too."""
    total = 0
    for value in torch.cat(BATCHES).flatten().tolist():
        potential = 0.0
        for _ in range(4):
            potential += value
            if potential >= 1.0 - 1e-6:
                total, potential = total + 1, potential - 1.0
    return total


def trainer(folder):
    return pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        callbacks=[SpikeStatistics(), ExactResume()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.parametrize("split", ["val", "test"])
def test_rates_equal_a_count_by_hand(tmp_path, split):
    run = {"val": trainer(tmp_path).validate, "test": trainer(tmp_path).test}[split]
    module = Spiking()
    (logged,) = run(module, DataLoader(BATCHES, batch_size=None), verbose=False)
    rate = spikes_by_hand() / (4 * 6)
    assert 0.2 < rate < 0.9
    assert logged == pytest.approx(
        {f"{split}/firing_rate": rate, f"{split}/firing_rate/first": rate, f"{split}/firing_rate/second": rate}
    )
    assert (tmp_path / "artifacts" / "media" / split / "firing_rate.png").stat().st_size > 0
    assert not module.first._forward_hooks


def test_training_runs_without_hooks(tmp_path):
    loader = DataLoader(BATCHES, batch_size=None)
    module = Spiking()
    trainer(tmp_path).fit(module, loader, loader)
    assert module.hooks_in_training == 0


def test_network_without_spikes_logs_nothing(tmp_path):
    class Plain(pl.LightningModule):
        def test_step(self, batch, batch_idx):
            pass

    assert trainer(tmp_path).test(Plain(), DataLoader(BATCHES, batch_size=None), verbose=False) == [{}]
