"""A federation on two processes equals one process, bit for bit: clients are spread, not their batches."""

import json
import subprocess
import sys

import pytest
import torch

SHORT = [
    "--trainer.max_epochs=3",
    "--trainer.accelerator=cpu",
    "--run.wandb=disabled",
    "--run.id=a",
    "--trainer.enable_progress_bar=false",
]


def fit(folder, *arguments):
    folder.mkdir()
    command = [sys.executable, "-m", "leanlight", "fit", *SHORT, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = folder.glob("runs/*/*/a")
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True), json.loads((run / "summary.json").read_text())


# Eleven candidates do not divide by two; power-of-choice is scored before training; SCAFFOLD has states of clients.
CREDIT = ["--config=sfedca/digits_small", "--trainer.callbacks.init_args.candidates=11"]
OTHERS = [
    "--config=sfedca/digits_small",
    "--trainer.callbacks.init_args.selector=lit_modules.federated.PowerOfChoice",
    "--trainer.callbacks.init_args.participants=5",
    "--model.init_args.objective=lit_modules.federated.Scaffold",
]


@pytest.mark.parametrize("config", [CREDIT, OTHERS], ids=["credit", "power of choice with scaffold"])
def test_a_federation_on_two_processes_equals_one_process(tmp_path, config):
    one, one_summary = fit(tmp_path / "one", *config)
    two, two_summary = fit(tmp_path / "two", *config, "--config=trainer/ddp", "--trainer.devices=2")
    for name, value in one["state_dict"].items():
        assert torch.equal(two["state_dict"][name], value), name
    for name, value in one_summary["metrics"].items():
        if name.startswith("train/"):
            assert two_summary["metrics"][name] == pytest.approx(value, rel=1e-6), name
    for client, control in one["federated"]["client_controls"].items():
        for name, value in control.items():
            assert torch.equal(two["federated"]["client_controls"][client][name], value), (client, name)
