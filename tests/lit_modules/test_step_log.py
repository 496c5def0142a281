"""Logging of training steps: what is written, and what it costs."""

import csv
import functools
import os
import socket

import lightning.pytorch as pl
import pytest
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader
from waits import Waits

from callbacks import ExactResume
from datamodules import ImageDataModule
from leanlight.loggers import RunCSVLogger
from lit_modules.classifier import ImageClassifier
from lit_modules.esvae import VAE, ImageAutoencoder
from lit_modules.nn import MLP
from lit_modules.step_log import log_step

QUIET = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)


class Module(pl.LightningModule):
    """Logs a loss, a number and an integer every step, by `log`."""

    def __init__(self, log):
        super().__init__()
        self.layer, self.log_values, self.waits = torch.nn.Linear(2, 1), log, []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).square().mean()
        values = {"train/loss": loss, "train/epsilon": 0.1 * batch_idx, "train/count": batch_idx}
        with Waits() as seen:
            self.log_values(self, values, len(batch))
        self.waits.append(seen.calls["tensor"])
        return loss


def plainly(module, values, batch_size):
    module.log_dict(values, on_step=True, on_epoch=False, batch_size=batch_size)


def fit(folder, log):
    """Module and trainer after two epochs of seven batches, and the rows of metrics.csv."""
    pl.seed_everything(0, verbose=False)
    module = Module(log)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=2, log_every_n_steps=3, logger=RunCSVLogger(folder), **QUIET)
    trainer.fit(module, DataLoader(torch.rand(14, 2), batch_size=2))
    with open(folder / "metrics.csv", newline="") as file:
        return module, trainer, list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_same_is_written_as_by_lightning_without_a_copy_to_the_device(tmp_path):
    ours, trainer, rows = fit(tmp_path / "ours", log_step)
    lightnings, other, expected = fit(tmp_path / "lightnings", plainly)
    assert rows == expected
    assert len(rows) == 14 // 3
    assert rows[0]["train/epsilon"] == "0.20000000298023224"
    assert {k: v.item() for k, v in trainer.callback_metrics.items()} == {
        k: v.item() for k, v in other.callback_metrics.items()
    }
    assert set(ours.waits) == {0}
    assert set(lightnings.waits) == {2}  # so the counter sees what it should


# ---- two processes ----

STEPS, EVERY = 8, 3
WRITTEN = [2, 5, 7]  # every third step, and the last of the epoch


class Collectives(pl.Callback):
    """Counts collectives of torch.distributed in each training step, and keeps this process' own losses."""

    def __init__(self):
        self.calls, self.own, self.in_step, self.asked = [], [], False, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls.append(0)
        self.in_step = True  # between steps Lightning asks whether a process is to stop

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.own.append(outputs["loss"].item())
        self.in_step = False

    def count(self, function):
        @functools.wraps(function)
        def counted(*args, **kwargs):
            if self.in_step:
                self.calls[-1] += 1
            else:
                self.asked += function.__name__ == "broadcast"
            return function(*args, **kwargs)

        return counted


class Kept(pl.loggers.logger.DummyLogger):
    """Keeps the written values by step."""

    def __init__(self):
        super().__init__()
        self.rows = {}

    def log_metrics(self, metrics, step=None):
        if "train/loss" in metrics:
            self.rows[step] = metrics["train/loss"]


def classifier():
    return ImageClassifier(functools.partial(MLP, in_channels=1, hidden=(4,), image_size=8))


def autoencoder():
    network = functools.partial(VAE, image_size=8, channels=(4, 8), latent_size=6)
    return ImageAutoencoder(network, generated=2, probe=False)


def work(rank, folder, port, make):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2", "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
    pl.seed_everything(0, verbose=False)
    seen, kept = Collectives(), Kept()
    data = ImageDataModule(dataset="digits", batch_size=16)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        limit_train_batches=STEPS,
        limit_val_batches=0,
        log_every_n_steps=EVERY,
        logger=kept,
        default_root_dir=folder,
        callbacks=[seen, ExactResume()],
        **{**QUIET, "enable_checkpointing": True},
    )
    for name in ("all_reduce", "barrier", "broadcast", "all_gather", "all_gather_object", "reduce"):
        setattr(torch.distributed, name, seen.count(getattr(torch.distributed, name)))
    trainer.fit(make(), datamodule=data)
    last = trainer.callback_metrics["train/loss"].item()
    torch.save((seen.calls, seen.own, kept.rows, last, seen.asked), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("make", [classifier, autoencoder])
def test_two_processes_exchange_in_written_steps_alone_and_write_their_mean(tmp_path, make):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(str(tmp_path), port, make), nprocs=2)
    (calls, own, rows, last, asked), (_, other, _, other_last, _) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)
    )
    assert [step for step, count in enumerate(calls) if count] == WRITTEN
    assert len(set(calls)) == 2  # one number in steps with an exchange, none in the others
    assert asked == len(WRITTEN)  # whether a process is to stop, in every third batch
    means = [(a + b) / 2 for a, b in zip(own, other, strict=True)]
    assert list(rows) == WRITTEN[:2]
    for step, value in rows.items():
        assert value == pytest.approx(means[step], rel=1e-6)
        assert value != own[step]
    assert last == other_last == pytest.approx(means[-1], rel=1e-6)
