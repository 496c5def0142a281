"""Benchmark of selection: greedy choices and kernels against the public way, memory, and the scorer's features."""

from __future__ import annotations

import functools
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from callbacks import PredictionWriter
from datamodules import ImageDataModule
from leanlight.benchmarks.core import (
    Measurement,
    PaperStep,
    Target,
    interleave,
    network_step,
    one_thread,
    peak_memory_mb,
    ratios,
    summarise,
)
from leanlight.benchmarks.gpu.checks import Check, Found, near
from lit_modules.adq import DQ, SampleScorer
from lit_modules.adq.bins import Binning
from lit_modules.nn import ConvNet, ResNet18, logits_and_features
from lit_modules.selection import (
    Craig,
    FacilityLocation,
    Features,
    GradientCosine,
    Kernel,
    Work,
    class_budget,
    error_of,
    facility_location,
    graph_cut,
)

_WIDTH, _CLASSES, _BINS = 288, 10, 10


def features(items: int, num_classes: int = 1, outputs: int = _CLASSES, seed: int = 0) -> Features:
    """Items in clusters, as wide as a ConvNet-3's on Fashion-MNIST: half of the numbers are 0, most fits are good.

    Args:
        items: of each class.
        num_classes: classes that there are items of.
        outputs: of the network.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(num_classes).repeat_interleave(items)
    centre = torch.randn(num_classes, 12, _WIDTH, generator=generator)
    cluster = torch.randint(12, (len(label),), generator=generator)
    noise = torch.randn(len(label), _WIDTH, generator=generator) * torch.rand(len(label), 1, generator=generator)
    logits = 1.5 * torch.randn(len(label), outputs, generator=generator)
    logits[torch.arange(len(label)), label] += 3
    return Features(label, num_classes, {"embedding": (centre[label, cluster] + noise).relu(), "logits": logits})


def kernel(own: Features) -> Kernel:
    """The factorised kernel of the gradients of one class."""
    return GradientCosine(error_of(own["logits"], own.label, double_softmax=True), own["embedding"])


# -- bins of graph cut


def public_bins(table: np.ndarray, count: int, dtype: Any) -> list[int]:
    """Bins as public code makes them: sums of columns are kept, rows of chosen items are summed anew at each pick.

    Args:
        table: (N, N) similarities.
        count: bins.
        dtype: of sums.
    """
    left, found = np.arange(len(table)), []
    for _ in range(count - 1):
        part = table[np.ix_(left, left)]
        columns, free = part.sum(0, dtype=dtype), np.ones(len(left), dtype=bool)
        for _ in range(len(table) // count):
            gain = columns[free] - 2 * part[np.ix_(~free, free)].sum(0, dtype=dtype)
            best = np.flatnonzero(free)[gain.argmax()]
            free[best] = False
            found.append(int(left[best]))
        left = left[free]
    return found


def our_bins(whole: Kernel, count: int) -> list[int]:
    """The same bins, in the order in which their items are chosen."""
    left, size, found = torch.arange(len(whole)), len(whole) // count, []
    for _ in range(count - 1):
        picked, _ = graph_cut(whole, size)
        found += left[picked].tolist()
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[picked] = False
        whole, left = whole.take(stays.nonzero()[:, 0]), left[stays]
    return found


def measure_bins(measured: Measurement, sizes: list[int], rounds: int) -> None:
    """Ten bins of one class, the similarities given: our greedy choice and the public one side by side."""
    for items in sizes:
        whole = kernel(features(items))
        table = whole.rows(torch.arange(items)).numpy()
        ways: dict[str, Callable[[], object]] = {
            "ours": functools.partial(our_bins, whole, _BINS),
            "public": functools.partial(public_bins, table, _BINS, np.float32),
        }
        # The public way takes its time.
        seconds = interleave(ways, rounds if items < 5000 else 1, warmup=0)
        for name, found in seconds.items():
            measured.figures[f"bins_{items}/{name}"] = summarise(found, "s")
        measured.figures[f"bins_{items}/speedup"] = summarise(ratios(seconds["public"], seconds["ours"]), "x", "higher")
        text = f"{items:,} items: the picks of the public way, summed in float64, one by one"
        measured.checks[text] = our_bins(whole, _BINS) == public_bins(table, _BINS, np.float64)
    if 5000 in sizes:
        text = "ten bins of 5,000 items at least ten times as fast as the public way"
        measured.targets.append(Target("bins_5000/speedup", 10.0, text))


def measure_growth(measured: Measurement, sizes: list[int]) -> None:
    """Ten bins of one class from features on, in a process of its own, up to a class of which no table fits."""
    command = [sys.executable, "-m", "leanlight.benchmarks.adq", *map(str, sizes)]
    with Console(stderr=True).status(f"adq: ten bins of one class, up to {sizes[-1]:,} items"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        measured.missing["growth"] = f"out of memory or failed: {last}"
        return
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    for items, report in zip(sizes, reports, strict=True):
        measured.figures[f"class_of_{items}/ten_bins"] = summarise([report["seconds"]], "s")
        measured.figures[f"class_of_{items}/peak_memory"] = summarise([report["memory_mb"]], "MB")
    slope = float(np.polyfit(np.log(sizes), np.log([report["seconds"] for report in reports]), 1)[0])
    measured.figures["growth/slope"] = summarise([slope], "log s / log items")
    text = "time of ten bins grows as the square of the items at most: slope in log-log axes up to 2.2"
    measured.targets.append(Target("growth/slope", 2.2, text))
    if 50_000 in sizes:
        measured.targets.append(Target("class_of_50000/peak_memory", 2048.0, "50,000 items of one class below 2 GiB"))


def _report_growth(sizes: list[int]) -> None:
    """Print seconds for ten bins of one class of each of ascending sizes, and this process's peak memory so far."""
    torch.set_num_threads(1)
    Work().classes(features(100), Binning(), [1])  # warms up
    for items in sizes:
        own = features(items)
        begin = time.perf_counter()
        Work().classes(own, Binning(), [1])
        print(json.dumps({"seconds": time.perf_counter() - begin, "memory_mb": peak_memory_mb()}))


# -- kernels


def _factorised(own: Features) -> Tensor:
    return kernel(own).all_rows()


def explicit_kernel(own: Features, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, N) cosines of gradients written out, K (1 + D) numbers an item."""
    error = error_of(own["logits"], own.label, double_softmax=True).to(dtype)
    inputs = torch.cat([torch.ones(len(own), 1), own["embedding"]], 1).to(dtype)
    gradient = normalize((error[:, :, None] * inputs[:, None]).flatten(1))
    return (gradient @ gradient.T).mul_(0.5).add_(0.5)


def measure_kernels(measured: Measurement, items: int, rounds: int) -> None:
    """The factorised kernel against the explicit one, for few and for many classes."""
    for outputs, bound in ((10, 3.0), (100, 20.0)):
        own = features(items, outputs=outputs)
        ways: dict[str, Callable[[], Tensor]] = {
            "factorised": functools.partial(_factorised, own),
            "explicit": functools.partial(explicit_kernel, own),
        }
        seconds = interleave(ways, rounds, warmup=1)
        name = f"kernel_{outputs}_classes"
        for way, found in seconds.items():
            measured.figures[f"{name}/{way}"] = summarise([1000 * each for each in found], "ms")
        faster = ratios(seconds["explicit"], seconds["factorised"])
        measured.figures[f"{name}/speedup"] = summarise(faster, "x", "higher")
        stored = sum(factor.nbytes for factor in kernel(own).factors)
        measured.figures[f"{name}/factors"] = summarise([stored / items], "bytes an item")
        measured.figures[f"{name}/gradients"] = summarise([4.0 * outputs * (1 + _WIDTH)], "bytes an item", None)
        text = f"{outputs} classes: the factorised kernel at least {bound:.0f} times as fast as the explicit one"
        measured.targets.append(Target(f"{name}/speedup", bound, text))
        some = own.take(torch.arange(200))
        error = float((_factorised(some) - explicit_kernel(some, torch.float64)).abs().max())
        measured.checks[f"{outputs} classes: the kernel of explicit gradients in float64 within 1e-7"] = error < 1e-7


# -- facility location


def plain_facility_location(table: Tensor, count: int) -> list[int]:
    """Every item's gain at every pick."""
    covered = torch.zeros(len(table))
    found: list[int] = []
    for _ in range(count):
        parts = ((rows - covered).clamp_(min=0).sum(1, dtype=torch.float64) for rows in table.split(64))
        gain = torch.cat(list(parts))
        gain[found] = -torch.inf
        found.append(int(gain.argmax()))
        covered = torch.maximum(covered, table[found[-1]])
    return found


def measure_cover(measured: Measurement, items: int) -> None:
    """Lazy facility location against the plain one, the similarities given, 10 % of the items."""
    whole = kernel(features(items))
    table, picks = whole.rows(torch.arange(items)), {}

    def lazy() -> None:
        picks["lazy"] = facility_location(whole, items // 10)[0].tolist()

    def plain() -> None:
        picks["plain"] = plain_facility_location(table, items // 10)

    seconds = interleave({"lazy": lazy, "plain": plain}, rounds=1, warmup=0)
    for name, found in seconds.items():
        measured.figures[f"facility_location/{name}"] = summarise(found, "s")
    faster = ratios(seconds["plain"], seconds["lazy"])
    measured.figures["facility_location/speedup"] = summarise(faster, "x", "higher")
    measured.checks["lazy and plain facility location pick the same, one by one"] = picks["lazy"] == picks["plain"]
    text = f"lazy facility location at least five times as fast as plain, {items:,} items, 10 %"
    measured.targets.append(Target("facility_location/speedup", 5.0, text))


# -- whole rules, and features


def measure_rules(measured: Measurement, items: int) -> None:
    """Rules on ten classes, features given: 10 % of the size of Fashion-MNIST's training part."""
    own = features(items, _CLASSES)
    budget = class_budget(own, 0.1)
    for name, rule in (("dq", DQ()), ("facility_location", FacilityLocation()), ("craig", Craig())):
        with Console(stderr=True).status(f"adq: {name} of {len(own):,} items"):
            begin = time.perf_counter()
            picks = rule.select(own, budget, seed=0)
            measured.figures[f"{len(own)}_items/{name}"] = summarise([time.perf_counter() - begin], "s")
        measured.checks[f"{name}: the budget is spent, no item twice"] = picks.index.unique().numel() == int(
            budget.sum()
        )
    if items == 6000:
        measured.targets.append(Target("60000_items/dq", 30.0, "DQ on all of Fashion-MNIST's size below 30 s"))


class _Clock(pl.Callback):
    """Seconds of the predict loop, without set-up."""

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin = time.perf_counter()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.seconds = time.perf_counter() - self.begin


def measure_features(measured: Measurement, quick: bool) -> None:
    """Features written by the scorer's prediction, against the network's bare passes over the same batches."""
    dataset, size = ("digits", 8) if quick else ("fashion_mnist", 28)
    network = functools.partial(ConvNet, 1, 10, width=32, depth=2 if quick else 3, norm="batch", image_size=size)
    data = ImageDataModule(
        dataset=dataset, variant="auto" if quick else "subset", batch_size=100, predict_split="train", seed=0
    )
    scorer = SampleScorer(network, outputs=["embedding", "logits"]).eval()
    data.setup("predict")
    # The batches of prediction: larger ones than those of training take another time an image.
    images = [data.on_after_batch_transfer(batch, 0).image for batch in data.predict_dataloader()]

    def bare() -> float:
        begin = time.perf_counter()
        with torch.no_grad():
            for image in images:
                logits_and_features(scorer.network, image)
        return time.perf_counter() - begin

    def predicted() -> float:
        clock = _Clock()
        quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            callbacks = [PredictionWriter(), clock]  # in this order, so that the writer's last piece counts
            trainer = pl.Trainer(accelerator="cpu", callbacks=callbacks, default_root_dir=folder, **quiet)
            trainer.predict(scorer, datamodule=data)
        return clock.seconds

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bare()
    pairs = [(bare(), predicted()) for _ in range(2 if quick else 7)]
    measured.figures["features/bare"] = summarise([pair[0] for pair in pairs], "s")
    measured.figures["features/predicted"] = summarise([pair[1] for pair in pairs], "s")
    measured.figures["features/more"] = summarise([100 * (long / short - 1) for short, long in pairs], "%")
    text = "features, written to files, take at most 5 % longer than bare passes of the network"
    measured.targets.append(Target("features/more", 5.0, text))


@one_thread()
def run(quick: bool = False) -> Measurement:
    """Measure on one thread of the CPU.

    quick: tiny sizes: figures without meaning.
    """
    measured = Measurement(settings={"threads": 1, "features": f"synthetic, {_WIDTH} wide", "bins": _BINS})
    measure_bins(measured, [200, 400] if quick else [1000, 2500, 5000], rounds=2 if quick else 3)
    measure_growth(measured, [200, 400] if quick else [1000, 2500, 5000, 10_000, 20_000, 50_000])
    measure_kernels(measured, 200 if quick else 2000, rounds=2 if quick else 5)
    measure_cover(measured, 200 if quick else 5000)
    measure_rules(measured, 100 if quick else 6000)
    measure_features(measured, quick)
    return measured


# -- on a GPU


def paper_steps(where: str, quick: bool = False) -> dict[str, Callable[[], PaperStep]]:
    """Training on a kept part of CIFAR-10 as in `adq/cifar10`: ResNet-18, 128 images."""

    batch = 2 if quick else 128

    def make() -> PaperStep:
        torch.manual_seed(0)
        network = ResNet18(3, 10).to(where)
        image, label = torch.rand(batch, 3, 32, 32, device=where), torch.arange(batch, device=where) % 10
        return network_step(network, lambda: cross_entropy(network(image), label), batch)

    return {"resnet18": make}


def gpu_checks(folder: Path, where: str) -> Iterator[Check]:
    """What only this method promises on a GPU."""
    what = "features of a network on the GPU are the CPU's within 1e-3 of their largest number"
    yield Check("adq", "features", what, functools.partial(same_features, where))


def same_features(where: str) -> Found:
    """Embeddings and logits of the same images, on the device and on the CPU."""
    torch.manual_seed(0)
    network, image = ConvNet(1, 10, width=32, depth=3, norm="batch", image_size=28).eval(), torch.rand(64, 1, 28, 28)

    def both(device: str) -> Tensor:
        logits, embedding = logits_and_features(network.to(device), image.to(device))
        assert embedding is not None
        return torch.cat([logits, embedding.flatten(1)], 1).cpu()

    with torch.no_grad():
        expected, found = both("cpu"), both(where)
    return near(float((found - expected).abs().max() / expected.abs().max()), 0.0, 1e-3)


if __name__ == "__main__":
    _report_growth([int(size) for size in sys.argv[1:]])
