"""Short runs through the real command line, in a process of their own, for tests that compare them."""

import json
import subprocess
import sys

import torch

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
