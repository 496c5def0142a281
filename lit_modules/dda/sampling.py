"""Sampling from a diffusion model in pixel space, by a scheduler of diffusers; images lie in [-1, 1].

Every image is drawn from a generator of its own, on the CPU: it depends on its seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from leanlight.contracts import MissingExtraError, UserError

#: Images (B, C, H, W) at a time of the schedule → the network's answer, of the same shape.
Denoise = Callable[[Tensor, int], Tensor]


def require_diffusers() -> Any:
    """The package; MissingExtraError without it. It takes seconds to import, so nothing does on the way to a name."""
    try:
        import diffusers
        import transformers  # noqa: F401  # diffusers hides its pipelines without it
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "diffusion") from error
    return diffusers


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One on the CPU for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def start_noise(generators: Sequence[torch.Generator], shape: Sequence[int], device: torch.device | str) -> Tensor:
    """(B, C, H, W) standard normal float32 on `device`; generators: one an image. shape: (C, H, W)."""
    return torch.stack([torch.randn(*shape, generator=generator) for generator in generators]).to(device)


def guided(network: Callable[[Tensor, int, Tensor], Tensor], embedding: Tensor, guidance: float) -> Denoise:
    """The answers of a conditioned network with classifier-free guidance (Ho and Salimans 2022).

    ε = ε(0) + w (ε(embedding) − ε(0)), both by one pass; at w = 1 without the first, at w = 0 without the second. The
    zero vector is no embedding, as in Stable Diffusion's image variations.

    Args:
        network: images, time, embeddings → its answer.
        embedding: (B, D) of each image.
        guidance: w, at least 0.
    """
    nothing = torch.zeros_like(embedding)
    if guidance in (0, 1):
        condition = embedding if guidance else nothing
        return lambda x, t: network(x, t, condition)
    both = torch.cat([nothing, embedding])

    def denoise(x: Tensor, t: int) -> Tensor:
        without, given = network(torch.cat([x, x]), t, both).chunk(2)
        return without + guidance * (given - without)

    return denoise


def sample(denoise: Denoise, scheduler: Any, x: Tensor, steps: int) -> Tensor:
    """Draw images from pure noise.

    Args:
        denoise: the diffusion model.
        scheduler: of diffusers, e.g. a DDIMScheduler.
        x: (B, C, H, W) standard normal.
        steps: of the scheduler.
    """
    scheduler.set_timesteps(steps)
    return _denoised(denoise, scheduler, x * scheduler.init_noise_sigma, 0)


def sdedit(denoise: Denoise, scheduler: Any, image: Tensor, noise: Tensor, strength: float, steps: int) -> Tensor:
    """Vary images (SDEdit, Meng et al. 2022): noise them up to a time t0, then denoise them from there.

    x_t0 = sqrt(ᾱ_t0) x + sqrt(1 − ᾱ_t0) n.

    Args:
        denoise: the diffusion model.
        scheduler: of diffusers, e.g. a DDIMScheduler.
        image: (B, C, H, W) x.
        noise: (B, C, H, W) n, standard normal.
        strength: in (0, 1]; that share of the steps is made, at least one.
        steps: from pure noise to an image.
    """
    check_strength(strength)
    scheduler.set_timesteps(steps)
    first = steps - max(1, round(strength * steps))
    return _denoised(
        denoise, scheduler, scheduler.add_noise(image, noise, scheduler.timesteps[first : first + 1]), first
    )


def check_strength(strength: float) -> None:
    """Raise UserError for a strength that is none."""
    if not 0.0 < strength <= 1.0:
        raise UserError(f"strength: expected a number above 0 and at most 1, got {strength}")


def _denoised(denoise: Denoise, scheduler: Any, x: Tensor, first: int) -> Tensor:
    for t in scheduler.timesteps[first:].tolist():
        x = scheduler.step(denoise(x, t), t, x).prev_sample
    return x


def in_chunks(make: Callable[..., Tensor], size: int, *columns: Tensor) -> Tensor:
    """Go through columns in pieces of equal size, so that an item's result does not depend on how many there are.

    Kernels choose their order of summation by shape: in batches of other sizes, the last bits of a result differ.

    Args:
        make: from a piece of each column to (size, …).
        size: items of a piece; the last one is filled up with its last item, and what that gives is dropped.
        columns: (N, …) each, N at least 1.

    Returns:
        (N, …).
    """
    made, items = [], len(columns[0])
    for low in range(0, items, size):
        rows = torch.arange(low, low + size).clamp_(max=items - 1)
        made.append(make(*(column[rows.to(column.device)] for column in columns)))
    return torch.cat(made)[:items]
