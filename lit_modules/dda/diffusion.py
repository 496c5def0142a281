"""Back-ends that vary images: Stable Diffusion from local weights, a small diffusion model of one's own, or nothing."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import ImageMeta, UserError
from leanlight.contracts.ranges import NonNegativeFloat, PositiveInt, PositiveShare
from lit_modules.dda.sampling import (
    check_strength,
    generators,
    in_chunks,
    require_diffusers,
    sample,
    sdedit,
    start_noise,
)
from lit_modules.frozen import Frozen, frozen_module
from lit_modules.nn.checks import first_line, require_positive

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HELPS = "leanlight run dda/pipelines/fashion_mnist_small trains one first"


@dataclass(frozen=True)
class Variations:
    """A back-end at work.

    Args:
        vary: images (B, C, H, W) in [0, 1], their classes (B,) and K seeds for each, (B, K) int64 → (B, K, C, H, W) in
            [0, 1]. A variation depends on its image and its seed, not on what else is in the batch.
        embed: images (B, C, H, W) in [0, 1] → their CLIP embeddings (B, D); None where there is no CLIP.
    """

    vary: Callable[[Tensor, Tensor, Tensor], Tensor]
    embed: Callable[[Tensor], Tensor] | None = None


class Backend(ABC):
    """What makes variations of images."""

    @abstractmethod
    def prepare(self, meta: ImageMeta, teacher: Frozen[nn.Module], device: torch.device) -> Variations:
        """Load what is needed.

        Args:
            meta: of the images.
            teacher: of the distillation, on `device`; images in [0, 1] → logits.
            device: where to compute.

        Raises:
            UserError: missing weights, or weights for other images.
        """


@dataclass(frozen=True)
class Identity(Backend):
    """Each image is its own variation: the control that a student sees images as often as with variations."""

    def prepare(self, meta: ImageMeta, teacher: Frozen[nn.Module], device: torch.device) -> Variations:
        return Variations(lambda images, labels, seeds: images[:, None].expand(-1, seeds.shape[1], -1, -1, -1))


@dataclass(frozen=True)
class Tiny(Backend):
    """A small diffusion model in pixel space, of `TinyDiffusion`.

    Args:
        checkpoint: of a TinyDiffusion.
        mode: ``sdedit`` noises the image up to `strength` and denoises it; ``embedding`` starts from pure noise and
            goes by the teacher's embedding of the image alone, which needs a model conditioned on it.
        strength: of SDEdit, in (0, 1]: the share of the steps that is made.
        steps: of DDIM from pure noise to an image.
        guidance: w of classifier-free guidance, at least 0, where the model is conditioned; 1 is without.
        chunk: images made at once.
    """

    checkpoint: Path | None = None
    mode: Literal["sdedit", "embedding"] = "sdedit"
    strength: PositiveShare = 0.5
    steps: PositiveInt = 25
    guidance: NonNegativeFloat = 3.0
    chunk: PositiveInt = 128

    def __post_init__(self) -> None:
        check_strength(self.strength)
        require_positive(steps=self.steps, chunk=self.chunk)
        _check_guidance(self.guidance)
        if self.mode not in get_args(Literal["sdedit", "embedding"]):
            raise UserError(f"backend.mode: expected sdedit or embedding, got {self.mode!r}")

    def prepare(self, meta: ImageMeta, teacher: Frozen[nn.Module], device: torch.device) -> Variations:
        from lit_modules.dda.tiny_diffusion import TinyDiffusion

        model = frozen_module(TinyDiffusion, self.checkpoint, "backend.checkpoint", _HELPS).to(device)
        if tuple(meta.shape) != model.image_shape:
            raise UserError(
                f"backend.checkpoint: expected a TinyDiffusion for images of shape {tuple(meta.shape)}, "
                f"{self.checkpoint} is for {model.image_shape}"
            )
        if self.mode == "embedding" and not model.conditioned:
            raise UserError(
                f"backend.mode: embedding needs a TinyDiffusion with a teacher; that of {self.checkpoint} has none"
            )
        if model.conditioned:
            model.condition_on(teacher)
        scheduler = model.make_scheduler()
        if self.steps > (most := scheduler.config.num_train_timesteps):
            raise UserError(f"steps: expected at most {most}, those the diffusion model was trained with")

        def vary(image: Tensor, seed: Tensor) -> Tensor:
            denoise = model.denoiser(model.embed(teacher, image) if model.conditioned else None, self.guidance)
            noise = start_noise(generators(seed.tolist()), image.shape[1:], device)
            if self.mode == "sdedit":
                made = sdedit(denoise, scheduler, 2 * image - 1, noise, self.strength, self.steps)
            else:
                made = sample(denoise, scheduler, noise, self.steps)
            return (made / 2 + 0.5).clamp(0, 1)

        return Variations(_by_pairs(lambda image, label, seed: vary(image, seed), self.chunk))


@dataclass(frozen=True)
class ImageVariation(Backend):
    """Stable Diffusion conditioned on a CLIP image embedding, by diffusers' StableDiffusionImageVariationPipeline.

    The image is there as its embedding alone; sampling starts from pure noise. Nothing is downloaded, and there is no
    safety checker, which would return black images.

    Args:
        weights: folder of lambdalabs/sd-image-variations-diffusers, revision v2.0.
        guidance: of classifier-free guidance against the zero vector, at least 0; up to 1 is without.
        steps: of the pipeline's scheduler.
        size: side of the square that the pipeline makes, a multiple of 8; None: the pipeline's own, 512.
        chunk: images made at once.
        half: compute with 16 bits; None: on a GPU.
    """

    weights: Path | None = None
    guidance: NonNegativeFloat = 3.0
    steps: PositiveInt = 25
    size: PositiveInt | None = None
    chunk: PositiveInt = 8
    half: bool | None = None

    def __post_init__(self) -> None:
        require_positive(steps=self.steps, chunk=self.chunk)
        _check_guidance(self.guidance)
        _check_size(self.size)

    def prepare(self, meta: ImageMeta, teacher: Frozen[nn.Module], device: torch.device) -> Variations:
        pipeline = _pipeline(
            "StableDiffusionImageVariationPipeline",
            self.weights,
            "lambdalabs/sd-image-variations-diffusers, revision v2.0",
            device,
            self.half,
        )
        encoder = pipeline.image_encoder

        def pixels(image: Tensor) -> Tensor:
            return clip_pixels(image, encoder.config.image_size).to(device, encoder.dtype)

        @torch.no_grad()
        def embed(images: Tensor) -> Tensor:
            return in_chunks(lambda image: encoder(pixels(image)).image_embeds.float(), self.chunk, images)

        size = self.size or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        latent = (pipeline.unet.config.in_channels, *[size // pipeline.vae_scale_factor] * 2)

        def vary(image: Tensor, label: Tensor, seed: Tensor) -> Tensor:
            streams = generators(seed.tolist())
            made = pipeline(
                pixels(image),
                height=size,
                width=size,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=streams,
                # The pipeline would draw other numbers in half precision.
                latents=start_noise(streams, latent, device).to(pipeline.unet.dtype),
                output_type="pt",
            )
            return shrink(made.images, meta.shape)

        return Variations(_by_pairs(vary, self.chunk), embed)


@dataclass(frozen=True)
class ImageToImage(Backend):
    """SDEdit with Stable Diffusion and a prompt, by diffusers' StableDiffusionImg2ImgPipeline.

    Args:
        weights: folder of Stable Diffusion 1.5 or 2.1 as diffusers saves it; nothing is downloaded.
        strength: of SDEdit, in (0, 1].
        guidance: of classifier-free guidance, at least 0; up to 1 is without.
        steps: from pure noise to an image; the share `strength` of them is made.
        prompt: text; ``{class}`` stands for the name of the image's class.
        size: side of the square to which images are enlarged first, a multiple of 8.
        chunk: images made at once.
        half: compute with 16 bits; None: on a GPU.
    """

    weights: Path | None = None
    strength: PositiveShare = 0.5
    guidance: NonNegativeFloat = 7.5
    steps: PositiveInt = 50
    prompt: str = "a photo of a {class}"
    size: PositiveInt = 512
    chunk: PositiveInt = 8
    half: bool | None = None

    def __post_init__(self) -> None:
        check_strength(self.strength)
        require_positive(steps=self.steps, chunk=self.chunk)
        _check_guidance(self.guidance)
        _check_size(self.size)
        if int(self.steps * self.strength) < 1:
            raise UserError(f"strength: {self.strength} of {self.steps} steps is not one step")

    def prepare(self, meta: ImageMeta, teacher: Frozen[nn.Module], device: torch.device) -> Variations:
        pipeline = _pipeline(
            "StableDiffusionImg2ImgPipeline", self.weights, "Stable Diffusion 1.5 or 2.1", device, self.half
        )

        def vary(image: Tensor, label: Tensor, seed: Tensor) -> Tensor:
            size = (self.size, self.size)
            made = pipeline(
                prompt=[self.prompt.replace("{class}", meta.classes[number]) for number in label.tolist()],
                image=F.interpolate(to_rgb(image), size, mode="bicubic", align_corners=False).clamp(0, 1),
                strength=self.strength,
                num_inference_steps=self.steps,
                guidance_scale=self.guidance,
                generator=generators(seed.tolist()),
                output_type="pt",
            )
            return shrink(made.images, meta.shape)

        return Variations(_by_pairs(vary, self.chunk))


def clip_pixels(image: Tensor, size: int = 224) -> Tensor:
    """What CLIP sees of images (B, 1 or 3, H, W) in [0, 1]: (B, 3, size, size), normalised by its mean and std.

    Bicubic without antialiasing, as the weights of image variations were trained.
    """
    x = F.interpolate(to_rgb(image), (size, size), mode="bicubic", align_corners=False, antialias=False)
    mean, std = (torch.tensor(value, device=x.device).view(3, 1, 1) for value in (_CLIP_MEAN, _CLIP_STD))
    return (x - mean) / std


def to_rgb(image: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) → (B, 3, H, W)."""
    return image.expand(-1, 3, -1, -1) if image.shape[1] == 1 else image


def shrink(image: Tensor, shape: Sequence[int]) -> Tensor:
    """Bring images (B, 3, S, S) to a shape (C, H, W), C 1 or 3: means over areas; grey by the weights of BT.601."""
    image = image.float()
    if shape[0] == 1:
        image = (image * image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    return F.interpolate(image, list(shape[1:]), mode="area").clamp(0, 1)


def _by_pairs(
    make: Callable[[Tensor, Tensor, Tensor], Tensor], chunk: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """From a function of images, classes and a seed each to one of K seeds each, chunk by chunk."""

    @torch.no_grad()
    def vary(images: Tensor, labels: Tensor, seeds: Tensor) -> Tensor:
        source = torch.arange(len(images)).repeat_interleave(seeds.shape[1])
        made = in_chunks(
            lambda rows, seed: make(images[rows.to(images.device)], labels[rows.to(labels.device)], seed),
            chunk,
            source,
            seeds.flatten(),
        )
        return made.unflatten(0, tuple(seeds.shape))

    return vary


def _pipeline(name: str, weights: Path | None, what: str, device: torch.device, half: bool | None) -> Any:
    """Load a pipeline of diffusers from a folder, without safety checker and without a bar of its own."""
    expected = f"backend.weights: expected the folder of {what}, with its model_index.json"
    try:
        index = json.loads((Path(weights or "") / "model_index.json").read_text()) if weights is not None else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{expected}; {weights} gives {first_line(error)}; nothing is downloaded") from error
    if index.get("_class_name") != name:
        got = f"one of {index['_class_name']} in {weights}" if "_class_name" in index else weights
        raise UserError(f"{expected}, of a {name}; got {got}; nothing is downloaded")
    pipelines = require_diffusers()
    dtype = torch.float16 if (device.type == "cuda" if half is None else half) else torch.float32
    try:
        pipeline = getattr(pipelines, name).from_pretrained(
            weights, local_files_only=True, dtype=dtype, safety_checker=None, requires_safety_checker=False
        )
    except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:  # of files of any content
        raise UserError(f"{expected}; {weights} gives {first_line(error)}; nothing is downloaded") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _check_guidance(guidance: float) -> None:
    if guidance < 0:
        raise UserError(f"guidance: expected a number from 0, got {guidance}")


def _check_size(size: int | None) -> None:
    if size is not None and (size < 8 or size % 8):
        raise UserError(f"size: expected a multiple of 8, got {size}")
