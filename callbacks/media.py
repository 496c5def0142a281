"""Draw what modules offer as media, into the run folder and to the loggers that show pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.common import writes_files
from callbacks.pictures import render
from callbacks.sending import send_media
from leanlight.contracts import MediaItem, Split, isolated_rng, progress_of
from leanlight.contracts.ranges import NonNegativeInt


class MediaLogger(Callback):
    """Asks the module for its pictures and draws them after validation, test and prediction, and when training ends.

    Files: ``artifacts/media/<split>/<name>.png`` (``.gif`` for animations, ``.csv`` for tables), always the newest. The
    same pictures go to W&B, TensorBoard and MLflow where they are among the loggers. Random states are left as they
    were, and a module without ``media`` alone.

    Args:
        every_n_epochs: draw after the validations of every n-th epoch and of the last; 0 draws none.
        keep_history: also keep every drawing, as ``artifacts/media/<split>/<name>/<progress>.png``.
    """

    def __init__(self, every_n_epochs: NonNegativeInt = 1, keep_history: bool = False) -> None:
        self.every_n_epochs = every_n_epochs
        self.keep_history = keep_history

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and due(trainer, self.every_n_epochs):
            self._draw(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "test")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "test")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "train")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        media = getattr(pl_module, "media", None)
        if media is None:
            return
        with isolated_rng(), torch.no_grad():
            publish(trainer, pl_module, split, media(split), self.keep_history)


def due(trainer: Trainer, every_n_epochs: int) -> bool:
    """Whether to draw after this validation: every n-th epoch, the last one, and whenever it is no part of training."""
    if trainer.state.fn != TrainerFn.FITTING:
        return True
    epoch = trainer.current_epoch + 1
    return every_n_epochs > 0 and (epoch % every_n_epochs == 0 or epoch == trainer.max_epochs)


def publish(
    trainer: Trainer,
    pl_module: LightningModule,
    split: Split,
    items: Mapping[str, MediaItem],
    keep_history: bool = False,
) -> None:
    """Draw pictures into the run folder and send them to the loggers, on rank zero.

    Args:
        trainer: knows the run folder and the loggers.
        pl_module: says in the titles how far training is.
        split: the part of the data they show, and their folder.
        items: pictures by name; the name is that of the file.
        keep_history: also keep a copy under the present progress.
    """
    if not items or not writes_files(trainer):
        return
    folder = Path(trainer.default_root_dir) / "artifacts" / "media" / split
    progress = progress_of(pl_module)
    files = {}
    for name, item in items.items():
        title = f"{name.replace('_', ' ')} ({split}, {progress.unit} {progress.value})"
        files[name] = render(item, folder / name, title)
        if keep_history:
            render(item, folder / name / str(progress.value), title)
    send_media(trainer.loggers, split, items, files, trainer.global_step)
