"""Benchmark of AT-BPTT: time and memory of an outer step by gradient engine and window length; time of replicas."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from leanlight.allocator import keep_freed_memory
from leanlight.benchmarks.core import Better, Measurement, PaperStep, Target, peak_memory_mb, summarise
from leanlight.benchmarks.gpu.checks import Check, Found, NotRun, near
from lit_modules.at_bptt.distillers import OuterStep, Task, TruncatedBPTT
from lit_modules.at_bptt.engines import Adjoint, GradientEngine, Unrolled
from lit_modules.at_bptt.inner import InnerOptimizer, SyntheticData
from lit_modules.at_bptt.lowrank import LowRankHessian
from lit_modules.at_bptt.reference import ReferenceWindow
from lit_modules.at_bptt.replicas import Replicas, side_by_side
from lit_modules.at_bptt.windows import RandomWindow
from lit_modules.nn import MLP

#: The published way (autograd through the unrolled graph of PyTorch's own modules), and ours.
_ENGINES = ("published", "unrolled", "exact", "lowrank")
_CHUNK = 250  # real images at a time in our engines' outer loss; the published way takes all


def run(quick: bool) -> Measurement:
    """Measure at CIFAR's shapes: ConvNet-3, 10 images a class, all of them in every inner step, 1,000 real ones.

    quick: tiny shapes: figures without meaning. Every cell runs in a process of its own: its peak memory is its own.
    """
    measured = Measurement()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"size": 16, "real": 16} if quick else {"size": 32, "real": 5000 if device == "cuda" else 1000}
    widths, windows = ((4,), (3,)) if quick else ((32, 128), (15, 40))
    rank = 2 if quick else 32 if device == "cuda" else 8
    measured.settings |= {
        "network": f"ConvNet-3, widths {list(widths)}",
        "images": [100, 3, shapes["size"], shapes["size"]],
        "real_batch": shapes["real"],
        "outer_chunk": f"{_CHUNK}; published: all",
        "windows": list(windows),
        "rank": rank,
        "device": device,
        "threads": torch.get_num_threads(),
    }
    check_equality(measured)
    common = {"rank": rank, "steps": 2 if device == "cpu" else 5, "device": device, **shapes}
    for width, window in itertools.product(widths, windows):
        for engine in _ENGINES:
            with Console(stderr=True).status(f"at_bptt: {engine}, width {width}, window {window}"):
                _cell(measured, {"engine": engine, "width": width, "window": window, **common})
        _compare(measured, f"width_{width}/window_{window}")
    with Console(stderr=True).status("at_bptt: error of a low-rank Hessian"):
        measure_factor(measured, quick, device)
    with Console(stderr=True).status("at_bptt: replicas"):
        check_replicas(measured)
        time_replicas(measured, quick, device)
    return measured


def _cell(measured: Measurement, setting: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "leanlight.benchmarks.at_bptt", json.dumps(setting)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    name = f"width_{setting['width']}/window_{setting['window']}/{setting['engine']}"
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"])[-1]
        measured.missing[name] = f"out of memory or failed: {last}"
        return
    report = json.loads(done.stdout)
    measured.figures[f"{name}/step"] = summarise(report["seconds"], "s")
    measured.figures[f"{name}/memory"] = summarise([report["memory_mb"]], "MB above the start")
    if "refresh" in report:
        measured.figures[f"{name}/refresh"] = summarise(report["refresh"], "s")


def _compare(measured: Measurement, cell: str) -> None:
    """Ratios of a width and a window, and what they should be."""
    for engine, base, what, bound, text in (
        ("exact", "published", "step", 1.15, "exact adjoint: at most 1.15 times as long as the published way"),
        ("exact", "published", "memory", 0.4, "exact adjoint: at most 40 % of the published way's memory"),
        ("lowrank", "exact", "step", 1.0, "low-rank with a cached factor: faster than exact"),
    ):
        names = [f"{cell}/{each}/{what}" for each in (engine, base)]
        if all(name in measured.figures for name in names):
            ratio = measured.figures[names[0]].value / measured.figures[names[1]].value
            figure = f"{cell}/{engine}_over_{base}/{what}"
            measured.figures[figure] = summarise([ratio], "x")
            measured.targets.append(Target(figure, bound, f"{cell}: {text}"))


def check_equality(measured: Measurement) -> None:
    """The exact adjoint gives the published way's gradients in float64."""
    make = partial(ReferenceWindow, width=4, size=8, real=6, window=4, dtype=torch.float64)
    published, adjoint = make(published=True).gradient(Unrolled()), make(chunk=4).gradient(Adjoint())
    error = (adjoint - published).norm() / published.norm()
    measured.checks["the adjoint gives the published way's gradients (float64)"] = bool(error < 1e-10)


def measure_factor(measured: Measurement, quick: bool, device: str) -> None:
    """Error of meta-gradients with a cached low-rank Hessian, or with none, against exact ones, in float64.

    On the network whose window gave the factor, and on three foreign ones, initialised anew, as a cached factor meets
    them in all outer steps but the one that made it. Under SGD with hard labels and under Adam with soft ones.
    """
    width, size, real, window, rank = (4, 8, 20, 3, 2) if quick else (32, 32, 250, 15, 8)
    measured.settings["factor"] = f"width {width}, window {window} behind 10 steps, rank {rank}, lr 0.01 (SGD), 0.001"
    make = partial(ReferenceWindow, width, size, real, window, device, torch.float64, warm_up=2 if quick else 10)
    for name, optimizer, soft in (("sgd_hard", InnerOptimizer("sgd", 0.01), False), ("adam_soft", None, True)):
        factor = LowRankHessian(rank, refresh="cached", every=10**9, drift=float("inf"))  # made at its first window
        engines = {"lowrank": Adjoint("lowrank", factor), "zero": Adjoint("zero")}
        found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for seed in range(4):
            place = "foreign" if seed else "own"
            trial = make(optimizer=optimizer, soft=soft, seed=seed)
            exact = trial.gradient(Adjoint()).flatten()
            for engine in engines:
                got = trial.gradient(engines[engine]).flatten()
                found[place, engine, "error"].append(((got - exact).norm() / exact.norm()).item())
                found[place, engine, "cosine"].append(torch.cosine_similarity(got, exact, 0).item())
        for (place, engine, what), values in found.items():
            better: Better = "lower" if what == "error" else "higher"
            figure = f"factor/{name}/{place}/{engine}/{what}"
            measured.figures[figure] = summarise(values, "of the exact" if what == "error" else "", better)


class ReplicatedStep:
    """An outer step of several replicas of RaT-BPTT on random images: MLP of 64 at 14x14 pixels, one image a class.

    Args:
        replicas: as one batch, or taking turns.
        real: real images of each replica's outer loss.
        device: to work on.
        dtype: of everything.
    """

    def __init__(self, replicas: Replicas, real: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        count, generator = len(replicas.each), torch.Generator().manual_seed(0)

        def network() -> MLP:
            return MLP(1, 10, [64], 14, mean=0.0, std=1.0).to(dtype)

        self.replicas, self.seeds = replicas, range(count)
        replicas.prepare(Task(network, 10, 1, 10, learn_labels=True, device=torch.device(device)))
        images, self.image = (
            torch.randn(count, n, 1, 14, 14, generator=generator).to(device, dtype) for n in (10, real)
        )
        self.data = SyntheticData(images, torch.eye(10).expand(count, 10, 10).to(device, dtype))
        self.label = (torch.arange(real) % 10).expand(count, real).to(device)
        replicas.start_epoch(self.data, self.seeds)

    def __call__(self) -> OuterStep:
        return self.replicas.outer_step(self.data, self.image, self.label, self.seeds)


def _rat(steps: int) -> TruncatedBPTT:
    return TruncatedBPTT(steps, RandomWindow(steps // 4), inner_optimizer=InnerOptimizer(lr=0.01))


def check_replicas(measured: Measurement) -> None:
    """A batch of replicas gives what they give one after another in float64."""
    together, alone = (
        ReplicatedStep(made, 20, dtype=torch.float64)() for made in (side_by_side(_rat(12), 3), Replicas(_rat(12), 3))
    )
    error = (together.images - alone.images).norm() / alone.images.norm()
    measured.checks["replicas as one batch give the gradients of each alone (float64)"] = bool(error < 1e-10)


def time_replicas(measured: Measurement, quick: bool, device: str) -> None:
    """An outer step of ten replicas as one batch, against ten that take turns; T = 60, W = 15, 500 real images each."""
    count, steps, real, repeats = (2, 8, 20, 2) if quick else (10, 60, 500, 5)
    kinds = {"together": side_by_side(_rat(steps), count), "alone": Replicas(_rat(steps), count)}
    trials = {name: ReplicatedStep(made, real, device) for name, made in kinds.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trials}
    for number in range(repeats + 1):
        for name, trial in trials.items():
            begin = time.perf_counter()
            trial()
            if device == "cuda":
                torch.cuda.synchronize()
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - begin)
    for name, taken in seconds.items():
        measured.figures[f"replicas/{name}/step"] = summarise(taken, "s")
    ratio = measured.figures["replicas/together/step"].value / measured.figures["replicas/alone/step"].value
    measured.figures["replicas/together_over_alone/step"] = summarise([ratio], "x")
    text = f"{count} replicas as one batch: at most two thirds of the time of {count} alone"
    measured.targets.append(Target("replicas/together_over_alone/step", 2 / 3, text))


def _measure_cell(setting: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each outer step and peak memory, in this process."""
    low_rank = LowRankHessian(setting["rank"], refresh="cached", every=10**9, drift=float("inf"))
    engines: dict[str, GradientEngine] = {
        "published": Unrolled(),
        "unrolled": Unrolled(),
        "exact": Adjoint(),
        "lowrank": Adjoint("lowrank", low_rank),
    }
    name, device = setting["engine"], setting["device"]
    engine, cuda, published = engines[name], device == "cuda", name == "published"
    width, size, real, length = (setting[key] for key in ("width", "size", "real", "window"))
    chunk = None if published else _CHUNK
    window = ReferenceWindow(width, size, real, length, device, chunk=chunk, published=published)
    gc.collect()
    start = peak_memory_mb()

    def timed() -> float:
        begin = time.perf_counter()
        window.gradient(engine)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    report: dict[str, Any] = {}
    first = timed()  # warms up; the low-rank engine factorises
    report["seconds"] = [timed() for _ in range(setting["steps"])]
    if name == "lowrank":
        report["refresh"] = [max(0.0, first - statistics.median(report["seconds"]))]
    report["memory_mb"] = torch.cuda.max_memory_allocated() / 2**20 if cuda else peak_memory_mb() - start
    return report


def paper_steps(where: str, quick: bool = False) -> dict[str, Callable[[], PaperStep]]:
    """A window of 40 inner steps at CIFAR's shapes, 1,000 real images: exact adjoint, and unrolled as published."""

    width, size, real, length = (4, 8, 10, 2) if quick else (128, 32, 1000, 40)

    def make(engine: Callable[[], GradientEngine]) -> PaperStep:
        window = ReferenceWindow(width, size, real, length, where, published=engine is Unrolled)
        return PaperStep(partial(window.gradient, engine()), real, mixed=False)

    engines: dict[str, Callable[[], GradientEngine]] = {"adjoint": Adjoint, "unrolled": Unrolled}
    if where != "cpu":  # graphs are CUDA's
        engines["adjoint_graph"] = partial(Adjoint, graph=True)
    return {name: partial(make, engine) for name, engine in engines.items()}


def gpu_checks(folder: Path, where: str) -> Iterator[Check]:
    """What only this method promises on a GPU."""
    plain = InnerOptimizer("sgd", lr=0.01)
    for name, what, dtype, optimizer, tolerance in (
        ("adjoint", "float32, inner SGD: within 1e-4", torch.float32, plain, 1e-4),
        ("adjoint_adam", "float64, inner Adam: within 1e-8", torch.float64, None, 1e-8),
    ):
        same = partial(same_gradients, where, Unrolled, Adjoint, tolerance, dtype, optimizer)
        yield Check("at_bptt", name, f"the adjoint's meta-gradient is the unrolled engine's, {what}", same)
    what = "inner steps replayed as CUDA graphs: the adjoint's meta-gradient, float32, within 1e-5"
    yield Check("at_bptt", "graph", what, partial(replayed, where, plain))


def same_gradients(
    where: str,
    reference: Callable[[], GradientEngine],
    engine: Callable[[], GradientEngine],
    tolerance: float,
    dtype: torch.dtype = torch.float32,
    optimizer: InnerOptimizer | None = None,
    window: int = 4,
) -> Found:
    """Relative distance of two engines' gradients: ConvNet-3 of width 8, 100 images of 16x16 pixels.

    The unrolled graph is that of PyTorch's own modules, as published.

    So small because a ReLU whose input is zero but for rounding may open in one engine and not in the other: among the
    activations of a large network there are such, and float32 then differs by percents, on any device.
    """
    expected, got = (
        ReferenceWindow(8, 16, 100, window, where, dtype, optimizer, published=make is Unrolled).gradient(make())
        for make in (reference, engine)
    )
    return near(((got - expected).norm() / expected.norm()).item(), 0.0, tolerance)


def replayed(where: str, optimizer: InnerOptimizer) -> Found:
    """The recorded adjoint against the plain one."""
    if where == "cpu":
        raise NotRun("CUDA graphs need a CUDA device")
    return same_gradients(where, Adjoint, partial(Adjoint, graph=True), 1e-5, optimizer=optimizer)


if __name__ == "__main__":
    keep_freed_memory()
    sys.stdout.write(json.dumps(_measure_cell(json.loads(sys.argv[1]))))
