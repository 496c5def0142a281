"""What a run says of itself: one block before it begins, one list when it has ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import FSDPStrategy

from leanlight.units import show_value, units_of

_SPLITS = ("val/", "test/", "predict/")


class Opening(pl.Callback):
    """Prints the block as soon as data and model are ready.

    Args:
        title: what runs, e.g. the config's name.
        run_dir: the run folder.
    """

    def __init__(self, title: str, run_dir: Path) -> None:
        self.title, self.run_dir = title, run_dir
        self._said = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._say(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._say(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._say(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._say(trainer, pl_module)

    def _say(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._said or not trainer.is_global_zero:
            return
        self._said = True
        facts = {
            "model": type(pl_module).__name__,
            "data": describe_data(getattr(trainer, "datamodule", None)),
            "device": _device(trainer),
            "size": _size(pl_module) + (" on this process" if isinstance(trainer.strategy, FSDPStrategy) else ""),
            "length": _length(trainer),
            "W&B": _wandb(trainer),
            "folder": str(self.run_dir),
        }
        lines = [self.title, *(f"  {name:<7} {fact}" for name, fact in facts.items() if fact)]
        print("\n".join(lines), flush=True)


def describe_data(data: Any) -> str:
    """Name of a data set, items of its splits and where it comes from."""
    meta = getattr(data, "meta", None)
    if meta is None:
        return type(data).__name__ if data is not None else ""
    counts = ", ".join(f"{split} {count:,}" for split, count in meta.counts.items())
    return f"{meta.name}{f': {counts}' if counts else ''} ({meta.source})"


def _device(trainer: pl.Trainer) -> str:
    device = trainer.strategy.root_device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{f'{trainer.world_size} x ' if trainer.world_size > 1 else ''}{kind}, {trainer.precision}"


def _size(module: pl.LightningModule) -> str:
    weights = [w for w in module.parameters() if not isinstance(w, torch.nn.parameter.UninitializedParameter)]
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    total = sum(weight.numel() for weight in weights)
    return f"{total:,} parameters" + (f", {trained:,} of them trained" if trained != total else "")


def _length(trainer: pl.Trainer) -> str:
    if trainer.state.fn != "fit":
        return ""
    limits = {"epochs": trainer.max_epochs, "steps": trainer.max_steps}
    return ", ".join(f"{limit:,} {unit}" for unit, limit in limits.items() if limit and limit > 0)


def _wandb(trainer: pl.Trainer) -> str:
    logger = next((logger for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
    if logger is None:
        return ""
    return "offline" if logger._offline else str(logger.experiment.url)


def closing(metrics: Mapping[str, float], method: str, run_dir: Path) -> str:
    """The measured values of a run, one a line, numbers under one another by their points, and its folder."""
    units = units_of(method, dataset=run_dir.parent.name)
    shown = {
        k: show_value(k, v, units) for k, v in sorted(metrics.items()) if k.startswith(_SPLITS) and k.count("/") == 1
    }
    names = max(map(len, shown), default=0)
    before = max((len(number.partition(".")[0]) for number, _ in shown.values()), default=0)
    after = max((len(number) - len(number.partition(".")[0]) for number, _ in shown.values()), default=0)
    lines = []
    for name, (number, unit) in shown.items():
        whole, point, rest = number.partition(".")
        lines.append(f"{name:<{names}}  {whole:>{before}}{point + rest:<{after}} {unit}".rstrip())
    return "\n".join([*lines, f"run: {run_dir}"])
