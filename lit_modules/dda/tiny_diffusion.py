"""Training glue of a small diffusion model: hooks, optimiser, averaged weights, logging, export."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from leanlight.contracts import (
    Allows,
    ImageBatch,
    ImageData,
    ImageGrid,
    MediaItem,
    PrimaryMetric,
    Progress,
    Split,
    UserError,
    atomic_write,
    data_of,
    derived_seed,
    run_seed,
)
from leanlight.contracts.ranges import PositiveInt, Seed, Share
from leanlight.ops.counter import item_keys, labels, noise, random_bits, uniform
from lit_modules.dda.bank import teacher_digest
from lit_modules.dda.sampling import Denoise, generators, guided, require_diffusers, sample, start_noise
from lit_modules.dda.teacher import Teacher
from lit_modules.export import write_weights
from lit_modules.frozen import Frozen
from lit_modules.hparams import save_hparams
from lit_modules.nn import pooled_features
from lit_modules.nn.checks import blank_output, first_line, require_positive
from lit_modules.optim import Interval, configure
from lit_modules.step_log import log_evaluation, log_step

_SMALL: dict[str, Any] = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
}


class Denoiser(nn.Module):
    """A `UNet2DModel`, conditioned on a projected embedding once `condition_on` has said of which size.

    Args:
        unet: of diffusers; with ``class_embed_type="identity"`` where it shall be conditioned.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet
        self.projection: nn.Linear | None = None

    def condition_on(self, size: int) -> None:
        """Make the projection of embeddings of that size to the size of the network's embedding of time."""
        self.projection = nn.Linear(size, self.unet.time_embedding.linear_2.out_features)

    def forward(self, x: Tensor, time: Tensor | int, embedding: Tensor | None = None) -> Tensor:
        """Noisy images (N, C, H, W), times (N,) or one for all, embeddings (N, D) → answers of the images' shape."""
        return self.unet(x, time, None if self.projection is None else self.projection(embedding)).sample


class TinyDiffusion(LightningModule):
    """Train a diffusion model of images in pixel space (Ho et al. 2020), on a bank or on any other images.

    With a teacher it is conditioned on the teacher's pooled features of the image itself, as Stable Diffusion's image
    variations are on CLIP's. Evaluation, samples and export use an exponential moving average of the weights. Noise and
    times are functions of the seed, the step and the item, so that several processes train on what one would.

    Args:
        in_channels: channels of an image.
        image_size: side of an image, in pixels.
        network: options of diffusers' ``UNet2DModel`` that replace those of a small one for 16 pixels (32 and 64
            channels, attention at half the size).
        scheduler: options of diffusers' ``DDIMScheduler``; its defaults are the paper's, 1,000 steps with linear β.
        teacher: whose features of an image condition the model; None conditions it on nothing.
        condition_dropout: share of the training items whose embedding is replaced by 0, for classifier-free guidance.
        optimizer: makes the optimiser; Adam with lr 0.001 by default.
        lr_scheduler: makes the learning-rate schedule from the optimiser; constant by default.
        lr_interval: what a step of the schedule follows, ``epoch`` or ``step``.
        ema_decay: of the average weights, in [0, 1); at the n-th step it is at most n / (9 + n).
        samples: images that a picture shows.
        sample_steps: steps of DDIM for them.
        eval_seed: seed of the noise and times of evaluation, and of the samples.
    """

    allows = Allows()
    primary_metric = PrimaryMetric("val/loss", "min")

    def __init__(
        self,
        in_channels: PositiveInt = 1,
        image_size: PositiveInt = 16,
        network: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        teacher: Teacher | None = None,
        condition_dropout: Share = 0.1,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Interval = "epoch",
        ema_decay: Share = 0.999,
        samples: PositiveInt = 20,
        sample_steps: PositiveInt = 25,
        eval_seed: Seed = 0,
    ) -> None:
        super().__init__()
        require_positive(in_channels=in_channels, image_size=image_size, samples=samples, sample_steps=sample_steps)
        for name, value in (("condition_dropout", condition_dropout), ("ema_decay", ema_decay)):
            if not 0 <= value < 1:
                raise UserError(f"{name}: expected a number in [0, 1), got {value}")
        save_hparams(self)
        self.image_shape = (in_channels, image_size, image_size)
        self.teacher, self.condition_dropout = teacher, condition_dropout
        self.make_optimizer, self.make_lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval
        self.ema_decay, self.samples, self.sample_steps, self.eval_seed = ema_decay, samples, sample_steps, eval_seed
        self.scheduler_options = scheduler or {}
        self.scheduler = self.make_scheduler()
        self.network = Denoiser(self._make_unet({**_SMALL, **(network or {})}))
        #: The moving average of `network`.
        self.average = copy.deepcopy(self.network).requires_grad_(False)
        self._teacher: Frozen[nn.Module] | None = None
        self._teacher_digest: str | None = None
        self._terms: dict[str, Tensor] = {}
        self._shown: Tensor | None = None

    # ---- set-up ----

    def _make_unet(self, options: dict[str, Any]) -> Any:
        channels, size, _ = self.image_shape
        if self.teacher is not None:
            options["class_embed_type"] = "identity"
        try:
            return require_diffusers().UNet2DModel(
                sample_size=size, in_channels=channels, out_channels=channels, **options
            )
        except (TypeError, ValueError) as error:
            raise UserError(f"network: expected options of diffusers.UNet2DModel; {first_line(error)}") from error

    def make_scheduler(self) -> Any:
        """A ``DDIMScheduler`` with the options given: sampling changes its state."""
        try:
            return require_diffusers().DDIMScheduler(**self.scheduler_options)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise UserError(f"scheduler: expected options of diffusers.DDIMScheduler; {first_line(error)}") from error

    def setup(self, stage: str) -> None:
        """Check the network against the data; load the teacher."""
        meta = data_of(self, ImageData).meta
        if tuple(meta.shape) != self.image_shape:
            channels, size = meta.shape[0], meta.shape[-1]
            raise UserError(
                f"image_size: expected in_channels {channels} and image_size {size}, for images of shape "
                f"{tuple(meta.shape)}; got {self.image_shape[0]} and {self.image_shape[1]}"
            )
        blank_output(self.network.unet, self.image_shape, "network", self._blank_answer)
        if self.teacher is not None and self._teacher is None:
            self._teacher = self.teacher.load(meta)
            self.condition_on(self._teacher)

    @staticmethod
    def _blank_answer(unet: Any, x: Tensor) -> Tensor:
        conditioned = unet.config.class_embed_type is not None
        size = unet.time_embedding.linear_2.out_features
        return unet(x, 0, x.new_zeros(len(x), size) if conditioned else None).sample

    def condition_on(self, teacher: Frozen[nn.Module]) -> None:
        """Make the projection of a teacher's features; UserError where there is that of another teacher."""
        features = blank_output(teacher.network, self.image_shape, "teacher", pooled_features)
        self._condition(teacher_digest(teacher.network), features.shape[1])

    def _condition(self, digest: str, size: int) -> None:
        if self._teacher_digest not in (None, digest):
            raise UserError("teacher: expected the one that the diffusion model was conditioned on, got another one")
        if self.network.projection is not None:
            return
        self._teacher_digest = digest
        self.network.condition_on(size)
        self.average = copy.deepcopy(self.network).requires_grad_(False)

    @property
    def conditioned(self) -> bool:
        """Whether the model takes embeddings."""
        return self.teacher is not None

    def configure_optimizers(self) -> Any:
        make = self.make_optimizer or functools.partial(torch.optim.Adam, lr=1e-3)
        return configure(self.network.parameters(), make, self.make_lr_scheduler, self.lr_interval)

    def compile_networks(self, **options: Any) -> None:
        self.network.compile(**options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["teacher_digest"] = self._teacher_digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The size of embeddings is the teacher's, which `load_from_checkpoint` does not load."""
        if (digest := checkpoint.get("teacher_digest")) is not None:
            self._condition(digest, checkpoint["state_dict"]["network.projection.weight"].shape[1])

    def on_fit_start(self) -> None:
        self._place_teacher()

    def on_validation_start(self) -> None:
        self._place_teacher()

    def on_test_start(self) -> None:
        self._place_teacher()

    def _place_teacher(self) -> None:
        if self._teacher is not None:
            self._teacher.to(self.device)

    # ---- steps ----

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        stream = derived_seed(run_seed(), "diffusion", self.global_step)
        loss = self._loss(self.network, batch, stream, self.condition_dropout)
        self._terms = {"mse": loss.detach()}
        log_step(self, {"train/loss": loss}, len(batch), over_processes=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the average follow."""
        super().optimizer_step(*args, **kwargs)
        steps = self.global_step
        decay = min(self.ema_decay, (1 + steps) / (10 + steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.network.parameters()), 1 - decay)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: ImageBatch, batch_idx: int, split: Split) -> None:
        loss = self._loss(self.average, batch, derived_seed(self.eval_seed, split), 0.0)
        log_evaluation(self, {f"{split}/loss": loss}, len(batch))
        if batch_idx == 0:
            self._shown = batch.image[: self.samples]

    def _loss(self, network: Denoiser, batch: ImageBatch, stream: int, dropout: float) -> Tensor:
        """Mean squared error of the network's answer at a time and with noise of each item's own."""
        image, index = 2 * batch.image - 1, batch.index
        drawn = noise(stream, index, image[0].numel()).view_as(image)
        time = labels(stream, index, self.scheduler.config.num_train_timesteps)
        noisy = self.scheduler.add_noise(image, drawn, time)
        embedding = None
        if self._teacher is not None:
            dropped = uniform(random_bits(item_keys(derived_seed(stream, "dropout"), index), 1)) < dropout
            embedding = self.embed(self._teacher, batch.image).masked_fill(dropped, 0.0)
        return F.mse_loss(network(noisy, time, embedding), self._target(image, drawn, time))

    def _target(self, image: Tensor, drawn: Tensor, time: Tensor) -> Tensor:
        kind = self.scheduler.config.prediction_type
        if kind == "v_prediction":
            return self.scheduler.get_velocity(image, drawn, time)
        return drawn if kind == "epsilon" else image

    # ---- sampling ----

    @staticmethod
    @torch.no_grad()
    def embed(teacher: Frozen[nn.Module], image: Tensor) -> Tensor:
        """Pooled features of images (N, C, H, W) in [0, 1], scaled to a mean square of 1: (N, D)."""
        features = pooled_features(teacher.network, image).float()
        return F.normalize(features, dim=1) * math.sqrt(features.shape[1])

    def denoiser(self, embedding: Tensor | None, guidance: float) -> Denoise:
        """The average network's answers.

        Args:
            embedding: (B, D) of `embed` for the images that are drawn together; None where it is not `conditioned`.
            guidance: of classifier-free guidance, at least 0; 1 is without.
        """
        return self.average if embedding is None else guided(self.average, embedding, guidance)

    # ---- what callbacks and commands ask ----

    def progress(self) -> Progress:
        return Progress("step", self.global_step)

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """val, test: samples; with a teacher beside the images whose embeddings they are drawn for, row by row."""
        if split == "train" or self._shown is None:
            return {}
        shown = self._shown
        self.average.eval()
        embedding = None if self._teacher is None else self.embed(self._teacher, shown)
        seeds = [derived_seed(self.eval_seed, "sample", number) for number in range(self.samples)]
        streams = generators(seeds[: len(shown)] if embedding is not None else seeds)
        x = start_noise(streams, self.image_shape, self.device)
        made = sample(self.denoiser(embedding, 1.0), self.make_scheduler(), x, self.sample_steps)
        drawn = (made / 2 + 0.5).clamp(0, 1)
        items: dict[str, MediaItem] = {"samples": ImageGrid(drawn.float().cpu())}
        if embedding is not None:
            items["sources"] = ImageGrid(shown.float().cpu())
        return items

    def export(self, directory: Path) -> list[Path]:
        """Write what diffusers loads: ``unet`` and ``scheduler``, averaged weights; a pipeline where it can be one.

        ``DDIMPipeline.from_pretrained(directory)`` samples from a model without a teacher. Of one with a teacher,
        ``projection.safetensors`` maps embeddings to the ``class_labels`` of the network.
        """
        unet, projection = copy.deepcopy(self.average.unet).cpu(), self.average.projection
        condition = None
        if projection is None:
            require_diffusers().DDIMPipeline(unet, self.make_scheduler()).save_pretrained(directory)
        else:
            unet.save_pretrained(directory / "unet")
            self.make_scheduler().save_pretrained(directory / "scheduler")
            write_weights(copy.deepcopy(projection).cpu(), directory / "projection.safetensors")
            condition = (
                "the teacher's pooled features, scaled to a mean square of 1, by projection.safetensors; 0: none"
            )
        card = {
            "network": "diffusers.UNet2DModel",
            "images": {"shape": list(self.image_shape), "range": [-1.0, 1.0]},
            "conditioned_on": condition,
            "parameters": sum(parameter.numel() for parameter in self.average.parameters()),
        }
        atomic_write(directory / "card.json", json.dumps(card, indent=2) + "\n")
        return sorted(path for path in directory.rglob("*") if path.is_file())
