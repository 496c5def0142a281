"""Benchmark of tuning a frozen transformer: steps and exports against plain VPT, stored features, noise, Lightning."""

from __future__ import annotations

import copy
import functools
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from rich.console import Console
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor, nn

from datamodules import ImageDataModule
from leanlight.benchmarks.core import (
    QUIET,
    Measurement,
    PaperStep,
    Target,
    interleave,
    network_step,
    one_thread,
    peak_memory_mb,
    ratios,
    summarise,
    within,
)
from leanlight.benchmarks.corruptions import noise_speed
from leanlight.benchmarks.gpu.checks import Check, Found, near
from leanlight.benchmarks.probe import StepProbe
from leanlight.contracts import MissingExtraError
from lit_modules.classifier.export import export_network
from lit_modules.nn import TimmNet
from lit_modules.spike_nvpt import (
    DensePrompts,
    FullTuning,
    LinearProbe,
    LoRA,
    PromptTuning,
    SpikingPrompts,
    TunedClassifier,
)
from lit_modules.spike_nvpt.reference import PlainVPT
from lit_modules.spike_nvpt.tuning import Tuning

_CLASSES = 10


@dataclass(frozen=True)
class Shapes:
    """What is measured.

    Args:
        name: of the network in timm.
        options: of the network in timm.
        batch: images of a step.
        length: prompts in a set (L).
        last: blocks that get prompts where the others are stored.
    """

    name: str
    options: dict[str, Any]
    batch: int
    length: int
    last: int

    @property
    def image(self) -> tuple[int, int, int, int]:
        """(N, C, H, W) of a batch."""
        return self.batch, 1, self.options["img_size"], self.options["img_size"]

    def network(self) -> TimmNet:
        """A network of random weights, always the same."""
        torch.manual_seed(0)
        return TimmNet(self.name, in_channels=1, num_classes=_CLASSES, options=self.options)

    def dense(self) -> PromptTuning:
        """VPT with deep prompts."""
        return PromptTuning(functools.partial(DensePrompts, length=self.length))

    def spiking(self, **depth: Any) -> PromptTuning:
        """Spike-NVPT. depth: of its prompts."""
        return PromptTuning(functools.partial(SpikingPrompts, length=self.length), **depth)


# Layer scales of 1, as a trained network may have them: at timm's 1e-5 prompts would hardly move the logits. As many
# prompts as in spike_nvpt/cifar10_small: of 17 + L tokens, L decides what prompts cost beside full tuning.
_SMALL = Shapes("vit_small_patch14_dinov2", {"img_size": 56, "init_values": 1.0}, batch=64, length=5, last=4)
_TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4}
_QUICK = Shapes("vit_tiny_patch16_224", _TINY, batch=8, length=4, last=2)


@one_thread()
def run(quick: bool = False) -> Measurement:
    """Measure on one thread of the CPU.

    quick: tiny sizes: figures without meaning.
    """
    shapes, rounds = (_QUICK, 2) if quick else (_SMALL, 10)
    settings = {"network": shapes.name, "options": shapes.options, "image": list(shapes.image)}
    measured = Measurement(settings=settings | {"prompts": shapes.length, "threads": 1})
    parts: dict[str, Callable[[], None]] = {
        "equality": lambda: check_equality(shapes, measured),
        "steps": lambda: measure_steps(shapes, measured, rounds),
        "memory": lambda: measure_memory(quick, measured),
        "exports": lambda: measure_exports(shapes, measured, rounds),
        "a stored prefix": lambda: measure_prefix(shapes, measured, rounds),
        "a linear probe": lambda: measure_probe(shapes, measured, 2 if quick else 4),
        "Lightning": lambda: measure_lightning(shapes, measured, 3 if quick else 12),
        "noise": lambda: measure_noise(measured, rounds),
    }
    for name, part in parts.items():
        with Console(stderr=True).status(f"spike_nvpt: {name}"):
            part()
    return measured


def batch_of(shapes: Shapes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Images of noise and their labels."""
    torch.manual_seed(1)
    return torch.rand(shapes.image, dtype=dtype), torch.arange(shapes.batch) % _CLASSES


# -- equality


def check_equality(shapes: Shapes, measured: Measurement) -> None:
    """Our VPT is the plain one; our neurons' gradients are spikingjelly's."""
    image, label = batch_of(shapes, torch.float64)
    network = shapes.dense().adapt(shapes.network())
    assert isinstance(network.prompts, DensePrompts)
    plain = PlainVPT(shapes.network(), network.prompts()).double()
    ours, theirs = network.double()(image), plain(image)
    text = "deep prompts: logits of the plain loop, float64, within 1e-12"
    measured.checks[text] = torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    for logits in (ours, theirs):
        F.cross_entropy(logits, label).backward()
    text = "deep prompts: gradients of the plain loop within 1e-6 of the largest (prompts are float32)"
    measured.checks[text] = within(network.prompts.latents.grad, plain.prompts.grad, 1e-6)
    for time_steps in (1, 4, 16):
        found, expected = spiking_gradients(time_steps)
        text = f"T = {time_steps}: rates and their gradients are those of spikingjelly's neuron, float64, within 1e-12"
        measured.checks[text] = all(within(*pair, 1e-12) for pair in zip(found, expected, strict=True))


def spiking_gradients(time_steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Rates under constant currents and the gradient of a weighted sum of them, by our neuron and spikingjelly's."""
    torch.manual_seed(0)
    prompts = SpikingPrompts(2, 64, patch_values=3, length=8, time_steps=time_steps)
    weight = torch.randn(prompts.shape, dtype=torch.float64)
    theirs = neuron.IFNode(1.0, None, surrogate.Sigmoid(2.0), detach_reset=True, step_mode="m")
    sides = []
    for node in (prompts.neuron, theirs):
        current = prompts.latents.detach().double().requires_grad_()
        node.reset()
        rate = node(current.expand(time_steps, *current.shape)).mean(0)
        (weight * rate).sum().backward()
        assert current.grad is not None
        sides.append([rate.detach(), current.grad])
    return sides[0], sides[1]


# -- steps


def step_of(network: nn.Module, image: Tensor, label: Tensor) -> Callable[[], None]:
    """A training step of what is trained of a network."""
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    network.train()

    def step() -> None:
        loss = F.cross_entropy(network(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def networks(shapes: Shapes) -> dict[str, Callable[[], nn.Module]]:
    """What makes each tuned network whose step is measured."""

    def plain() -> nn.Module:
        dense = shapes.dense().adapt(shapes.network())
        assert dense.prompts is not None
        # A loop written by hand leaves the mode of frozen parts alone; here it has no dropout that would matter.
        return PlainVPT(shapes.network(), dense.prompts())

    def tuned(tuning: Tuning) -> nn.Module:
        return tuning.adapt(shapes.network())

    rules = {"spike": shapes.spiking(), "vpt": shapes.dense(), "lora": LoRA(), "full": FullTuning()}
    return {"plain_vpt": plain, **{name: functools.partial(tuned, rule) for name, rule in rules.items()}}


def measure_steps(shapes: Shapes, measured: Measurement, rounds: int) -> None:
    """A step of Spike-NVPT and of its rivals, side by side."""
    image, label = batch_of(shapes)
    steps = {}
    for name, make in networks(shapes).items():
        try:
            steps[name] = step_of(make(), image, label)
        except MissingExtraError as error:
            measured.missing[f"step/{name}"] = str(error)
    seconds = interleave(steps, rounds, warmup=1)
    for name, found in seconds.items():
        measured.figures[f"step/{name}"] = summarise([1000 * each for each in found], "ms")
    pairs = {"spike_over_plain_vpt": 1.05, "vpt_over_plain_vpt": None, "vpt_over_full": 0.95, "lora_over_vpt": None}
    for name, bound in pairs.items():
        over, _, under = name.partition("_over_")
        if over in seconds and under in seconds:
            measured.figures[f"step/{name}"] = summarise(ratios(seconds[over], seconds[under]), "x")
            if bound is not None:
                text = (
                    f"a step of {over.replace('_', ' ')} takes at most {bound} times that of {under.replace('_', ' ')}"
                )
                measured.targets.append(Target(f"step/{name}", bound, text))


def measure_memory(quick: bool, measured: Measurement) -> None:
    """Peak resident memory of a process that makes two steps, above that of one that makes the network alone."""
    size = "quick" if quick else "full"
    floor = statistics.median(_peak("none", size) for _ in range(1 if quick else 3))
    for name in ("spike",) if quick else ("spike", "vpt", "lora", "full"):
        if f"step/{name}" in measured.figures:
            measured.figures[f"memory/{name}"] = summarise([_peak(name, size) - floor], "MB above an idle process")


def _peak(name: str, size: str) -> float:
    command = [sys.executable, "-m", "leanlight.benchmarks.spike_nvpt", name, size]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _peak_in_this_process(name: str, size: str) -> float:
    torch.set_num_threads(1)
    shapes = _QUICK if size == "quick" else _SMALL
    network = networks(shapes)["plain_vpt" if name == "none" else name]()
    if name != "none":
        step = step_of(network, *batch_of(shapes))
        for _ in range(2):
            step()
    return peak_memory_mb()


# -- what is taken away


def measure_exports(shapes: Shapes, measured: Measurement, rounds: int) -> None:
    """A pass of the exported networks, as plain PyTorch loads them."""
    image, _ = batch_of(shapes)
    passes: dict[str, Callable[[], Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, rule in {"spike": shapes.spiking(), "vpt": shapes.dense()}.items():
            network = rule.adapt(shapes.network()).eval()
            place = Path(folder) / name
            place.mkdir()
            export_network(network.folded(), image, place)
            program = torch.export.load(place / "network.pt2").module()
            passes[name] = functools.partial(_without_gradients, program, image)
            same = torch.equal(passes[name](), _without_gradients(network, image))
            measured.checks[f"{name}: logits of the export are those of the live network, bit for bit"] = same
    seconds = interleave(passes, 2 * rounds, warmup=2)
    for name, found in seconds.items():
        measured.figures[f"export/{name}"] = summarise([1000 * each for each in found], "ms")
    measured.figures["export/spike_over_vpt"] = summarise(ratios(seconds["spike"], seconds["vpt"]), "x")
    text = "a pass of the exported network takes at most 1.02 times that of exported VPT"
    measured.targets.append(Target("export/spike_over_vpt", 1.02, text))


@torch.no_grad()
def _without_gradients(network: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    return network(image)


# -- what is computed once


def measure_prefix(shapes: Shapes, measured: Measurement, rounds: int) -> None:
    """Prompts in the last blocks: a step on what the blocks before them gave, and a step from the image on."""
    image, label = batch_of(shapes)
    network = shapes.spiking(depth="last", blocks=shapes.last).adapt(shapes.network())
    stored = _without_gradients(network.prefix, image)
    same = torch.equal(_without_gradients(network, image), _without_gradients(network.suffix, stored))
    measured.checks["stored prefix: the logits of a pass from the image on, bit for bit"] = same
    twin = copy.deepcopy(network)
    behind = _Suffix(twin)
    ways = {"recomputed": step_of(network, image, label), "stored": step_of(behind, stored, label)}
    seconds = interleave(ways, rounds, warmup=1)
    pairs = zip(network.parameters(), twin.parameters(), strict=True)
    same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
    measured.checks[f"stored prefix: the same weights after {rounds + 1} steps, bit for bit"] = same
    for name, found in seconds.items():
        measured.figures[f"prefix/{name}"] = summarise([1000 * each for each in found], "ms")
    faster = ratios(seconds["recomputed"], seconds["stored"])
    measured.figures["prefix/speedup"] = summarise(faster, "x", "higher")
    text = f"prompts in the last {shapes.last} blocks: a step at least 1.8 times as fast with the prefix stored"
    measured.targets.append(Target("prefix/speedup", 1.8, text))


class _Suffix(nn.Module):
    """What follows the stored part of a tuned network."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, stored: Tensor) -> Tensor:
        return self.network.suffix(stored)


class _Epochs(pl.Callback):
    """Seconds of each epoch's steps, and of everything before the first."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self.begin)


def _fit(shapes: Shapes, tuning: Tuning, callback: pl.Callback, store: bool = True, **limits: Any) -> TunedClassifier:
    """Fit on digits at the size of the network; no checkpoints, no logs."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    size = shapes.options["img_size"]
    data = ImageDataModule("digits", batch_size=shapes.batch, image_size=size, drop_last=True, seed=0)
    network = functools.partial(TimmNet, shapes.name, in_channels=1, num_classes=None, options=shapes.options)
    torch.manual_seed(0)
    module = TunedClassifier(network, tuning, store_frozen=store)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own: dict[str, Any] = {"accelerator": "cpu", "limit_val_batches": 0, "default_root_dir": folder}
        pl.Trainer(callbacks=[callback], **own, **limits, **QUIET).fit(module, datamodule=data)
    return module


def measure_probe(shapes: Shapes, measured: Measurement, epochs: int) -> None:
    """Epochs of a linear probe on features that are stored, and on features computed anew."""
    seconds, heads = {}, {}
    for name, store in (("stored", True), ("recomputed", False)):
        clock = _Epochs()
        module = _fit(shapes, LinearProbe(), clock, store, max_epochs=epochs)
        seconds[name], heads[name] = clock.seconds[1:], module.network.net.network.get_classifier().weight.detach()
        measured.figures[f"probe/{name}"] = summarise(seconds[name], "s an epoch")
    faster = ratios(seconds["recomputed"], seconds["stored"])
    measured.figures["probe/speedup"] = summarise(faster, "x", "higher")
    measured.targets.append(
        Target("probe/speedup", 20.0, "a linear probe's epoch at least 20 times as fast on stored features")
    )
    text = f"stored features: the weights that recomputing gives after {epochs} epochs, within 1e-5 of the largest"
    measured.checks[text] = within(heads["stored"], heads["recomputed"], 1e-5)


# -- under Lightning


def measure_lightning(shapes: Shapes, measured: Measurement, steps: int) -> None:
    """What a step takes more under Lightning than in a plain loop over a copy of the network, on real digits."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "times.json"
        probe = StepProbe(output, "lit_modules.spike_nvpt.reference:BareTunedStep", warmup=1)
        _fit(shapes, shapes.spiking(), probe, max_steps=steps + 2)
        report = json.loads(output.read_text())
    more = [100 * (cycle / bare - 1) for cycle, bare in zip(report["cycle"], report["bare"], strict=True)]
    measured.figures["lightning/more_than_plain_loop"] = summarise(more, "%")
    text = "a step under Lightning takes at most 3 % more than in a plain loop"
    measured.targets.append(Target("lightning/more_than_plain_loop", 3.0, text))
    measured.checks["Lightning: same weights as the plain loop, bit for bit"] = report["equal"]


def measure_noise(measured: Measurement, rounds: int) -> None:
    """Noise on batches of 32-pixel images against one image at a time."""
    noise = noise_speed(rounds)
    measured.settings |= noise.settings
    measured.figures |= noise.figures
    measured.targets += noise.targets


# -- on a GPU


def paper_steps(where: str, quick: bool = False) -> dict[str, Callable[[], PaperStep]]:
    """Tuning ViT-B/16 at 224 pixels with 50 deep prompts, 64 images: usual for prompts, the paper's are not known."""

    def make(prompts: Any) -> PaperStep:
        torch.manual_seed(0)
        name, options = (_QUICK.name, _QUICK.options) if quick else ("vit_base_patch16_224", {})
        batch, side = (2, _QUICK.options["img_size"]) if quick else (64, 224)
        rule = PromptTuning(functools.partial(prompts, length=4 if quick else 50))
        network = rule.adapt(TimmNet(name, num_classes=100, options=options)).to(where)
        image, label = torch.rand(batch, 3, side, side, device=where), torch.arange(batch, device=where) % 100
        return network_step(network, lambda: F.cross_entropy(network(image), label), batch)

    return {"spike": functools.partial(make, SpikingPrompts), "vpt": functools.partial(make, DensePrompts)}


def gpu_checks(folder: Path, where: str) -> Iterator[Check]:
    """What only this method promises on a GPU."""
    what = "bits of spiking prompts on the GPU are the CPU's, under autocast, too; gradients within 1e-5"
    yield Check("spike_nvpt", "bits", what, functools.partial(same_bits, where))


def same_bits(where: str) -> Found:
    """The largest difference of tokens or, divided by their largest, of gradients of the latents."""
    torch.manual_seed(0)
    prompts = SpikingPrompts(12, 384, patch_values=3, length=50)
    weight = torch.randn(prompts.shape)
    results = []
    for device, mixed in (("cpu", False), (where, False), (where, True)):
        own = copy.deepcopy(prompts).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=mixed):
            tokens = own()
            (tokens * weight.to(device)).sum().backward()
        assert own.latents.grad is not None
        results.append((tokens.detach().cpu(), own.latents.grad.cpu()))
    (tokens, gradient), *others = results
    far = [float((other - tokens).abs().max()) for other, _ in others]
    far += [float((other - gradient).abs().max() / gradient.abs().max()) for _, other in others]
    return near(max(far), 0.0, 1e-5)


if __name__ == "__main__":
    print(_peak_in_this_process(*sys.argv[1:]))
