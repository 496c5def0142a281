"""Inversion and distillation as plain loops have them: for equality tests and the benchmark."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import ImageBatch, ImageData, data_of
from lit_modules.dda.generators import DoublingConv2d, Generator
from lit_modules.dda.inversion import Synthesized
from lit_modules.dda.module import DataFreeDistillation


def crop_each(image: Tensor) -> Tensor:
    """Mirror each image with probability 1/2, pad an eighth of a side with zeros, cut the windows one by one."""
    height, width = image.shape[2:]
    down, right = height // 8, width // 8
    mirrored = torch.where(torch.rand(len(image), 1, 1, 1) < 0.5, image.flip(-1), image)
    padded = F.pad(mirrored, (right, right, down, down))
    tops, lefts = (torch.randint(2 * reach + 1, (len(image),)).tolist() for reach in (down, right))
    # Over the images themselves: an index into the batch would make a gradient as large as the batch for each of them.
    return torch.stack(
        [each[:, top : top + height, left : left + width] for each, top, left in zip(padded, tops, lefts, strict=True)]
    )


def plain_generator(generator: Generator) -> Generator:
    """A copy that repeats pixels first and convolves the larger maps, as public code does."""
    plain = copy.deepcopy(generator)
    for number, layer in enumerate(plain.maps):
        if isinstance(layer, DoublingConv2d):
            convolution = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=False)
            convolution.weight = layer.weight
            plain.maps[number] = nn.Sequential(nn.Upsample(scale_factor=2), convolution)
    return plain


def plain_inversion(
    teacher: nn.Module,
    generator: Generator,
    latent: Tensor,
    label: Tensor,
    steps: int,
    augment: Callable[[Tensor], Tensor] | None = crop_each,
) -> Synthesized:
    """Inversion through a generator in the manner of public code, with the defaults of `GeneratorInversion`.

    Everything keeps PyTorch's own memory format, statistics come from ``mean`` and ``var`` in hooks that stay for one
    call, and each step asks whether it is the best so far.

    Args:
        teacher: frozen, in evaluation mode; images (N, C, H, W) in [0, 1] → logits (N, K).
        generator: fresh; a `plain_generator` of it is trained.
        latent: (N, Z) standard normal, where the descent begins.
        label: (N,) int64 classes.
        steps: of Adam.
        augment: of the images that the teacher sees; None: nothing.
    """
    distances: list[Tensor] = []

    def hook(layer: Any, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        (x,) = inputs
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        distances.append((mean - layer.running_mean).norm(2) + (variance - layer.running_var).norm(2))

    norms = [layer for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d)]
    handles = [layer.register_forward_hook(hook) for layer in norms]
    generator, latent = plain_generator(generator), latent.clone().requires_grad_()
    optimizer = torch.optim.Adam([*generator.parameters(), latent], lr=1e-3, betas=(0.5, 0.999))
    first: dict[str, Tensor] = {}
    best: Synthesized | None = None
    for _ in range(steps):
        distances.clear()
        image = generator(latent)
        class_prior = F.cross_entropy(teacher(image if augment is None else augment(image)), label)
        batch_norm = torch.stack(distances).sum()
        loss = class_prior + batch_norm
        terms = {"loss": loss.detach(), "class_prior": class_prior.detach(), "batch_norm": batch_norm.detach()}
        first = first or terms
        if best is None or loss.item() < best.best["loss"].item():
            best = Synthesized(image.detach(), first, terms, torch.stack(distances).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for handle in handles:
        handle.remove()
    assert best is not None
    return best


class BareDistillationStep:
    """A step of recipe ``kl`` without Lightning, on a copy of a module's student.

    Args:
        module: at work; its student, optimiser, temperature and teacher are taken, and it is left as it is.
    """

    def __init__(self, module: DataFreeDistillation) -> None:
        self.network, self.temperature = copy.deepcopy(module.network), module.temperature
        self.teacher = module.teacher.load(data_of(module, ImageData).meta)
        self.optimizer = module.make_optimizer(self.network.parameters())

    def __call__(self, batch: ImageBatch) -> None:
        """One step on images in [0, 1]."""
        with torch.no_grad():
            target = F.log_softmax(self.teacher(batch.image) / self.temperature, 1)
        answer = F.log_softmax(self.network(batch.image) / self.temperature, 1)
        loss = self.temperature**2 * F.kl_div(answer, target, reduction="batchmean", log_target=True)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
