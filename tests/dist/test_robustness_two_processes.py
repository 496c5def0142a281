"""Corrupted images are the same, and counted once, on one process and on two."""

import json
import re
import subprocess
import sys
from pathlib import Path

from short_fit import run

from leanlight.registry import METHODS


def under_noise(folder, *arguments):
    """Metrics of a test of the run in `folder`."""
    command = [sys.executable, "-m", "leanlight", "test", "--from", "runs/classifier/digits/a", *arguments]
    command += ["--run.wandb=disabled", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    command += ["--robustness.corruptions=[gaussian,shot,impulse,speckle]", "--robustness.severities=[2,5]"]
    command += ["--robustness.scale=imagenet_c"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (place,) = re.findall(r"^run: (.+)$", done.stdout, re.M)
    return json.loads((Path(place) / "summary.json").read_text())["metrics"]


def test_two_processes_count_what_one_does(tmp_path):
    folder = tmp_path / "run"
    run(folder, "--config", METHODS["classifier"].smallest, "--trainer.max_epochs=1")
    one = under_noise(folder, "--data.init_args.eval_batch_size=70")
    two = under_noise(folder, "--config=trainer/ddp", "--trainer.devices=2")
    names = {f"test/{kind}_{s}" for kind in ("gaussian", "shot", "impulse", "speckle") for s in (2, 5)}
    names |= {"test/noisy_accuracy", "test/drop", "test/retention"}
    assert names <= one.keys()
    assert {name: two[name] for name in names} == {name: one[name] for name in names}
    assert one["test/drop"] > 0.01
