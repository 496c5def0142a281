"""LightningModules and DataModules that know nothing of the suite, and fits without an optimiser."""

import csv
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from leanlight.__main__ import main

PLAIN = '''
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

class Regression(pl.LightningModule):
    """Least squares, nothing of the suite."""
    def __init__(self, lr: float = 0.1):
        super().__init__()
        self.layer, self.lr = torch.nn.Linear(3, 1), lr
    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch[0]) - batch[1]).square().mean()
        self.log("train/loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

class Points(pl.LightningDataModule):
    """Forty points of a plane."""
    def train_dataloader(self):
        x = torch.arange(120.0).view(40, 3) / 120
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
'''
COLLECT = '''
import time
import torch
from leanlight.contracts import PrimaryMetric, Progress
import lightning.pytorch as pl

class Means(pl.LightningModule):
    """Mean image of each class, collected; predicts the nearest."""
    automatic_optimization = False
    def __init__(self, pause: float = 0.0):
        super().__init__()
        self.pause = pause
        self.register_buffer("sums", torch.zeros(10, 64))
        self.register_buffer("counts", torch.zeros(10))
        self.register_buffer("seen", torch.tensor(0))
    primary_metric = PrimaryMetric("val/accuracy", "max")
    def progress(self):
        return Progress("images", int(self.seen))
    def configure_optimizers(self):
        return None
    def training_step(self, batch, batch_idx):
        time.sleep(self.pause)
        self.sums.index_add_(0, batch.label, batch.image.flatten(1) + 0.01 * torch.rand(len(batch), 64))
        self.counts += torch.bincount(batch.label, minlength=10)
        self.seen += len(batch)
        self.log("train/seen", self.seen.float())
    def forward(self, image):
        return -torch.cdist(image.flatten(1), self.sums / self.counts.clamp(min=1)[:, None])
    def validation_step(self, batch, batch_idx):
        right = (self(batch.image).argmax(1) == batch.label).float().mean()
        self.log("val/accuracy", right, batch_size=len(batch))
    def predict_step(self, batch, batch_idx):
        return {"index": batch.index, "class": self(batch.image).argmax(1)}
'''
OPTIONS = ["--run.wandb=disabled", "--run.id=a", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "plain.py").write_text(PLAIN)
    (tmp_path / "collect.py").write_text(COLLECT)
    (tmp_path / "plain.yaml").write_text(
        "model: {class_path: plain.Regression}\ndata: {class_path: plain.Points}\ntrainer: {max_epochs: 2}\n"
    )
    (tmp_path / "collect.yaml").write_text(
        "model: {class_path: collect.Means}\n"
        "data: {class_path: datamodules.ImageDataModule, init_args: {dataset: digits, batch_size: 16}}\n"
        "trainer: {max_epochs: 2, val_check_interval: 20}\nexact_resume: {every: 64}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(run):
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_module_without_the_suites_members_trains_resumes_and_says_what_it_cannot(leanlight, project):
    done = leanlight("fit", "--config", "plain.yaml", *OPTIONS)
    assert done.returncode == 0, done.stderr[-2000:]
    run = project / "runs" / "regression" / "points" / "a"
    losses = [float(row["train/loss"]) for row in rows(run)]
    assert losses[-1] < losses[0]
    assert rows(run)[-1]["progress/step"] == "10"
    assert json.loads((run / "summary.json").read_text())["status"] == "finished"
    assert not (run / "checkpoints" / "best.ckpt").exists()
    done = leanlight("fit", "--resume", run, "--trust", "plain", "--trainer.max_epochs=3", "--allow-changes")
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(rows(run)) == 15
    done = leanlight("export", run, "--trust", "plain")
    assert done.returncode == 2
    assert "exports nothing" in done.stderr


def test_a_fit_without_an_optimiser_has_checkpoints_a_best_and_resumes_exactly(leanlight, project, tmp_path):
    whole = tmp_path / "whole"
    done = leanlight("fit", "--config", "collect.yaml", "--trainer.default_root_dir=whole", *OPTIONS)
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = whole.glob("*/*/a")
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    accuracies = [float(row["val/accuracy"]) for row in rows(run) if row["val/accuracy"]]
    assert len(accuracies) > 5
    assert best["callbacks"]["BestCheckpoint max val/accuracy"]["best"] == pytest.approx(max(accuracies))
    assert max(accuracies) > 0.8
    command = [
        sys.executable,
        "-m",
        "leanlight",
        "fit",
        "--config",
        "collect.yaml",
        "--trainer.default_root_dir=killed",
    ]
    with subprocess.Popen([*command, *OPTIONS, "--model.init_args.pause=0.02"], stderr=subprocess.DEVNULL) as process:
        killed = tmp_path / "killed" / "means" / "digits" / "a"
        while not (killed / "metrics.csv").is_file() or len(rows(killed)) < 60:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    last = torch.load(killed / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 0
    assert 0 < last["state_dict"]["seen"] < 2 * 1294
    done = leanlight("fit", "--resume", killed, "--trust", "collect", "--model.init_args.pause=0", "--allow-changes")
    assert done.returncode == 0, done.stderr[-2000:]
    ends = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (run, killed)]
    assert all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())
    assert (run / "metrics.csv").read_bytes() == (killed / "metrics.csv").read_bytes()


def test_a_project_with_folders_of_the_same_names_does_not_hide_the_suite(leanlight, tmp_path):
    for name in ("datamodules", "callbacks", "lit_modules"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    (tmp_path / "random.py").write_text("raise RuntimeError('the wrong module')\n")
    program = "import sys; from leanlight.__main__ import main; sys.exit(main(sys.argv[1:]))"
    limits = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    command = [sys.executable, "-P", "-c", program, "fit", "--config", "classifier/digits_small", *limits, *OPTIONS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    pipeline = (
        "dataset: digits\nmethod: classifier\nstages:\n- {name: one, config: classifier/digits_small, overrides: {"
    )
    (tmp_path / "p.yaml").write_text(
        pipeline + "trainer.max_epochs: 1, trainer.limit_train_batches: 1, run.wandb: disabled}}\n"
    )
    command = [sys.executable, "-P", "-c", program, "run", "p.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]


def test_a_true_half_or_double_precision_is_refused_in_one_line(project, capsys):
    for value in ("64-true", "bf16-true", "16-true"):
        assert main(["fit", "--config", "collect.yaml", f"--trainer.precision={value}"]) == 2
        (error,) = [line for line in capsys.readouterr().err.splitlines() if line]
        assert "trainer.precision: expected 32-true, bf16-mixed, 16-mixed" in error
    assert not (project / "runs").exists()
