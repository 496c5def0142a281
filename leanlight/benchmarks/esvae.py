"""Benchmark of the ESVAE family: the training step in three formulations and against FSVAE, by layer, and memory."""

from __future__ import annotations

import copy
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from torch import Tensor, nn

from datamodules import ImageDataModule
from leanlight.benchmarks.core import (
    QUIET,
    Measurement,
    PaperStep,
    Target,
    interleave,
    network_step,
    peak_memory_mb,
    ratios,
    summarise,
)
from leanlight.benchmarks.probe import StepProbe
from leanlight.contracts import ImageBatch
from lit_modules.esvae import ESVAE, FSVAE, ImageAutoencoder
from lit_modules.esvae.networks import to_signed
from lit_modules.esvae.reference import Folded, TimeLast

_LATENT = 128
# Names of PyTorch's kernels by kind of layer; everything else is "rest".
_KINDS = {
    "convolution": ("conv", "addmm", "aten::mm", "mkldnn_linear"),
    "norm": ("batch_norm",),
    "neuron": ("aten::ge", "aten::addcmul", "hardtanh", "aten::add"),
}


def run(quick: bool) -> Measurement:
    """Measure everything at the paper's shapes.

    Args:
        quick: tiny shapes and few repetitions: figures without meaning.
    """
    measured = Measurement()
    steps, size = (2, 16) if quick else (16, 32)
    batch_sizes = (4,) if quick else (64, 256)
    measured.settings |= {"image": [1, size, size], "time_steps": steps, "latent_size": _LATENT}
    measured.settings |= {"batch_sizes": list(batch_sizes), "threads": torch.get_num_threads()}
    make = functools.partial(_make, size=size, steps=steps)
    parts: dict[str, Callable[[], None]] = {
        "equality": lambda: check_equality(measured),
        "formulations": lambda: measure_formulations(make, batch_sizes, measured, 2 if quick else 10),
        "layers": lambda: measure_layers(make, batch_sizes[0], measured),
        "Lightning": lambda: measure_lightning(make, 8 if quick else batch_sizes[0], 3 if quick else 10, measured),
        "memory": lambda: measure_memory(batch_sizes[0], size, steps, measured),
    }
    for name, part in parts.items():
        with Console(stderr=True).status(f"esvae: {name}"):
            part()
    return measured


def _make(network: type[ESVAE] | type[FSVAE], size: int, steps: int) -> Any:
    torch.manual_seed(0)
    channels = (32, 64, 128, 256) if size == 32 else (8, 16)
    return network(image_size=size, channels=channels, latent_size=_LATENT, time_steps=steps)


def step(network: Any, image: Tensor) -> None:
    """Loss and gradients of one batch, image (N, C, H, W) in [0, 1]."""
    network.zero_grad(set_to_none=True)
    if isinstance(network, (TimeLast, Folded)):
        mse, divergence = network.losses(image)
    else:
        signed = to_signed(image)
        code = network.encode(signed)
        mse, divergence = (network.decode(code.z) - signed).square().mean(), code.divergence
    (mse + 1e-3 * divergence).backward()


def check_equality(measured: Measurement) -> None:
    """Gradients of the three formulations agree in float64."""
    network = _make(ESVAE, 16, 4).double()
    image = torch.rand(4, 1, 16, 16, dtype=torch.float64)
    gradients = []
    for candidate in (network, TimeLast(network), Folded(network)):
        torch.manual_seed(1)
        step(candidate, image)
        gradients.append({name: p.grad for name, p in candidate.named_parameters() if p.grad is not None})
    same = all(
        torch.allclose(gradient.flatten(), other[name].flatten(), rtol=1e-8, atol=1e-12)
        for other in gradients[1:]
        for name, gradient in gradients[0].items()
        if name in other
    )
    measured.checks["the three formulations give the same gradients (float64)"] = same


def measure_formulations(
    make: Callable[[Any], Any], batch_sizes: tuple[int, ...], measured: Measurement, rounds: int
) -> None:
    """Seconds of a step: time-last 3-D convolutions (a), folded with spikingjelly's neuron (b), ours, and FSVAE.

    Args:
        make: makes a network of a class.
        batch_sizes: images of a step, each measured.
        measured: takes the figures.
        rounds: timed steps of each.
    """
    for size in batch_sizes:
        network = make(ESVAE)
        image = torch.rand(size, *network.image_shape)
        candidates = {"ours": network, "folded": Folded(network), "fsvae": make(FSVAE)}
        calls = {name: functools.partial(step, each.train(), image) for name, each in candidates.items()}
        seconds = interleave(calls, rounds, warmup=1)
        for name, values in seconds.items():
            measured.figures[f"batch_{size}/{name}"] = summarise([1e3 * s for s in values], "ms")
        times = ratios(seconds["folded"], seconds["ours"])
        measured.figures[f"batch_{size}/times_folded"] = summarise(times, "x", "higher")
        measured.figures[f"batch_{size}/fsvae_over_esvae"] = summarise(
            ratios(seconds["fsvae"], seconds["ours"]), "x", None
        )
        if size == batch_sizes[0]:  # the slow one: few rounds, one batch size
            last = {"ours": calls["ours"], "time_last": functools.partial(step, TimeLast(network).train(), image)}
            slow = interleave(last, min(rounds, 3), warmup=1)
            measured.figures[f"batch_{size}/time_last"] = summarise([1e3 * s for s in slow["time_last"]], "ms")
            measured.figures[f"batch_{size}/times_time_last"] = summarise(
                ratios(slow["time_last"], slow["ours"]), "x", "higher"
            )
    first = batch_sizes[0]
    measured.targets += [
        Target(f"batch_{first}/times_time_last", 10.0, "at least 10 times as fast as time-last 3-D convolutions"),
        Target(f"batch_{first}/times_folded", 1.5, "at least 1.5 times as fast as folded time with a plain neuron"),
    ]


def measure_layers(make: Callable[[Any], Any], size: int, measured: Measurement) -> None:
    """Share of the processor time of a step by kind of layer, and share that the system takes, mostly to give memory.

    Args:
        make: makes a network of a class.
        size: images of the step.
        measured: takes the figures.
    """
    network = make(ESVAE).train()
    image = torch.rand(size, *network.image_shape)
    step(network, image)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(network, image)
    spent = dict.fromkeys((*_KINDS, "rest"), 0.0)
    for event in profile.key_averages():
        kind = next((k for k, names in _KINDS.items() if any(n in event.key for n in names)), "rest")
        spent[kind] += event.self_cpu_time_total
    for kind, microseconds in spent.items():
        share = 100 * microseconds / sum(spent.values())
        measured.figures[f"layers/{kind}"] = summarise([share], "% of processor time", None)
    before = os.times()
    step(network, image)
    after = os.times()
    system, user = after.system - before.system, after.user - before.user
    if system + user:  # clocks tick a hundred times a second
        measured.figures["system/share_of_step"] = summarise(
            [100 * system / (system + user)], "% of processor time", None
        )


def measure_lightning(make: Callable[[Any], Any], batch_size: int, steps: int, measured: Measurement) -> None:
    """What a step takes more under Lightning than in a plain loop over a copy of the network, on real digits.

    Args:
        make: makes a network of a class.
        batch_size: images of a step.
        steps: timed steps.
        measured: takes the figures.
    """
    size = make(ESVAE).image_shape[-1]
    data = ImageDataModule("digits", batch_size=batch_size, image_size=size, drop_last=True, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "times.json"
        probe = StepProbe(output, "leanlight.benchmarks.esvae:BareAutoencoderStep", warmup=1)
        limits: dict[str, Any] = {"max_steps": steps + 2, "limit_val_batches": 0, "default_root_dir": folder}
        trainer = pl.Trainer(callbacks=[probe], **limits, **QUIET)
        trainer.fit(ImageAutoencoder(functools.partial(make, ESVAE)), datamodule=data)
        report = json.loads(output.read_text())
    more = [100 * (cycle / bare - 1) for cycle, bare in zip(report["cycle"], report["bare"], strict=True)]
    measured.figures["lightning/more_than_plain_loop"] = summarise(more, "%")
    text = "a step under Lightning takes at most 3 % more than in a plain loop"
    measured.targets.append(Target("lightning/more_than_plain_loop", 3.0, text))


def measure_memory(size: int, image_size: int, steps: int, measured: Measurement) -> None:
    """Peak resident memory of a process that makes two steps, less that of one that makes none.

    Args:
        size: images of a step.
        image_size: side of an image.
        steps: T.
        measured: takes the figures.
    """
    floor = statistics.median(_peak("none", size, image_size, steps) for _ in range(3))
    for name in ("ours", "folded", "time_last"):
        peak = _peak(name, size, image_size, steps) - floor
        measured.figures[f"memory/{name}"] = summarise([peak], "MB above an idle process")


def _peak(name: str, size: int, image_size: int, steps: int) -> float:
    command = [sys.executable, "-m", "leanlight.benchmarks.esvae", name, str(size), str(image_size), str(steps)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _peak_in_this_process(name: str, size: int, image_size: int, steps: int) -> float:
    network = _make(ESVAE, image_size, steps)
    makers: dict[str, Callable[[Any], nn.Module]] = {"ours": lambda n: n, "folded": Folded, "time_last": TimeLast}
    if name in makers:
        candidate = makers[name](network).train()
        image = torch.rand(size, *network.image_shape)
        for _ in range(2):
            step(candidate, image)
    return peak_memory_mb()


class BareAutoencoderStep:
    """The training step of `ImageAutoencoder` as a plain loop would have it, on a copy of its network.

    Args:
        module: whose network is copied.
    """

    def __init__(self, module: ImageAutoencoder) -> None:
        self.network = copy.deepcopy(module.network)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3, weight_decay=1e-3)

    def __call__(self, batch: ImageBatch) -> None:
        """One step on images in [0, 1]."""
        step(self.network, batch.image)
        self.optimizer.step()


def paper_steps(where: str, quick: bool = False) -> dict[str, Callable[[], PaperStep]]:
    """A step of ESVAE and FSVAE at the paper's shapes: T = 16, 250 images of 32x32."""

    batch = 2 if quick else 250

    def make(kind: type[ESVAE] | type[FSVAE]) -> PaperStep:
        network = _make(kind, 32, 16).to(where)
        image = torch.rand(batch, *network.image_shape, device=where)

        def loss() -> Tensor:
            # The whole step through `forward`'s parts, as `step` takes it.
            signed = to_signed(image)
            code = network.encode(signed)
            return (network.decode(code.z) - signed).square().mean() + 1e-3 * code.divergence

        return network_step(network, loss, batch)

    return {"esvae": functools.partial(make, ESVAE), "fsvae": functools.partial(make, FSVAE)}


if __name__ == "__main__":
    print(_peak_in_this_process(sys.argv[1], *map(int, sys.argv[2:])))
