"""Benchmark of SFedHIFI: factorised convolutions against the published form, and a client's step by width."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanlight.benchmarks.core import Measurement, PaperStep, Target, interleave, network_step, ratios, summarise
from leanlight.benchmarks.gpu.checks import Check
from leanlight.benchmarks.gpu.training import Runs, two_as_one
from lit_modules.sfedhifi import DecomConv, FactorisedSpikingCNN, FactorisedSpikingResNet18
from lit_modules.sfedhifi.decomposition import factorised_layers, fold_network
from lit_modules.sfedhifi.losses import tet_loss
from lit_modules.sfedhifi.reference import chunk_by_chunk
from lit_modules.sfedhifi.widths import WIDTHS


def layer_inputs(network: nn.Module, image: Tensor) -> list[tuple[DecomConv, Tensor]]:
    """Every factorised convolution of `network` with the spikes that it receives for `image`."""
    found: list[tuple[DecomConv, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs: found.append((module, inputs[0].detach())))
        for layer in factorised_layers(network).values()
    ]
    with torch.no_grad():
        network(image)
    for handle in handles:
        handle.remove()
    return found


def step_of(layers: list[tuple[DecomConv, Tensor]], chunked: bool) -> Callable[[], None]:
    """Forward and backward through every layer by itself."""

    def step() -> None:
        for layer, spikes in layers:
            x = spikes.requires_grad_()
            x.grad = layer.basis.grad = layer.factor.grad = None
            y = chunk_by_chunk(x, layer.basis, layer.factor, layer.stride) if chunked else layer(x)
            y.sum().backward()

    return step


def training_step(network: Any, image: Tensor, label: Tensor) -> Callable[[], None]:
    """A client's forward and backward pass with the TET loss."""

    def step() -> None:
        network.train().zero_grad(set_to_none=True)
        tet_loss(network.forward_steps(image), label).backward()

    return step


def inference(network: nn.Module, image: Tensor) -> Callable[[], None]:
    """A forward pass without gradients."""

    def step() -> None:
        with torch.no_grad():
            network.eval()(image)

    return step


def run(quick: bool = False) -> Measurement:
    """Measure at the paper's shapes (T fewer), on the CPU."""
    rounds, batch, steps = (2, 1, 2) if quick else (10, 4, 4)
    widths = WIDTHS[:1] if quick else WIDTHS
    measured = Measurement(settings={"time_steps": steps, "batch": batch, "rounds": rounds})
    measured.settings["threads"] = torch.get_num_threads()
    torch.manual_seed(0)
    for width in widths:
        resnet = FactorisedSpikingResNet18(width, time_steps=steps).train()
        image, label = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))
        layers = layer_inputs(resnet, image)
        times = interleave({"ours": step_of(layers, False), "chunked": step_of(layers, True)}, rounds)
        name = f"resnet18_p{width}"
        measured.figures[f"{name}/layers"] = summarise([1000 * s for s in times["ours"]], "ms")
        measured.figures[f"{name}/layers_chunk_by_chunk"] = summarise([1000 * s for s in times["chunked"]], "ms")
        speedup = summarise(ratios(times["chunked"], times["ours"]), "x", "higher")
        measured.figures[f"{name}/layers_speedup"] = speedup
        text = f"p = {width}: all factorised convolutions of the ResNet at least 1.5 times as fast as chunk by chunk"
        measured.targets.append(Target(f"{name}/layers_speedup", 1.5, text))
        measured.checks[f"p = {width}: both forms give the same outputs within 1e-4"] = all(
            torch.allclose(
                layer(spikes), chunk_by_chunk(spikes, layer.basis, layer.factor, layer.stride), rtol=1e-4, atol=1e-4
            )
            for layer, spikes in layers
        )
        kinds = {
            "training": training_step(resnet, image, label),
            "inference": inference(resnet, image),
            "inference_folded": inference(fold_network(resnet), image),
        }
        for kind, seconds in interleave(kinds, rounds).items():
            measured.figures[f"{name}/{kind}"] = summarise([1000 * s for s in seconds], "ms")
        cnn = FactorisedSpikingCNN(width, time_steps=steps).train()
        gray = torch.rand(batch, 1, 28, 28)
        (seconds,) = interleave({"training": training_step(cnn, gray, label)}, rounds).values()
        measured.figures[f"four_layers_p{width}/training"] = summarise([1000 * s for s in seconds], "ms")
    return measured


def paper_steps(where: str, quick: bool = False) -> dict[str, Callable[[], PaperStep]]:
    """A client's local step of `sfedhifi/cifar10`, smallest and largest width: T = 10, 32 images."""

    batch = 2 if quick else 32

    def make(width: float) -> PaperStep:
        torch.manual_seed(0)
        network = FactorisedSpikingResNet18(width, time_steps=10).to(where)
        image, label = torch.rand(batch, 3, 32, 32, device=where), torch.arange(batch, device=where) % 10
        return network_step(network, lambda: tet_loss(network.forward_steps(image), label), batch)

    return {f"resnet18_p{width}": partial(make, width) for width in (WIDTHS[0], WIDTHS[-1])}


def gpu_checks(folder: Path, where: str) -> Iterator[Check]:
    """What only this method promises on a GPU."""
    made = Runs(["sfedhifi/digits_small"], folder, where)
    what = "two GPUs train the clients of a round as one does: weights within 1e-3"
    yield Check("sfedhifi", "two_as_one", what, partial(two_as_one, made))
