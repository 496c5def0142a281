"""Run cases on the CPU and on the device that is not there, in one process, and write what came out as JSON.

python device_run.py FOLDER [CASE...]
"""

from __future__ import annotations

import functools
import json
import signal
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import smallest
import torch
from device_cases import cases
from mock_gpu.training import OPTIONS, STEPS, install

from leanlight import runs
from leanlight.cli.train import main
from leanlight.invocation import read_config
from leanlight.predictions import describe_predictions
from leanlight.registry import METHODS

LIMITS = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=5",
    "--trainer.limit_val_batches=2",
    "--trainer.limit_test_batches=2",
    "--trainer.limit_predict_batches=2",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.log_every_n_steps=1000",  # the counted steps log nothing
    "--trainer.enable_progress_bar=false",
    "--run.wandb=disabled",
]
PROCESSOR = ["--trainer.accelerator=cpu", "--trainer.strategy=auto"]
INTERRUPTED_AT = 8  # of 10 steps: inside the second epoch, and while every second client waits for another


class Runs:
    """The runs of some cases, each case in a folder of its own under `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cases = folder, cases()

    def result(self, name: str) -> dict[str, Any]:
        """Everything about a case that a test asserts; an error ends it early."""
        found: dict[str, Any] = {}
        try:
            processor = self.on_cpu(name)
            found["cpu"] = outcome(processor)
            device = self.on_device(name, found)
            found["device"] = outcome(device)
            if name in METHODS:  # variants train by other paths; what follows is the same for them
                main(["validate", "--from", str(device), *LIMITS, "--media.every_n_epochs=0"])
                found["validated"] = outcome(device / "validate")["metrics"]
                found["predictions"] = predictions(device)
        except BaseException:  # of any kind: it goes into the report of this case, and the others run
            found["error"] = traceback.format_exc()
        return found

    def _dir(self, name: str, where: str) -> Path:
        (found,) = self._root(name).glob(f"*/*/{where}")
        return found

    def _root(self, name: str) -> Path:
        return self.folder / name.replace(" ", "_")

    def _words(self, name: str, where: str) -> list[str]:
        case, source = self.cases[name], ""
        if case.source:
            source = str(self.on_cpu(case.source) / "checkpoints" / "last.ckpt")
        words = [word.replace("{source}", source) for word in case.options]
        if name in METHODS:
            words = [*smallest.words(name), *words[1:]]
        root = f"--trainer.default_root_dir={self._root(name)}"
        return [case.command, *words, *LIMITS, root, f"--run.id={where}"]

    def on_cpu(self, name: str) -> Path:
        if not self._root(name).exists():
            main([*self._words(name, "cpu"), *PROCESSOR])
        return self._dir(name, "cpu")

    def on_device(self, name: str, found: dict[str, Any]) -> Path:
        words = [*self._words(name, "device"), *OPTIONS]
        if self.cases[name].command != "fit":
            main(words)
            return self._dir(name, "device")
        STEPS.counts, STEPS.done, STEPS.interrupt_at = [], 0, INTERRUPTED_AT
        try:
            main([*words, "--trainer.callbacks+=mock_gpu.training.StepCounts"])
            found["interrupted"] = False
        except KeyboardInterrupt:
            found["interrupted"] = True
            found["steps"] = [counts.plain() for counts in STEPS.counts]  # the first after a resume is no ordinary one
            main(["fit", "--resume", str(self._dir(name, "device"))])
        return self._dir(name, "device")


def outcome(run: Path) -> dict[str, Any]:
    """Metrics of a run, and the names of what it wrote."""
    summary = runs.read_summary(run) or {}
    return {"metrics": summary["metrics"], "files": sorted(item["path"] for item in summary["artifacts"])}


def predictions(run: Path) -> int | None:
    """How many items a checkpoint predicts on the device; None where the method predicts nothing."""
    package, _, name = read_config(run / "config.yaml")["model"]["class_path"].rpartition(".")
    module = getattr(import_module(package), name)
    if module.predict_step is pl.LightningModule.predict_step:
        return None
    main(["predict", "--from", str(run), *LIMITS])
    return describe_predictions(run / "predict")["items"]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    asked = sys.argv[2:] or list(cases())
    for name in METHODS.keys() & set(asked):
        smallest.words(name)  # what it needs is made by a pipeline, whose processes know nothing of the device
    install()
    runs.code_version = functools.cache(runs.code_version)  # no code changes meanwhile, and hashing it takes long
    folder = Path(sys.argv[1])
    made = Runs(folder / "runs")
    results: dict[str, Any] = {}
    for name in asked:
        results[name] = made.result(name)
        (folder / "results.json").write_text(json.dumps(results))
