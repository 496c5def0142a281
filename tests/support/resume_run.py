"""A small training run that uses everything a resume can get wrong."""

import json
import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Accuracy, MeanMetric, MetricCollection

from callbacks import BestCheckpoint, ExactResume, NaNGuard
from leanlight.contracts import PrimaryMetric, Progress

BATCHES = 7


class Loader:
    """Order is a function of the epoch; the position is kept."""

    def __init__(self):
        self.sampler, self.epoch, self.done = self, 0, 0

    def set_epoch(self, epoch):
        if epoch != self.epoch:
            self.epoch, self.done = epoch, 0

    def __len__(self):
        return BATCHES

    def __iter__(self):
        for number in range(self.done % BATCHES, BATCHES):
            self.done = number + 1
            generator = torch.Generator().manual_seed(1000 * self.epoch + number)
            # unequal sizes: a mean over an epoch must weigh them
            yield (
                torch.randn(3 + number % 2, 4, generator=generator),
                torch.randint(0, 3, (3 + number % 2,), generator=generator),
            )

    def state_dict(self):
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state):
        self.epoch, self.done = state["epoch"], state["done"]


class RowLogger(Logger):
    """Rows as JSON lines: the simplest logger that can be cut back."""

    name, version = "rows", ""

    def __init__(self, folder):
        super().__init__()
        self.path = Path(folder) / "rows.jsonl"

    def _lines(self):
        return self.path.read_text().splitlines(keepends=True) if self.path.exists() else []

    def log_hyperparams(self, *args, **kwargs):
        pass

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        with self.path.open("a") as file:
            file.write(json.dumps({"at": step, **metrics}, sort_keys=True) + "\n")

    def position(self):
        return len(self._lines())

    def rewind(self, position):
        self.path.write_text("".join(self._lines()[:position]))


class Module(pl.LightningModule):
    """Dropout, momentum, a plateau schedule, hooks with state, step and epoch values, tensors and metric objects."""

    def __init__(self, manual=False, use_optimizer=True):
        super().__init__()
        self.automatic_optimization = not manual
        self.use_optimizer = use_optimizer
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("batches", torch.tensor(0))
        self.train_metrics = MetricCollection(
            {"acc": Accuracy(task="multiclass", num_classes=3), "acc2": Accuracy(task="multiclass", num_classes=3)},
            prefix="train/",
        )
        self.own_mean = MeanMetric()
        self.val_acc = Accuracy(task="multiclass", num_classes=3)

    def progress(self):
        return Progress("batch", int(self.batches))

    @property
    def primary_metric(self):
        return PrimaryMetric("val/loss", "min")

    def media(self, split):
        return {}

    def export(self, directory):
        return []

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.net.parameters(), lr=0.3, momentum=0.9)
        if not self.automatic_optimization:
            return optimizer
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.7, patience=0, threshold=10.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "train/loss_epoch"}}

    def on_train_start(self):
        if self.trainer.world_size > 1:
            torch.manual_seed(self.global_rank)  # happens again on resume and must not matter then

    def on_train_epoch_start(self):
        self.log("train/epoch_draw", torch.rand(()), on_epoch=True)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        noisy = images + 0.1 * torch.randn_like(images)
        logits = self.net(noisy)
        loss = nn.functional.cross_entropy(logits, labels)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        self.log("train/largest", loss.detach(), on_step=False, on_epoch=True, reduce_fx=max)
        if batch_idx % 3 == 0:
            self.log("train/sometimes", loss.detach() * 2, on_step=True, on_epoch=False)
        self.train_metrics.update(logits, labels)
        self.log_dict(self.train_metrics, on_epoch=True, on_step=False)
        self.own_mean(loss.detach())
        self.batches += 1
        if self.automatic_optimization:
            return loss
        if self.use_optimizer:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        else:  # an update that Lightning's counter does not see
            gradients = torch.autograd.grad(loss, list(self.net.parameters()))
            with torch.no_grad():
                for weight, gradient in zip(self.net.parameters(), gradients, strict=True):
                    weight -= 0.1 * gradient
        return None

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.average.mul_(0.9).add_(batch[0].mean(0) + 0.01 * torch.rand(4))

    def on_train_epoch_end(self):
        self.log("train/own", self.own_mean.compute())
        self.own_mean.reset()

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        logits = self.net(images + 0.1 * torch.randn_like(images))
        self.val_acc(logits, labels)
        self.log("val/acc", self.val_acc)
        self.log("val/loss", nn.functional.cross_entropy(logits, labels))


def val_loader():
    generator = torch.Generator().manual_seed(5)
    batches = [
        (torch.randn(4, 4, generator=generator), torch.randint(0, 3, (4,), generator=generator)) for _ in range(3)
    ]
    return DataLoader(batches, batch_size=None)


class DieAt(pl.Callback):
    """Kill this process without warning at the `count`-th call of `hook`; ``fsync`` is the middle of a checkpoint."""

    def __init__(self, hook, count, number=signal.SIGKILL):
        self.left, self.number = count, number
        if hook == "fsync":
            self.fsync, os.fsync = os.fsync, self.strike
        else:
            setattr(self, hook, self.strike)

    def strike(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
        elif hasattr(self, "fsync"):
            self.fsync(*args)


def build(folder, manual=False, use_optimizer=True, every=1, die=None, extra=(), **trainer):
    """Module, trainer and loaders of a run in `folder`."""
    pl.seed_everything(11)
    module = Module(manual, use_optimizer)
    best = BestCheckpoint("val/loss", "min")
    settings = {"max_epochs": 3, "log_every_n_steps": 1, "num_sanity_val_steps": 1} | trainer
    return module, pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=RowLogger(folder),
        callbacks=[best, NaNGuard(), *extra, *([DieAt(*die)] if die else []), ExactResume(every)],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def run(folder, checkpoint=None, **options):
    """Train; return the final state and the logged rows."""
    module, trainer = build(folder, **options)
    trainer.fit(module, Loader(), val_loader(), ckpt_path=checkpoint)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return state, (Path(folder) / "rows.jsonl").read_text().splitlines(), trainer
