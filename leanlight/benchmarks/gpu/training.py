"""Whole runs of a method's smallest config: the GPU against the CPU, bf16, kill and resume, predictions, waiting."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from safetensors.torch import load_file
from torch import Tensor

from leanlight import runs
from leanlight.benchmarks.gpu.checks import Check, Found, NotRun, near
from leanlight.benchmarks.gpu.draws import draws_of_the_cpu
from leanlight.contracts import PrimaryMetric, UserError, atomic_write
from leanlight.experiment import LeanlightCLI, Session
from leanlight.invocation import expand, option, read_config
from leanlight.predictions import load_predictions
from leanlight.registry import MethodInfo
from leanlight.results.pipeline import smallest_overrides

_QUIET = ("--run.wandb=disabled", "--run.id=run", "--trainer.enable_progress_bar=false", "--media.every_n_epochs=0")
_EPOCHS, _SHORT, _STEPS, _WARMUP = 4, 2, 20, 5
# How far a primary metric may be from the CPU's, and in bf16 from that of float32: 2 and 3 points, and for what is no
# share: what rounding alone moves it by within these epochs.
_TOLERANCES = {"val/mse": (0.01, 0.02), "val/score": (0.1, 0.1)}
# One action that differs makes other games and so another training: here one checkpoint is measured on both devices.
_OF_ONE_CHECKPOINT = ("val/score",)
_POINTS = (0.02, 0.03)


@dataclass
class Run:
    """A finished run.

    Args:
        folder: its run folder.
        primary: what its module is judged by.
    """

    folder: Path
    primary: PrimaryMetric | None

    @property
    def metrics(self) -> dict[str, float]:
        """Final metrics."""
        return (runs.read_summary(self.folder) or {})["metrics"]

    def first_losses(self) -> dict[str, float]:
        """Every training loss where it was logged first."""
        found: dict[str, float] = {}
        with open(self.folder / "metrics.csv", newline="") as file:
            for row in csv.DictReader(file):
                for name, text in row.items():
                    if name.startswith("train/") and "loss" in name and text and name not in found:
                        found[name] = float(text)
        return found

    def weights(self) -> dict[str, Tensor]:
        """Weights of the last checkpoint, on the CPU."""
        path = self.folder / "checkpoints" / "last.ckpt"
        return dict(torch.load(path, weights_only=True, map_location="cpu")["state_dict"])


@dataclass
class Runs:
    """The runs of one method that its checks share; each is made once, when it is first asked for.

    Args:
        config: what is trained.
        folder: for all run folders.
        device: ``cuda``, or ``cpu`` to try the checks without a GPU.
        epochs: of the runs whose metrics are compared.
        short: epochs of the others, at least 2.
        more: further options of every fit.
        method: whose smallest config is trained, and needs what its pipeline makes before.
    """

    config: Sequence[str]
    folder: Path
    device: str = "cuda"
    epochs: int = _EPOCHS
    short: int = _SHORT
    more: Sequence[str] = ()
    method: MethodInfo | None = None
    _made: dict[str, Run | Exception] = field(default_factory=dict)

    def options(self, name: str, device: str) -> list[str]:
        """What every run has in common. name: of the folder."""
        accelerator = "cpu" if device == "cpu" else "gpu"
        place = f"--trainer.default_root_dir={self.folder / name}"
        return [*_QUIET, place, f"--trainer.accelerator={accelerator}", "--trainer.devices=1"]

    def fit_options(self, name: str, device: str, epochs: int = 0) -> list[str]:
        """A whole fit. epochs: by default the short ones."""
        configs = [word for config in self.config for word in ("--config", config)]
        count = epochs or self.short
        short = [f"--trainer.max_epochs={count}", f"--trainer.check_val_every_n_epoch={count}"]
        logged = ["--trainer.log_every_n_steps=1", "--trainer.num_sanity_val_steps=0"]
        inputs = smallest_overrides(self.method, self.folder / "inputs") if self.method else {}
        needed = [option(*pair) for pair in inputs.items()]
        return ["fit", *configs, *needed, *self.options(name, device), *short, *logged, *self.more]

    def fit(self, name: str, device: str, *options: str) -> Run:
        """Fit and test with the draws of the CPU, wherever it trains. A run that failed fails again at once."""
        with draws_of_the_cpu():
            return self.once(name, [*self.fit_options(name, device, self.epochs), *options])

    def once(self, name: str, arguments: Sequence[str]) -> Run:
        """Run a command when it is first asked for."""
        if name not in self._made:
            try:
                self._made[name] = run_here(arguments)
            except Exception as error:  # kept: the next check that needs this run must fail, too, without waiting
                self._made[name] = error
        made = self._made[name]
        if isinstance(made, Exception):
            raise made
        return made

    def on_cpu(self) -> Run:
        """The reference."""
        return self.fit("cpu", "cpu")

    def on_device(self) -> Run:
        """The same on the GPU."""
        return self.fit("device", self.device)

    def mixed(self) -> Run:
        """The same in bf16; NotRun where the method refuses it."""
        try:
            return self.fit("mixed", self.device, "--trainer.precision=bf16-mixed")
        except UserError as error:
            if "precision" in str(error):
                raise NotRun(f"the method refuses bf16-mixed: {error}") from error
            raise


def run_here(arguments: Sequence[str], callbacks: Sequence[pl.Callback] = ()) -> Run:
    """Run a command of the suite in this process. callbacks: added last."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        cli = LeanlightCLI(expand(list(arguments)))
        cli.trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]  # set by a connector, out of mypy's sight
        Session(cli).run()
        return Run(cli.run_dir, getattr(cli.model, "primary_metric", None))
    finally:  # a Trainer that is deterministic leaves the process so
        torch.use_deterministic_algorithms(before)


def checks(info: MethodInfo, folder: Path, device: str = "cuda") -> Iterator[Check]:
    """What holds for the smallest config of every method.

    Args:
        info: the method.
        folder: for run folders.
        device: what is compared with the CPU.
    """
    own = read_config(info.folder / f"{info.smallest.rpartition('/')[2]}.yaml")["trainer"].get("max_epochs")
    made = Runs([info.smallest], folder, device, min(_EPOCHS, own or _EPOCHS), method=info)
    for name, what, measure in (
        ("first_loss", "first training losses: the CPU's within 1e-4", first_loss),
        ("metric", "primary metric after a short run: the CPU's", primary_metric),
        ("no_waiting", f"{_STEPS} training steps that log nothing never wait for the GPU", no_waiting),
        ("export", "what a run on the GPU exports opens without one and holds the trained state", exported),
        ("predict", "predictions of one checkpoint: the CPU's", predicted),
        ("metric_bf16", "primary metric in bf16-mixed: no worse than in float32", primary_metric_mixed),
        ("interrupt", "stopped inside an epoch and resumed: weights and metrics.csv bit for bit", interrupted),
        ("kill", "killed inside an epoch and resumed: weights and metrics.csv bit for bit", killed),
        ("two_gpus", "two GPUs under DDP end with the same weights, bit for bit", two_processes),
    ):
        yield Check(info.name, name, what, partial(measure, made))


def first_loss(made: Runs) -> Found:
    """Losses of the first step that logs them, both with the draws of the CPU."""
    expected, got = made.on_cpu().first_losses(), made.on_device().first_losses()
    if not expected:
        raise NotRun("it logs no training loss")
    error = max(abs(got[name] - value) / max(1e-8, abs(value)) for name, value in expected.items())
    name = min(expected)
    return near(error, 0.0, 1e-4, figures={f"{name}, CPU": expected[name], f"{name}, GPU": got[name]})


def primary_metric(made: Runs) -> Found:
    """The module's primary metric on both devices, of a training on each or of one checkpoint."""
    name = _primary(made).name
    tolerance = _TOLERANCES.get(name, _POINTS)[0]
    if name not in _OF_ONE_CHECKPOINT:
        return near(made.on_device().metrics[name], made.on_cpu().metrics[name], tolerance, why=name)
    scores = []
    for device in ("cpu", made.device):
        again = ["validate", "--from", str(made.on_device().folder), *made.options(f"validate-{device}", device)]
        scores.append(run_here(again).metrics[name])
    return near(scores[1], scores[0], tolerance, why=f"{name} of one checkpoint")


def primary_metric_mixed(made: Runs) -> Found:
    """The module's primary metric in both precisions on the GPU: bf16 is no worse by more than the tolerance."""
    primary = _primary(made)
    value, expected = made.mixed().metrics[primary.name], made.on_device().metrics[primary.name]
    tolerance = _TOLERANCES.get(primary.name, _POINTS)[1]
    worse = expected - value if primary.mode == "max" else value - expected
    return Found(value, expected, f"no worse by {tolerance}", worse <= tolerance, primary.name)


def _primary(made: Runs) -> PrimaryMetric:
    primary = made.on_device().primary
    if primary is None:
        raise NotRun("its module names no primary metric")
    return primary


# -- kill and resume


class StopInside(pl.Callback):
    """Send this process a signal in the middle of the second epoch.

    Args:
        number: SIGINT asks for a checkpoint at the next batch, SIGKILL for nothing.
    """

    def __init__(self, number: signal.Signals) -> None:
        self.number, self.batches = number, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches == int(1.5 * trainer.num_training_batches):
            os.kill(os.getpid(), self.number)


_EXACT = ("--trainer.deterministic=true", "--exact_resume.every=3")


def _undisturbed(made: Runs) -> Run:
    return made.once("undisturbed", [*made.fit_options("undisturbed", made.device), *_EXACT])


def interrupted(made: Runs) -> Found:
    """A run, and the same stopped between two batches and resumed."""
    whole = _undisturbed(made)
    try:
        run_here([*made.fit_options("interrupted", made.device), *_EXACT], [StopInside(signal.SIGINT)])
    except (KeyboardInterrupt, SystemExit):  # how an interrupted fit ends
        return _resumed(made, "interrupted", whole)
    raise RuntimeError("the run was not interrupted")


def killed(made: Runs) -> Found:
    """A run, and the same killed in a process of its own and resumed here."""
    whole = _undisturbed(made)
    arguments = [*made.fit_options("killed", made.device), *_EXACT]
    command = [sys.executable, "-m", "leanlight.benchmarks.gpu.training", json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the run to be killed ended with {done.returncode}: {done.stderr[-1500:]}")
    return _resumed(made, "killed", whole)


def _resumed(made: Runs, name: str, whole: Run) -> Found:
    """Go on with a stopped run; compare it with the whole one."""
    (folder,) = (made.folder / name).glob("*/*/run")
    again = run_here(["fit", "--resume", str(folder)])
    expected, got = whole.weights(), again.weights()
    differ = [name for name, value in expected.items() if not torch.equal(value, got[name])]
    rows = [(run.folder / "metrics.csv").read_bytes() for run in (whole, again)]
    why = f"differing: {', '.join(differ[:5])}" if differ else "" if rows[0] == rows[1] else "metrics.csv differs"
    return Found(len(differ), 0, "bit for bit", not why, why, {"weights": float(len(expected))})


# -- two processes


class OneState(pl.Callback):
    """After training, every process writes a digest of its weights, by rank, beside the run."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        digest = hashlib.sha256()
        for name, value in sorted(pl_module.state_dict().items()):
            digest.update(
                name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        atomic_write(Path(trainer.default_root_dir) / f"rank_{trainer.global_rank}.txt", digest.hexdigest())


def two_processes(made: Runs, count: int = 2) -> Found:
    """A short run on two GPUs under DDP: both ends with the same weights, bit for bit."""
    _, states = _on_several(made, "two", count, [])
    why = "" if len(states) == count else f"{len(states)} processes wrote their weights"
    return Found(len(set(states)), 1, "bit for bit", not why and len(set(states)) == 1, why)


def two_as_one(made: Runs, both: Sequence[str] = (), one: Sequence[str] = (), two: Sequence[str] = ()) -> Found:
    """Two processes against one with the same global batch: the largest distance of a weight tensor, relative.

    Args:
        made: of the method.
        both: options of both runs, under which the method promises equality.
        one: of the run on one process.
        two: of the run on two.
    """
    together, _ = _on_several(made, "two_as_one", 2, [*both, *two])
    alone = made.once("one", [*made.fit_options("one", made.device), *both, *one])
    expected, got = alone.weights(), together.weights()
    gaps = {
        name: ((got[name] - value).double().norm() / value.double().norm().clamp_min(1e-6)).item()
        for name, value in expected.items()
        if value.is_floating_point()
    }
    worst = max(gaps, key=lambda name: gaps[name])
    return near(gaps[worst], 0.0, 1e-3, why=worst)


def _on_several(made: Runs, name: str, count: int, options: Sequence[str]) -> tuple[Run, list[str]]:
    """A run under DDP in processes of its own; the run and every rank's digest."""
    found = torch.cuda.device_count() if made.device != "cpu" else count
    if found < count:
        raise NotRun(f"it needs {count} GPUs; this machine has {found}")
    ddp = ["--config=trainer/ddp", f"--trainer.devices={count}"]
    arguments = [*made.fit_options(name, made.device), *ddp, *options]
    command = [sys.executable, "-m", "leanlight.benchmarks.gpu.training", json.dumps(arguments), "ranks"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{count} processes ended with {done.returncode}: {done.stderr[-1500:]}")
    (folder,) = (made.folder / name).glob("*/*/run")
    return Run(folder, None), [path.read_text() for path in sorted(folder.glob("rank_*.txt"))]


# -- what a run leaves behind


def exported(made: Runs) -> Found:
    """Files of ``artifacts/export`` of the run on the GPU."""
    run = made.on_device()
    folder, trained = run.folder / "artifacts" / "export", list(run.weights().values())
    programs = 0
    for path in folder.rglob("*.pt2"):
        program = torch.export.load(path)
        inputs = program.example_inputs
        assert inputs is not None
        if any(value.device.type != "cpu" for value in [*inputs[0], *program.state_dict.values()]):
            return Found(path.name, "tensors on the CPU", "none", False, "the program needs the GPU it was made on")
        if not torch.isfinite(program.module()(*inputs[0])).all():
            return Found(path.name, "finite outputs", "none", False)
        programs += 1
    weights = [value for path in folder.rglob("*.safetensors") for value in load_file(path).values()]
    same = sum(any(v.shape == t.shape and torch.equal(v, t) for t in trained) for v in weights if v.numel() > 1)
    counts = {"programs": float(programs), "tensors": float(len(weights))}
    return Found(same, "at least 1", "bit for bit", same > 0, "tensors that are in the checkpoint, too", counts)


def predicted(made: Runs) -> Found:
    """Predictions of the run on the GPU's checkpoint, made on both devices with the same draws."""
    from leanlight.experiment import load

    source = made.on_device().folder
    if type(load(source)).predict_step is pl.LightningModule.predict_step:
        raise NotRun("it has no predict_step")
    both = []
    for device in ("cpu", made.device):
        with draws_of_the_cpu():
            found = run_here(["predict", "--from", str(source), *made.options(f"predict-{device}", device)])
        both.append(load_predictions(found.folder))
    wrong = [(_far(ours, both[0][name])) for name, ours in both[1].items() if isinstance(ours, Tensor)]
    share = torch.stack(wrong).any(0).float().mean().item()
    items = {"items": float(len(both[0]["index"]))}
    return Found(share, 0.0, "1 % of the items (spikes at the threshold)", share <= 0.01, "", items)


def _far(ours: Tensor, expected: Any) -> Tensor:
    """Items whose values differ by more than 1e-3."""
    gap = (ours.double() - expected.double()).abs() > 1e-3 + 1e-3 * expected.double().abs()
    return gap.flatten(1).any(1) if gap.ndim > 1 else gap


# -- waiting


class SyncWatch(pl.Callback):
    """Lets PyTorch report every synchronisation with the GPU within `steps` training steps after `warmup`.

    A step is the batch's transfer and what lies between the first and the last hook of the step, all callbacks of the
    suite included. What lies between steps (validation, checkpoints) may wait.

    Args:
        steps: watched.
        warmup: steps before the first that is watched.
    """

    def __init__(self, steps: int = _STEPS, warmup: int = _WARMUP) -> None:
        self.steps, self.warmup = steps, warmup
        self.seen, self.waits, self.step = 0, list[str](), ExitStack()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        move = trainer.strategy.batch_to_device

        def watched(*args: Any, **kwargs: Any) -> Any:
            with self.watching(trainer.training):
                return move(*args, **kwargs)

        trainer.strategy.batch_to_device = watched  # type: ignore[method-assign]
        self.cuda = pl_module.device.type == "cuda"

    def on_train_batch_start(self, *_: Any) -> None:
        self.step.enter_context(self.watching())

    def on_exception(self, *_: Any) -> None:
        self.step.close()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step.close()
        self.seen += 1
        if self.seen >= self.warmup + self.steps:
            trainer.should_stop = True

    @contextmanager
    def watching(self, wanted: bool = True) -> Iterator[None]:
        """Report what waits in the block, with the lines of the project that led to it."""
        if not wanted or not self.warmup <= self.seen < self.warmup + self.steps:
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("always", message=".*synchronizing CUDA operation.*")
            warnings.showwarning = self._note
            if self.cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                if self.cuda:
                    torch.cuda.set_sync_debug_mode("default")

    def _note(self, message: Any, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            own = [
                f"{os.path.relpath(frame.filename, runs.PROJECT)}:{frame.lineno}"
                for frame in traceback.extract_stack()[:-1]
                if frame.filename.startswith(str(runs.PROJECT)) and "benchmarks/gpu" not in frame.filename
            ]
            self.waits.append(" < ".join(reversed(own[-2:])) or "outside the project")


def no_waiting(made: Runs) -> Found:
    """Steps of a real Trainer with all of the suite's callbacks."""
    watch = SyncWatch()
    silent = ["--trainer.log_every_n_steps=1000000", "--exact_resume.every=1000000", "--trainer.limit_val_batches=0"]
    many = ["--trainer.max_epochs=100", "--run.test=none"]
    run_here([*made.fit_options("no_waiting", made.device), *silent, *many], [watch])
    watched = watch.seen - watch.warmup
    places = sorted({f"{place} ({watch.waits.count(place)} times)" for place in watch.waits})
    passed = not watch.waits and watched >= watch.steps
    return Found(len(watch.waits), 0, "none", passed, "; ".join(places[:8]), {"steps": float(watched)})


if __name__ == "__main__":
    run_here(json.loads(sys.argv[1]), [OneState() if "ranks" in sys.argv[2:] else StopInside(signal.SIGKILL)])
