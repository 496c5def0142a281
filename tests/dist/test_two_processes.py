"""Two gloo processes with half the batch each equal one process with the whole batch."""

import json
import subprocess
import sys

import pytest
import torch

from leanlight.registry import METHODS

PLAIN = ["--trainer.accelerator=cpu", "--run.wandb=disabled", "--run.id=a", "--trainer.enable_progress_bar=false"]
COMMON = [
    "--trainer.max_epochs=2",
    "--data.init_args.drop_last=true",
    # Adaptive optimisers divide by the gradient's size and blow rounding differences up where it is near zero.
    "--model.init_args.optimizer.class_path=torch.optim.SGD",
    "--model.init_args.optimizer.init_args.lr=0.1",
]


def run(folder, *arguments):
    """Last checkpoint and final metrics of a run of its own."""
    folder.mkdir()
    command = [sys.executable, "-m", "leanlight", "fit", *PLAIN, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = folder.glob("runs/*/*/a")
    checkpoint = torch.load(found / "checkpoints" / "last.ckpt", weights_only=True)
    return checkpoint, json.loads((found / "summary.json").read_text())["metrics"]


def fit(folder, *arguments):
    """Weights and final metrics of a run whose batches are split evenly."""
    checkpoint, metrics = run(folder, *COMMON, *arguments)
    return checkpoint["state_dict"], metrics


def test_the_classifier_trains_the_same_on_two_processes(tmp_path):
    config = ["--config", METHODS["classifier"].smallest]
    one, one_metrics = fit(tmp_path / "one", *config, "--data.init_args.batch_size=64", "--trainer.devices=1")
    two, two_metrics = fit(
        tmp_path / "two", *config, "--config=trainer/ddp", "--data.init_args.batch_size=32", "--trainer.devices=2"
    )
    for name, value in one.items():
        torch.testing.assert_close(
            two[name], value, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name in ("val/accuracy", "val/loss", "test/accuracy", "test/loss"):
        assert two_metrics[name] == pytest.approx(one_metrics[name], rel=1e-3, abs=1e-4), name
