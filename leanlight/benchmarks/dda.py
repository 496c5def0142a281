"""Benchmark of data-free distillation: inversion, student, banks, pools and samples, each against the public way."""

from __future__ import annotations

import functools
import itertools
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from datamodules.images.bank import BankDataModule
from datamodules.noise import NoiseDataModule
from leanlight.benchmarks.classifier import loader_pass, same_items
from leanlight.benchmarks.core import (
    QUIET,
    Measurement,
    PaperStep,
    Target,
    interleave,
    network_step,
    one_thread,
    ratios,
    summarise,
    within,
)
from leanlight.benchmarks.gpu.checks import Check, Found, near
from leanlight.benchmarks.probe import StepProbe
from leanlight.contracts import MissingExtraError, derived_seed
from leanlight.ops import counter
from lit_modules.dda import (
    AlignHead,
    BankSynthesis,
    DataFreeDistillation,
    Generator,
    GeneratorInversion,
    ImagePool,
    Synthesized,
    Teacher,
    TinyDiffusion,
    kd_losses,
    write_bank,
)
from lit_modules.dda.bank import in_8_bits, originals
from lit_modules.dda.reference import crop_each, plain_inversion
from lit_modules.dda.sampling import generators, require_diffusers, sample, start_noise
from lit_modules.dda.students import logits_and_map
from lit_modules.frozen import Frozen
from lit_modules.nn import CifarResNet, ResNet18, ResNet34

_CLASSES, _LATENT = 10, 256


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Args:
        side: of an image with three channels, in pixels.
        depth: of the teacher, a CifarResNet; the student has 8 layers.
        items: images of a call of the inversion (N).
        width: channels of its generator.
        steps: of a call that is timed.
        rounds: calls that count.
        batch: images of a student's step.
        kd_steps: of a student that count.
        bank: images of a bank.
        pools: images of a small pool and of a large one.
        samples: drawn together from a diffusion model of 16 pixels.
        sample_steps: of DDIM.
        calls: of the inversion for a bank that one process makes, and two.
    """

    side: int = 32
    depth: int = 20
    items: int = 200
    width: int = 64
    steps: int = 2
    rounds: int = 4
    batch: int = 128
    kd_steps: int = 30
    bank: int = 5_000
    pools: tuple[int, int] = (10_000, 100_000)
    samples: int = 32
    sample_steps: int = 10
    calls: int = 6

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return 3, self.side, self.side

    @property
    def network(self) -> Callable[[], CifarResNet]:
        """Makes the teacher's network."""
        return functools.partial(CifarResNet, depth=self.depth)

    def teacher(self) -> Frozen[nn.Module]:
        """A teacher of random weights whose batch norms have seen noise, always the same."""
        torch.manual_seed(0)
        network = self.network()
        for _ in range(3):
            network(torch.rand(32, *self.shape))
        return Frozen(network)

    def teacher_from(self, folder: Path) -> Teacher:
        """The same by a file that every process reads."""
        path = folder / "teacher.safetensors"
        if not path.is_file():
            save_file(self.teacher().network.state_dict(), path)
        return Teacher(network=self.network, weights=path)


_FULL = Sizes()
_QUICK = Sizes(
    side=8,
    depth=8,
    items=6,
    width=8,
    rounds=2,
    batch=16,
    kd_steps=3,
    bank=160,
    pools=(100, 400),
    samples=3,
    sample_steps=2,
    calls=2,
)


@one_thread()
def run(quick: bool = False) -> Measurement:
    """Measure on one thread of the CPU.

    quick: tiny sizes: figures without meaning.
    """
    sizes = _QUICK if quick else _FULL
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    measured = Measurement(settings={"teacher": f"CifarResNet-{sizes.depth}", "student": "CifarResNet-8"})
    measured.settings |= {"image": list(sizes.shape), "N": sizes.items, "generator_width": sizes.width}
    measured.settings |= {"kd_batch": sizes.batch, "bank": sizes.bank, "pools": list(sizes.pools), "threads": 1}
    parts: dict[str, Callable[[Sizes, Path, Measurement], None]] = {
        "equality": check_equality,
        "inversion": measure_inversion,
        "a student": measure_student,
        "a bank": measure_bank,
        "pools": measure_pools,
        "samples": measure_samples,
        "two processes": measure_processes,
    }
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_images(sizes, Path(folder))
        for name, part in parts.items():
            with Console(stderr=True).status(f"dda: {name}"):
                part(sizes, Path(folder), measured)
    return measured


# -- inversion


def our_call(sizes: Sizes, teacher: Frozen[Any], steps: int, augment: str | None = "flip_then_shift") -> Synthesized:
    """A call of our inversion. teacher: gets into our memory format."""
    inversion = GeneratorInversion(steps=steps, width=sizes.width, augment=augment)
    return inversion(teacher, *_start(sizes.items), sizes.shape, seed=0)


def plain_call(
    sizes: Sizes, teacher: Frozen[Any], steps: int, augment: Callable[[Tensor], Tensor] | None = crop_each
) -> Synthesized:
    """The same in a plain loop, from the same weights and latents."""
    draws = torch.Generator().manual_seed(derived_seed(0, "start"))
    generator = Generator.fresh(sizes.shape, draws, latent_size=_LATENT, width=sizes.width)
    return plain_inversion(teacher.network, generator, *_start(sizes.items), steps, augment)


def _start(items: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Latents and classes of so many images."""
    index = torch.arange(items, device=device)
    return counter.noise(0, index, _LATENT), counter.labels(0, index, _CLASSES)


def first_gradients(call: Callable[[], object]) -> list[Tensor]:
    """What a call's optimiser is given in its first step, by parameter."""
    gradients: list[Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not gradients:
            gradients.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])

    handle = register_optimizer_step_pre_hook(keep)
    try:
        call()
    finally:
        handle.remove()
    return gradients


def check_equality(sizes: Sizes, folder: Path, measured: Measurement) -> None:
    """Without augmentation, whose draws differ, a call of ours begins as the plain loop does."""
    found, expected = (call(sizes, sizes.teacher(), 1, None).first for call in (our_call, plain_call))
    terms = all(within(found[name], value, 1e-4) for name, value in expected.items())
    measured.checks["inversion: first loss and its terms are the plain loop's within 1e-4"] = terms
    # Among millions of activations rounding alone puts some on the other side of 0, and their gradients with them.
    ours, theirs = (
        first_gradients(functools.partial(call, _QUICK, _QUICK.teacher(), 1, None)) for call in (our_call, plain_call)
    )
    same = all(within(mine, plain, 1e-3) for mine, plain in zip(ours, theirs, strict=True))
    text = f"inversion of {_QUICK.items} small images: first gradients are the plain loop's within 1e-3 of the largest"
    measured.checks[text] = same


def measure_inversion(sizes: Sizes, folder: Path, measured: Measurement) -> None:
    """A step of the inversion and of the plain loop, with augmentation and without."""
    ours, theirs, steps = sizes.teacher(), sizes.teacher(), sizes.steps
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: our_call(sizes, ours, steps),
        "plain": lambda: plain_call(sizes, theirs, steps),
        "ours_not_augmented": lambda: our_call(sizes, ours, steps, None),
        "plain_not_augmented": lambda: plain_call(sizes, theirs, steps, None),
    }
    seconds = interleave(calls, sizes.rounds, warmup=1)
    for name, found in seconds.items():
        measured.figures[f"inversion/{name}"] = summarise([1000 * each / steps for each in found], "ms a step")
    for kind in ("", "_not_augmented"):
        faster = ratios(seconds[f"plain{kind}"], seconds[f"ours{kind}"])
        measured.figures[f"inversion/speedup{kind}"] = summarise(faster, "x", "higher")
    text = "a step of the inversion at least 1.3 times as fast as in a plain loop that crops image by image"
    measured.targets.append(Target("inversion/speedup", 1.3, text))


# -- images on the disk


def write_images(sizes: Sizes, folder: Path) -> None:
    """Smooth images of noise in order of their classes: ``bank``, the same as ``png``, and a few ``real`` ones."""
    coarse = torch.rand(sizes.bank, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images = in_8_bits(F.interpolate(coarse, sizes.side, mode="bicubic").clamp(0, 1))
    labels = torch.arange(sizes.bank) * _CLASSES // sizes.bank
    names = [str(label) for label in range(_CLASSES)]
    write_bank(folder / "bank", images, originals(labels.numpy(), labels.numpy()), names, teacher=None)
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        _write_png(folder / "png" / names[label] / f"{number:06}.png", image)
    for part, name in itertools.product(("train", "test"), names):
        _write_png(folder / "real" / part / name / "0.png", images[int(name)])


def _write_png(path: Path, image: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


def open_bank(sizes: Sizes, folder: Path, **options: Any) -> BankDataModule:
    """The bank beside the real images."""
    own: dict[str, Any] = {"dataset": "image_folder", "path": folder / "real", "image_size": sizes.side, "seed": 0}
    data = BankDataModule([folder / "bank"], val_fraction=0.0, **own, **options)
    data.setup()
    return data


def measure_bank(sizes: Sizes, folder: Path, measured: Measurement) -> None:
    """A pass over a bank, and over the same images in a folder that torchvision reads; float images in both."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    data, pictures = open_bank(sizes, folder), ImageFolder(str(folder / "png"), ToTensor())
    text = "a bank and a folder of PNG files give the same pixels and labels"
    measured.checks[text] = same_items(data, pictures, min(sizes.bank, 512))

    def ours() -> None:
        for batch in data.train_dataloader():
            data.on_after_batch_transfer(batch, 0)

    workers = min(os.cpu_count() or 1, 8)
    public = {"png_folder": 0, f"png_folder_{workers}_workers": workers}
    passes = {name: loader_pass(pictures, count) for name, count in public.items()}
    seconds = interleave({"ours": ours, **passes}, sizes.rounds, warmup=1)
    speed = {name: [sizes.bank / each for each in found] for name, found in seconds.items()}
    for name, found in speed.items():
        measured.figures[f"bank/{name}"] = summarise(found, "images/s", "higher")
    fastest = max(public, key=lambda name: statistics.median(speed[name]))
    faster = ratios(speed["ours"], speed[fastest])
    measured.figures["bank/times_png_folder"] = summarise(faster, "x", "higher")
    text = "a bank is read at least 10 times as fast as a folder of PNG files by ImageFolder and its fastest DataLoader"
    measured.targets.append(Target("bank/times_png_folder", 10.0, text))


# -- a student


def measure_student(sizes: Sizes, folder: Path, measured: Measurement) -> None:
    """What a step of the student takes more under Lightning than in a plain loop over a copy of it."""
    teacher, output = sizes.teacher_from(folder), folder / "times.json"
    torch.manual_seed(0)
    module = DataFreeDistillation(functools.partial(CifarResNet, depth=8), teacher, recipe="kl")
    probe = StepProbe(output, "lit_modules.dda.reference:BareDistillationStep", warmup=1)
    limits: dict[str, Any] = {"max_steps": sizes.kd_steps + 2, "limit_val_batches": 0, "default_root_dir": folder}
    data = open_bank(sizes, folder, batch_size=sizes.batch, augment="flip_crop", drop_last=True)
    pl.Trainer(accelerator="cpu", callbacks=[probe], **limits, **QUIET).fit(module, datamodule=data)
    report = json.loads(output.read_text())
    measured.figures["student/bare"] = summarise([1000 * each for each in report["bare"]], "ms a step")
    more = [100 * (cycle / bare - 1) for cycle, bare in zip(report["cycle"], report["bare"], strict=True)]
    measured.figures["student/more_than_plain_loop"] = summarise(more, "%")
    text = "a step of the student under Lightning takes at most 3 % more than in a plain loop"
    measured.targets.append(Target("student/more_than_plain_loop", 3.0, text))
    measured.checks["Lightning: same student as the plain loop, bit for bit"] = report["equal"]


# -- memory of pools


def measure_pools(sizes: Sizes, folder: Path, measured: Measurement) -> None:
    """Memory of a process that reads every image of a small pool, in batches and in random order, then of a large one.

    Pages of a pool's file count for ``peak`` alone: the kernel takes them back where it needs room.
    """
    states = []
    for items in sizes.pools:
        pool = ImagePool(folder / f"pool_{items}", items, sizes.shape)
        for index in torch.arange(items).split(1024):
            images = counter.pixels(0, index, int(np.prod(sizes.shape))).view(-1, *sizes.shape)
            pool.put(index, images, torch.zeros_like(index))
        pool.grow(items)
        states.append(pool.state_dict())
    found = _in_a_process("leanlight.benchmarks.pools", states)
    if None in (memory["private"] for memory in found):
        measured.missing["pool"] = "this system tells nobody which memory is no file's"
        return
    for name, memory in zip(("small", "large"), found, strict=True):
        measured.figures[f"pool/private_{name}"] = summarise([memory["private"]], "MB")
        measured.figures[f"pool/peak_{name}"] = summarise([memory["peak"]], "MB", None)
    ratio = found[1]["private"] / found[0]["private"]
    measured.figures["pool/large_over_small"] = summarise([ratio], "x")
    small, large = (f"{items:,}" for items in sizes.pools)
    text = f"a process that reads a pool of {large} images has at most 1.02 times the memory of one of {small}"
    measured.targets.append(Target("pool/large_over_small", 1.02, text))


def _in_a_process(module: str, *arguments: Any) -> Any:
    """What a module finds in a process of its own; all of it goes by JSON."""
    command = [sys.executable, "-m", module, *map(json.dumps, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


# -- samples


def measure_samples(sizes: Sizes, folder: Path, measured: Measurement) -> None:
    """Images of a small diffusion model by our loop and by diffusers' pipeline of what the model exports."""
    try:
        diffusers = require_diffusers()
    except MissingExtraError as error:
        measured.missing["samples"] = str(error)
        return
    torch.manual_seed(0)
    model = TinyDiffusion().eval()
    pipeline, scheduler = diffusers.DDIMPipeline(model.average.unet, model.make_scheduler()), model.make_scheduler()
    pipeline.set_progress_bar_config(disable=True)
    steps, seeds = sizes.sample_steps, range(sizes.samples)

    @torch.no_grad()
    def ours() -> Tensor:
        noise = start_noise(generators(seeds), model.image_shape, "cpu")
        made = sample(model.denoiser(None, 1.0), scheduler, noise, steps)
        return (made / 2 + 0.5).clamp(0, 1)

    def theirs() -> Tensor:
        made = pipeline(len(seeds), generators(seeds), num_inference_steps=steps, output_type="np").images
        return torch.from_numpy(made).permute(0, 3, 1, 2)

    text = "samples are those of diffusers' DDIMPipeline from the same seeds, within 1e-5"
    measured.checks[text] = torch.allclose(ours(), theirs(), rtol=0, atol=1e-5)
    seconds = interleave({"ours": ours, "pipeline": theirs}, 2 * sizes.rounds, warmup=1)
    for name, found in seconds.items():
        measured.figures[f"samples/{name}"] = summarise([1000 * each / sizes.samples for each in found], "ms an image")
    measured.figures["samples/ours_over_pipeline"] = summarise(ratios(seconds["ours"], seconds["pipeline"]), "x")
    text = "samples take no longer than by diffusers' own pipeline at equal steps, within 2 %"
    measured.targets.append(Target("samples/ours_over_pipeline", 1.02, text))


# -- several processes


class _Clock(pl.Callback):
    """Writes the seconds between the first batch and the last."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.begin = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.output.write_text(str(time.perf_counter() - self.begin))


def measure_processes(sizes: Sizes, folder: Path, measured: Measurement) -> None:
    """Seconds in which one process and two make the same bank, one thread each, where cores are free."""
    sizes.teacher_from(folder)
    seconds = _in_a_process("leanlight.benchmarks.dda", sizes == _QUICK, str(folder))
    for processes, found in seconds.items():
        measured.figures[f"synthesis/{processes}"] = summarise([found], "s")
    faster = ratios([seconds["one_process"]], [seconds["two_processes"]])
    measured.figures["synthesis/speedup_of_two"] = summarise(faster, "x", "higher")
    one, two = (np.load(folder / name / "pool" / "images.npy") for name in ("one_process", "two_processes"))
    measured.checks["two processes make the images of one, bit for bit"] = bool((one == two).all())


def synthesis_seconds(quick: bool, folder: str) -> dict[str, float]:
    """Make a bank by two processes and by one."""
    sizes, place = _QUICK if quick else _FULL, Path(folder)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seconds = {}
    # Forked first: a process that has computed is no good parent.
    for name, devices, strategy in (("two_processes", 2, "ddp_fork"), ("one_process", 1, "auto")):
        inversion = GeneratorInversion(steps=2 * sizes.steps, width=sizes.width)
        module = BankSynthesis(sizes.teacher_from(place), inversion, seed=0)
        items = sizes.items // 2
        data = NoiseDataModule("cifar10", sizes.calls * items, items, _LATENT, sizes.side, seed=0)
        (place / name).mkdir()
        own: dict[str, Any] = {"accelerator": "cpu", "devices": devices, "strategy": strategy, "max_epochs": 1}
        clock = _Clock(place / name / "seconds.txt")
        trainer = pl.Trainer(callbacks=[clock], default_root_dir=place / name, **own, **QUIET)
        trainer.fit(module, datamodule=data)
        seconds[name] = float(clock.output.read_text())
    return seconds


# -- on a GPU


def paper_steps(where: str, quick: bool = False) -> dict[str, Callable[[], PaperStep]]:
    """The paper's networks on 32 pixels: inversion of a ResNet-34 (N = 200), and a ResNet-18 that it teaches."""
    shape = (3, 8, 8) if quick else (3, 32, 32)
    items, batch, width = (2, 2, 4) if quick else (200, 128, 64)  # generator and networks are equally wide

    def networks() -> tuple[Frozen[nn.Module], nn.Module]:
        torch.manual_seed(0)
        return Frozen[nn.Module](ResNet34(width=width)).to(where), ResNet18(width=width).to(where)

    def inversion() -> PaperStep:
        teacher, _ = networks()
        start, steps = _start(items, where), 1 if quick else 10
        # Ten steps in a call: one of them alone would be lost in the making of the generator.
        call = GeneratorInversion(steps=steps, width=width)
        return PaperStep(lambda: call(teacher, *start, shape, seed=0), steps * items)

    def student() -> PaperStep:
        teacher, network = networks()
        image, label = torch.rand(batch, *shape, device=where), torch.arange(batch, device=where) % _CLASSES
        with torch.no_grad():
            maps = [logits_and_map(each, image)[1].shape[1:] for each in (network, teacher.network)]
        align = AlignHead(*maps).to(where)

        def loss() -> Tensor:
            with torch.no_grad():
                answer, theirs = logits_and_map(teacher.network, image)
            logits, ours = logits_and_map(network, image)
            terms = kd_losses("kl_ce_fea", logits, answer, label, maps=(align(ours), theirs))
            return terms["distillation"] + terms["cross_entropy"] + 30 * terms["features"]

        return network_step(nn.ModuleList([network, align]), loss, batch)

    return {"inversion": inversion, "student": student}


def gpu_checks(folder: Path, where: str) -> Iterator[Check]:
    """What only this method promises on a GPU."""
    what = "inversion: first loss terms, best loss and distances by layer on the GPU are the CPU's within 1e-3"
    yield Check("dda", "inversion", what, functools.partial(same_inversion, where))
    what = "samples of a small diffusion model on the GPU are the CPU's within 1e-3"
    yield Check("dda", "samples", what, functools.partial(same_samples, where))


def same_inversion(where: str, steps: int = 3) -> Found:
    """The largest relative difference of what a call tells, on the device and on the CPU."""
    sizes, results = Sizes(side=16, items=32, width=16), []
    for device in ("cpu", where):
        call = GeneratorInversion(steps=steps, width=sizes.width)
        made = call(sizes.teacher().to(device), *_start(sizes.items, device), sizes.shape, seed=0)
        told = [*made.first.values(), made.best["loss"], *made.bn_layers]
        results.append(torch.stack(told).cpu())
    expected, found = results
    return near(float(((found - expected) / expected).abs().max()), 0.0, 1e-3)


def same_samples(where: str) -> Found:
    """The largest difference of a pixel in [-1, 1], on the device and on the CPU."""
    torch.manual_seed(0)
    model, made = TinyDiffusion().eval(), []
    for device in ("cpu", where):
        noise = start_noise(generators(range(8)), model.image_shape, device)
        with torch.no_grad():
            made.append(sample(model.to(device).denoiser(None, 1.0), model.make_scheduler(), noise, 10).cpu())
    return near(float((made[0] - made[1]).abs().max()), 0.0, 1e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(synthesis_seconds(*map(json.loads, sys.argv[1:]))))
