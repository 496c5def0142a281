"""Lightning on the device: an accelerator, a strategy for one device, and what each training step asked of it."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from mock_gpu import neurons
from mock_gpu.counts import COUNTS, Counts
from mock_gpu.tensors import DEVICE, NAME, register

#: Options of a run on the device. Lightning's automatic choice of a strategy knows no accelerators but its own.
OPTIONS = [f"--trainer.accelerator={NAME}", f"--trainer.strategy={NAME}", "--trainer.devices=1"]


class MockAccelerator(Accelerator):
    """The device as Lightning wants to have it described."""

    def setup_device(self, device: torch.device) -> None:
        """Nothing is to be done."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        """Nothing is to be done."""

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return 1

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [DEVICE]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


@dataclass
class Steps:
    """What `StepCounts` keeps, and when it presses Ctrl-C; a callback of a config cannot be reached otherwise.

    Args:
        counts: of each step.
        interrupt_at: number of steps, over all epochs, after which Ctrl-C is pressed; 0 for never.
        done: steps so far.
    """

    counts: list[Counts] = field(default_factory=list)
    interrupt_at: int = 0
    done: int = 0


STEPS = Steps()


class StepCounts(Callback):
    """Keeps what each training step asked of the device, from the end of the step before it to its own, in `STEPS`.

    The first step of an epoch and of a run is left out: what the start and a checkpoint ask belongs to no step.
    """

    def __init__(self) -> None:
        self._warm = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._warm = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        taken = COUNTS.take()
        if self._warm:
            STEPS.counts.append(taken)
        self._warm = True
        STEPS.done += 1
        if STEPS.done == STEPS.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)


def install() -> None:
    """Register the device with PyTorch and with Lightning."""
    register()
    neurons.register()
    AcceleratorRegistry.register(NAME, MockAccelerator, description="a GPU for tests", override=True)
    StrategyRegistry.register(NAME, SingleDeviceStrategy, description="one such GPU", override=True, device=DEVICE)
