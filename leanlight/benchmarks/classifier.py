"""Benchmark of the image classifier: data pipeline, time outside the step, cost of the guards, switches, memory."""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from torch import Tensor, nn

from callbacks import ExactResume
from datamodules import ImageDataModule
from leanlight import runs
from leanlight.benchmarks.core import (
    Measurement,
    PaperStep,
    Target,
    interleave,
    network_step,
    ratios,
    summarise,
)
from leanlight.benchmarks.gpu.checks import Check
from leanlight.benchmarks.gpu.training import Runs, two_as_one
from leanlight.benchmarks.probe import StepProbe
from leanlight.contracts import ImageBatch, atomic_write
from leanlight.ops.augment import AUGMENTATIONS, Augmentation
from lit_modules.classifier import ImageClassifier
from lit_modules.classifier.reference import BareClassifierStep
from lit_modules.nn import ConvNet, ResNet18, SpikingConvNet

_STEP_S = 0.025  # the bound on time outside the step holds for steps of 20 ms and more; this leaves room for noise
_WARMUP = 10
_GUARDS = ("ExactResume", "NaNGuard", "DiskGuard")
_REFERENCE_ITEMS = 12_800
_BARE_STEP = "lit_modules.classifier.reference:BareClassifierStep"
_SHAPE = {"in_channels": 1, "num_classes": 10, "image_size": 28}
_SMALL = {**_SHAPE, "width": 32, "depth": 3}


def run(quick: bool) -> Measurement:
    """Measure everything. quick: small networks, few repetitions, no compiler: figures without meaning."""
    measured = Measurement()
    data = ImageDataModule(batch_size=128)
    data.ensure_available()
    data.setup()
    measured.settings |= {"data": data.meta.source, "train_items": len(data.train_split)}
    measured.settings |= {"threads": torch.get_num_threads(), "device": device().type}
    parts = {
        "data pipeline": lambda: measure_pipeline(data, measured, rounds=2 if quick else 7),
        "time outside the step": lambda: measure_overhead(data, measured, 1 if quick else 3, 20 if quick else 200),
        "switches": lambda: measure_switches(data, measured, quick),
    }
    for name, part in parts.items():
        with Console(stderr=True).status(f"classifier: {name}"):
            part()
    return measured


def device() -> torch.device:
    """Where the classifier would train."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# -- data pipeline


def measure_pipeline(data: ImageDataModule, measured: Measurement, rounds: int) -> None:
    """Samples a second of a pass over the training items: in memory, and through torchvision's per-sample path.

    The reference is what torchvision's documentation shows: without worker processes, and with one a core.
    """
    from torchvision import transforms

    crop = transforms.Compose([transforms.RandomCrop(28, padding=2), transforms.ToTensor()])
    items = min(len(data.train_split), _REFERENCE_ITEMS)
    measured.settings["pipeline_reference_items"] = items
    with tempfile.TemporaryDirectory() as folder:
        plain = torchvision_dataset(data, Path(folder), items, transforms.ToTensor())
        measured.checks["both pipelines give the same pixels and labels"] = same_items(data, plain, min(items, 512))
        _compare_pipelines(data, plain, None, "", measured, rounds)
        cropped = torchvision_dataset(data, Path(folder), items, crop)
        _compare_pipelines(data, cropped, AUGMENTATIONS["shift"], "_shift", measured, rounds)
    text = "the in-memory pipeline is at least 20 times as fast as torchvision's FashionMNIST and DataLoader"
    measured.targets.append(Target("pipeline/times_torchvision", 20.0, text))


def _compare_pipelines(
    data: ImageDataModule, dataset: Any, augment: Augmentation | None, kind: str, measured: Measurement, rounds: int
) -> None:
    def in_memory() -> None:
        for batch in data.train_dataloader():
            image = data.on_after_batch_transfer(batch.to(device()), 0).image
            if augment is not None:
                augment(image, None)

    workers = min(os.cpu_count() or 1, 8)
    references = {f"torchvision{kind}": 0, f"torchvision{kind}_{workers}_workers": workers}
    passes = {name: loader_pass(dataset, count) for name, count in references.items()}
    seconds = interleave({f"in_memory{kind}": in_memory, **passes}, rounds, warmup=1)
    speed = {name: [len(dataset) / s for s in seconds[name]] for name in references}
    ours = [len(data.train_split) / s for s in seconds[f"in_memory{kind}"]]
    fastest = max(speed.values(), key=statistics.median)
    for name, values in {f"in_memory{kind}": ours, **speed}.items():
        measured.figures[f"pipeline/{name}"] = summarise(values, "samples/s", "higher")
    measured.figures[f"pipeline/times_torchvision{kind}"] = summarise(ratios(ours, fastest), "x", "higher")


def loader_pass(dataset: Any, workers: int) -> Callable[[], None]:
    """A pass over a data set of torchvision, in batches of 128. workers: processes that read."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=128, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )

    def one_pass() -> None:
        for image, _ in loader:
            image.to(device())

    return one_pass


def torchvision_dataset(data: ImageDataModule, folder: Path, items: int, transform: Any) -> Any:
    """torchvision's FashionMNIST over the first `items` of our training split, read from idx files in `folder`."""
    from torchvision.datasets import FashionMNIST

    raw = folder / "FashionMNIST" / "raw"
    for name in ("train", "t10k"):
        part = (data.train_split if name == "train" else data.test_split).batch(
            torch.arange(items if name == "train" else 1)
        )
        _write_idx(raw / f"{name}-images-idx3-ubyte", part.image[:, 0])
        _write_idx(raw / f"{name}-labels-idx1-ubyte", part.label.byte())
    return FashionMNIST(str(folder), train=True, transform=transform)


def _write_idx(path: Path, values: Tensor) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    atomic_write(path, header + values.numpy().tobytes())


def same_items(data: ImageDataModule, reference: Any, count: int) -> bool:
    """Whether the first `count` items are equal, bit for bit, in both pipelines."""
    ours = data.on_after_batch_transfer(data.train_split.batch(torch.arange(count)), 0)
    images, labels = zip(*(reference[i] for i in range(count)), strict=True)
    return torch.equal(torch.stack(images), ours.image) and torch.equal(torch.tensor(labels), ours.label)


# -- time outside the step


def measure_overhead(data: ImageDataModule, measured: Measurement, repeats: int, steps: int) -> None:
    """Share of training outside the step: `leanlight fit` as it is, and Lightning's Trainer without any callback."""
    batch_size = choose_batch_size(data)
    measured.settings |= {
        "overhead_network": {"ConvNet": _SMALL},
        "overhead_batch_size": batch_size,
        "overhead_steps": steps,
    }
    reports: dict[str, list[dict[str, Any]]] = {"leanlight": [], "lightning": []}
    peaks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(repeats):
            place = Path(folder) / str(number)
            reports["leanlight"].append(_house_run(data, batch_size, steps, place / "house"))
            reports["lightning"].append(_plain_run(data, batch_size, steps, place / "plain"))
            peaks.append(_peak_memory(data, batch_size, place / "memory"))
    every = ExactResume().every
    for name, found in reports.items():
        measured.checks[f"{name}: same weights as the plain loop, bit for bit"] = all(r["equal"] for r in found)
        measured.figures[f"step/{name}/bare"] = summarise([1e3 * statistics.median(r["bare"]) for r in found], "ms")
        outside = [100 * share_of(r["outside"], r, every) for r in found]
        measured.figures[f"step/{name}/outside"] = summarise(outside, "%")
        extra = [100 * share_of([c - b for c, b in zip(r["cycle"], r["bare"], strict=True)], r, every) for r in found]
        measured.figures[f"step/{name}/more_than_plain_loop"] = summarise(extra, "%")
    house = reports["leanlight"]
    for owner in sorted(house[0]["hooks"]):
        costs = [1e6 * trimmed_mean(r["hooks"][owner]) for r in house]
        measured.figures[f"step/leanlight/hooks/{owner}"] = summarise(costs, "us/step")
    measured.figures["step/leanlight/checkpoint"] = summarise(
        [1e3 * statistics.median(r["checkpoints"]) for r in house], "ms"
    )
    measured.figures["step/leanlight/guards"] = summarise([100 * guards_share(r, every) for r in house], "%")
    measured.figures["memory/fit_peak_rss"] = summarise(peaks, "MB")
    measured.targets += [
        Target(
            "step/leanlight/outside",
            3.0,
            "at most 3 % of training time passes outside the step (data, callbacks, logs)",
        ),
        Target("step/leanlight/guards", 1.0, "exact resume and guards cost less than 1 %"),
    ]


def share_of(seconds: list[float], report: dict[str, Any], every: int) -> float:
    """Share of a training cycle that `seconds` (one value a step) make up, checkpoints included.

    A mean that leaves out the 2 % smallest and largest values stands disturbances by other processes, and keeps the
    steps that log. It may leave out checkpoints, so they are added: one in `every` steps.
    """
    checkpoint = _checkpoint_per_step(report, every)
    return (trimmed_mean(seconds) + checkpoint) / (trimmed_mean(report["cycle"]) + checkpoint)


def guards_share(report: dict[str, Any], every: int) -> float:
    """Share of a training cycle that exact resume, NaN guard and disk guard take, checkpoints included."""
    hooks = sum(trimmed_mean(report["hooks"][name]) for name in _GUARDS if name in report["hooks"])
    return (hooks + _checkpoint_per_step(report, every)) / trimmed_mean(report["cycle"])


def _checkpoint_per_step(report: dict[str, Any], every: int) -> float:
    return statistics.median(report["checkpoints"]) / every if report["checkpoints"] else 0.0


def trimmed_mean(values: list[float], share: float = 0.02) -> float:
    """Mean without the given share of smallest and of largest values."""
    cut = round(len(values) * share)
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def choose_batch_size(data: ImageDataModule) -> int:
    """The smallest power of two from 64 at which a bare step takes long enough."""
    for size in (64, 128, 256, 512, 1024, 2048):
        step = BareClassifierStep(_module(ConvNet, _SMALL).to(device()))
        batch = _batch(data, size)
        seconds = interleave({"step": functools.partial(step, batch)}, rounds=5)["step"]
        if statistics.median(seconds) >= _STEP_S:
            break
    return size


def _module(network: type[nn.Module], arguments: dict[str, Any]) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(functools.partial(network, **arguments))


def _batch(data: ImageDataModule, size: int) -> ImageBatch:
    index = torch.arange(size) % len(data.train_split)
    return data.on_after_batch_transfer(data.train_split.batch(index).to(device()), 0)


def _plain_run(data: ImageDataModule, batch_size: int, steps: int, folder: Path) -> dict[str, Any]:
    output = folder / "times.json"
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = pl.Trainer(
        max_steps=steps + _WARMUP,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[StepProbe(output, _BARE_STEP, _WARMUP)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    own = ImageDataModule(root=data.root, batch_size=batch_size, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(_module(ConvNet, _SMALL), datamodule=own)
    return json.loads(output.read_text())


def _house_run(data: ImageDataModule, batch_size: int, steps: int, folder: Path) -> dict[str, Any]:
    output = folder / "times.json"
    arguments = {"output": str(output), "bare_step": _BARE_STEP, "warmup": _WARMUP}
    probe = {"class_path": "leanlight.benchmarks.probe.StepProbe", "init_args": arguments}
    _fit(data, batch_size, folder, {"max_steps": steps + _WARMUP, "callbacks": [probe]})
    return json.loads(output.read_text())


def _peak_memory(data: ImageDataModule, batch_size: int, folder: Path) -> float:
    summary = runs.read_summary(_fit(data, batch_size, folder, {"max_steps": 20}))
    assert summary is not None
    return float(summary["peak_rss_mb"])


def _fit(data: ImageDataModule, batch_size: int, folder: Path, trainer: dict[str, Any]) -> Path:
    """`leanlight fit` in a process of its own, as a user would start it; return its run folder."""
    network = {"class_path": "lit_modules.nn.ConvNet", "init_args": _SMALL}
    own = {"dataset": data.dataset, "root": str(data.root.resolve()), "batch_size": batch_size}
    config = {
        "model": {"class_path": "lit_modules.classifier.ImageClassifier", "init_args": {"network": network}},
        "data": {"class_path": "datamodules.ImageDataModule", "init_args": own},
        "trainer": {"max_epochs": -1, "limit_val_batches": 0, "default_root_dir": str(folder), **trainer},
        "run": {"id": "benchmark", "test": "none", "wandb": "offline"},
    }
    path = folder / "benchmark.yaml"
    atomic_write(path, yaml.safe_dump(config))
    command = [sys.executable, "-m", "leanlight", "fit", "--config", str(path)]
    environment = {**os.environ, "WANDB_SILENT": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"leanlight fit ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return runs.find_runs(folder)[0]


# -- switches


def measure_switches(data: ImageDataModule, measured: Measurement, quick: bool) -> None:
    """Step time of an ordinary and a spiking network: as it is, channels-last, bf16 autocast, compiled."""
    width = 16 if quick else 128
    sizes = {
        "convnet": (ConvNet, {**_SHAPE, "width": width, "depth": 3}, 32 if quick else 128),
        "spiking": (
            SpikingConvNet,
            {**_SHAPE, "width": 16 if quick else 32, "depth": 3, "time_steps": 4},
            32 if quick else 128,
        ),
    }
    for name, (network, arguments, batch_size) in sizes.items():
        measured.settings[f"switches_{name}"] = {network.__name__: arguments, "batch_size": batch_size}
        batch = _batch(data, batch_size)
        steps = switched_steps(network, arguments, batch, name, measured, quick)
        seconds = interleave(steps, rounds=3 if quick else 10, warmup=2)
        plain = seconds["plain"]
        measured.figures[f"switches/{name}/plain"] = summarise([1e3 * s for s in plain], "ms")
        measured.figures[f"switches/{name}/samples_per_s"] = summarise(
            [batch_size / s for s in plain], "samples/s", "higher"
        )
        for switch, values in seconds.items():
            if switch != "plain":
                measured.figures[f"switches/{name}/{switch}"] = summarise(ratios(values, plain), "x plain time")


def switched_steps(
    network: type[nn.Module],
    arguments: dict[str, Any],
    batch: ImageBatch,
    name: str,
    measured: Measurement,
    quick: bool,
) -> dict[str, Callable[[], object]]:
    """A training step for each switch; a compiler that is not there is named in `measured.missing`."""
    make = lambda: BareClassifierStep(_module(network, arguments).to(device()))  # noqa: E731
    steps: dict[str, Callable[[], object]] = {"plain": functools.partial(make(), batch)}
    last = make()
    last.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    moved = ImageBatch(batch.image.contiguous(memory_format=torch.channels_last), batch.label, batch.index)
    steps["channels_last"] = functools.partial(last, moved)
    mixed = make()

    def mixed_step() -> None:
        with torch.autocast(device().type, torch.bfloat16):
            mixed(batch)

    steps["bf16"] = mixed_step
    if not quick:
        try:
            steps["compile"] = compiled_step(make(), batch, name, measured)
        except Exception as error:  # the compiler's own failures have no common type, and all mean the same here
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            measured.missing[f"switches/{name}/compile"] = reason
    return steps


def compiled_step(
    step: BareClassifierStep, batch: ImageBatch, name: str, measured: Measurement
) -> Callable[[], object]:
    """The step with a compiled network; records how long compiling took and whether its logits are right."""
    plain = copy.deepcopy(step.network)(batch.image)
    step.network.compile()
    begin = time.perf_counter()
    logits = step.network(batch.image)
    step(batch)
    spent = time.perf_counter() - begin
    measured.figures[f"switches/{name}/compile_once"] = summarise([spent], "s")
    close = torch.allclose(logits, plain, rtol=1e-3, atol=1e-3)
    measured.checks[f"{name}: the compiled network gives the plain one's logits"] = close
    return functools.partial(step, batch)


# -- on a GPU


def paper_steps(where: str, quick: bool = False) -> dict[str, Callable[[], PaperStep]]:
    """ResNet-18 on CIFAR's shapes as in `classifier/cifar10`, and the spiking network of the switches."""

    batch = 2 if quick else 128

    def make(network: Callable[[], nn.Module], shape: tuple[int, int, int]) -> PaperStep:
        torch.manual_seed(0)
        built = network().to(where)
        image, label = torch.rand(batch, *shape, device=where), torch.arange(batch, device=where) % 10
        return network_step(built, lambda: F.cross_entropy(built(image), label), batch)

    spiking = functools.partial(SpikingConvNet, 1, 10, image_size=28, width=32, depth=3, time_steps=4)
    return {
        "resnet18": functools.partial(make, functools.partial(ResNet18, 3, 10), (3, 32, 32)),
        "spiking": functools.partial(make, spiking, (1, 28, 28)),
    }


def gpu_checks(folder: Path, where: str) -> Iterator[Check]:
    """What only this method promises on a GPU."""
    # Adam divides by the size of the gradient and blows rounding up where it is near zero.
    plain = ["--data.init_args.drop_last=true", "--model.init_args.optimizer.class_path=torch.optim.SGD"]
    plain += ["--model.init_args.optimizer.init_args.lr=0.1"]
    one, two = ["--data.init_args.batch_size=64"], ["--data.init_args.batch_size=32"]
    made = Runs(["classifier/digits_small"], folder, where)
    what = "two GPUs train as one with the same global batch: weights within 1e-3"
    yield Check("classifier", "two_as_one", what, functools.partial(two_as_one, made, plain, one, two))
