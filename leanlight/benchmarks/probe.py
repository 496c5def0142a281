"""Measures, inside a real run, how much time passes outside the training step.

After every step of the Trainer the probe repeats the same step in plain PyTorch: a copy of the network, an optimiser of
its own, the same batch. So both are measured a few milliseconds apart in one process, and a noisy machine disturbs both
alike. Both must end with the same weights, bit for bit, which shows that they did the same work.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from leanlight.benchmarks.core import synchronize
from leanlight.contracts import atomic_write

_STEP_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class BareStep(Protocol):
    """A training step without Lightning. network: what it trains."""

    network: torch.nn.Module

    def __call__(self, batch: Any) -> None:
        """One step on a batch that is on the device and ready for the network."""


class StepProbe(Callback):
    """Writes the times of every step to a JSON file when training ends.

    Steps at the beginning of an epoch and the first `warmup` are left out. The file has, in seconds and by step:
    ``cycle``: from the end of one probe to the beginning of the next, all of Lightning, data, callbacks included;
    ``outside``: the part of it before the step begins: callbacks and logs of the last step, data, checkpoints;
    ``bare``: the same step in plain PyTorch; ``hooks``: the step hooks of each callback, by class. Further
    ``checkpoints``: seconds of each checkpoint; ``equal``: whether both ended with the same weights.

    Put it first in the list of callbacks.

    Args:
        output: the file.
        bare_step: ``module:function`` that makes a `BareStep` from the LightningModule.
        warmup: steps at the beginning that do not count.
    """

    def __init__(self, output: Path, bare_step: str, warmup: int = 10) -> None:
        self.output, self.bare_step, self.warmup = Path(output), bare_step, warmup
        self.cycle: list[float] = []
        self.outside: list[float] = []
        self.bare: list[float] = []
        self.hooks: dict[str, list[float]] = {}
        self._running: dict[str, float] = {}
        self.checkpoints: list[float] = []
        self._steps = 0
        self._new_epoch = True

    @property
    def _counts(self) -> bool:
        return self._steps >= self.warmup and not self._new_epoch

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback is not self:
                self._time_hooks(callback)
        save = trainer.save_checkpoint

        def timed_save(*args: Any, **kwargs: Any) -> None:
            begin = time.perf_counter()
            save(*args, **kwargs)
            self.checkpoints.append(time.perf_counter() - begin)

        trainer.save_checkpoint = timed_save  # type: ignore[method-assign]

    def _time_hooks(self, callback: Callback) -> None:
        for name in _STEP_HOOKS:
            if getattr(type(callback), name) is not getattr(Callback, name):
                setattr(callback, name, self._timed(getattr(callback, name), type(callback).__name__))

    def _timed(self, hook: Callable[..., Any], owner: str) -> Callable[..., Any]:
        self.hooks[owner], self._running[owner] = [], 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = hook(*args, **kwargs)
            self._running[owner] += time.perf_counter() - begin
            return result

        return timed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, function = self.bare_step.split(":")
        self.twin: BareStep = getattr(import_module(module), function)(pl_module)
        self._resumed_at = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._new_epoch = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        synchronize()
        self._outside = time.perf_counter() - self._resumed_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        synchronize()
        begin = time.perf_counter()
        cycle = begin - self._resumed_at
        self.twin(batch)
        synchronize()
        end = time.perf_counter()
        if self._counts:
            self.cycle.append(cycle)
            self.outside.append(self._outside)
            self.bare.append(end - begin)
            for owner, seconds in self._running.items():
                self.hooks[owner].append(seconds)
        self._running = dict.fromkeys(self._running, 0.0)
        self._steps += 1
        self._new_epoch = False
        self._resumed_at = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pairs = zip(pl_module.parameters(), self.twin.network.parameters(), strict=True)
        times = {
            "cycle": self.cycle,
            "outside": self.outside,
            "bare": self.bare,
            "hooks": self.hooks,
            "checkpoints": self.checkpoints,
            "equal": all(torch.equal(ours, bare) for ours, bare in pairs),
        }
        atomic_write(self.output, json.dumps(times))
