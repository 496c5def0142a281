"""Start every method by `--config trainer/gpu` alone, on the device that is not there, and print those that ran.

python overlay_run.py FOLDER
"""

from __future__ import annotations

import sys

import smallest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from mock_gpu.tensors import DEVICE, NAME
from mock_gpu.training import install

from leanlight.__main__ import main
from leanlight.registry import METHODS

SHORT = [
    *("--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"),
    *("--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false", "--run.test=none"),
    *("--run.wandb=disabled", "--media.every_n_epochs=0"),
]


def stand_in() -> None:
    """Let Lightning find the device where it would look for a GPU, and choose for it what it chooses for one GPU."""
    install()
    _AcceleratorConnector._choose_gpu_accelerator_backend = staticmethod(lambda: NAME)  # type: ignore[method-assign]
    _AcceleratorConnector._choose_strategy = lambda self: SingleDeviceStrategy(DEVICE)  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    stand_in()
    for name in METHODS:
        words = ["fit", *smallest.words(name), "--config", "trainer/gpu", *SHORT]
        code = main([*words, f"--trainer.default_root_dir={sys.argv[1]}"])
        print(f"started {name}: {code}")
