"""One set-up of optimisers and schedules, in short trainings of a linear layer."""

import functools

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from leanlight.contracts import UserError
from lit_modules import optim

SGD = functools.partial(torch.optim.SGD, lr=1.0)


class Module(pl.LightningModule):
    """Its validation loss never improves."""

    def __init__(self, scheduler=None, interval="epoch"):
        super().__init__()
        self.layer, self.options, self.rates = torch.nn.Linear(2, 1), (scheduler, interval), []

    def configure_optimizers(self):
        return optim.configure(self.layer.parameters(), SGD, *self.options)

    def training_step(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return 0 * self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 1.0)


def rates(tmp_path, **options):
    """Learning rate of each of 6 steps in 3 epochs."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(
        max_epochs=3, default_root_dir=tmp_path, accelerator="cpu", num_sanity_val_steps=0, log_every_n_steps=1, **quiet
    )
    module, loader = Module(**options), DataLoader(torch.ones(4, 2), batch_size=2)
    trainer.fit(module, loader, loader)
    return module.rates


def test_an_optimizer_alone_keeps_its_rate(tmp_path):
    assert rates(tmp_path) == [1.0] * 6


def test_a_schedule_follows_epochs_or_steps(tmp_path):
    half = functools.partial(ExponentialLR, gamma=0.5)
    assert rates(tmp_path, scheduler=half) == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert rates(tmp_path, scheduler=half, interval="step") == [0.5**i for i in range(6)]


def test_a_schedule_on_a_plateau_watches_its_metric(tmp_path):
    plateau = functools.partial(ReduceLROnPlateau, monitor="val/loss", factor=0.1, patience=0)
    assert rates(tmp_path, scheduler=plateau) == pytest.approx([1, 1, 1, 1, 0.1, 0.1])


def test_a_plateau_of_no_metric_is_refused(tmp_path):
    with pytest.raises(UserError, match="lr_scheduler: expected lightning"):
        rates(tmp_path, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)


def test_groups_of_parameters_reach_the_optimizer():
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]}, {"params": [torch.nn.Parameter(torch.ones(1))], "lr": 3}]
    assert [group["lr"] for group in optim.configure(groups, SGD).param_groups] == [1.0, 3]
