"""Q-learning on two processes: games of their own, gradients together, evaluation episodes shared out."""

import json
import subprocess
import sys

import pytest
import torch
from short_fit import run

TINY = [
    "--config=dsqn/catch_small",
    "--trainer.max_epochs=2",
    "--data.init_args.decisions_per_epoch=100",
    "--data.init_args.replay_start=64",
    "--data.init_args.eval_episodes=10",
    "--data.init_args.test_episodes=20",
]
DDP = ["--config=trainer/ddp", "--trainer.devices=2"]


def test_two_processes_learn_from_two_games_and_measure_as_one(tmp_path):
    one, _ = run(tmp_path / "one", *TINY)
    two, metrics = run(tmp_path / "two", *TINY, *DDP)
    assert two["global_step"] == one["global_step"] == 100
    # Rank zero plays the same game until the first update, which the other game's transitions change.
    assert any(not torch.equal(two["state_dict"][name], value) for name, value in one["state_dict"].items())
    (folder,) = (tmp_path / "two").glob("runs/*/*/a")
    assert not (folder / "replay").exists()
    command = [sys.executable, "-m", "leanlight", "test", f"--from={folder}", "--trainer.devices=1"]
    command += ["--trainer.strategy=auto", "--run.wandb=disabled"]
    done = subprocess.run(command, cwd=tmp_path / "two", capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "test" / "summary.json").read_text())["metrics"]
    for name in ("test/score", "test/length", "test/max_q", "test/q_spread"):
        assert metrics[name] == pytest.approx(found[name], rel=1e-5), name
