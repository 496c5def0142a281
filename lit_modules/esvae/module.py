"""Training glue of the ESVAE family: hooks, optimisers, logging."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from leanlight.contracts import (
    Allows,
    ImageBatch,
    InMemoryImages,
    MediaItem,
    PrimaryMetric,
    Progress,
    Split,
    TrainingStep,
    UnderNoise,
    UserError,
    data_of,
    isolated_rng,
)
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Seed, UnitInterval
from lit_modules import optim
from lit_modules.esvae.evaluation import (
    encode_all,
    frechet_autoencoder_distances,
    mean_image_error,
    robustness,
)
from lit_modules.esvae.export import export_autoencoder
from lit_modules.esvae.inception import fid_and_score, load_inception
from lit_modules.esvae.metrics import Gaussian, Noise, linear_probe, slope
from lit_modules.esvae.networks import ESVAE, Autoencoder, Code, to_signed, to_unit
from lit_modules.esvae.pictures import pairs, pictures
from lit_modules.esvae.published import published_features, reference_gaussian, use_batch_statistics
from lit_modules.frozen import Frozen, frozen_module
from lit_modules.hparams import save_hparams
from lit_modules.step_log import log_evaluation, log_step

_PIPELINE = "leanlight run esvae/pipelines/fashion_mnist_small trains one first"


class ImageAutoencoder(LightningModule):
    """Train and measure an autoencoder of the ESVAE family: ESVAE, FSVAE, VAE, SAE or the feature autoencoder.

    Loss: ``MSE(x', x) + λ * divergence`` on the [-1, 1] scale. Latents are sampled in evaluation too, from fixed seeds.
    The test measures whole splits at once, so it needs data in memory (`InMemoryImages`).

    Args:
        network: makes the network (`lit_modules.esvae`): images (N, C, H, W) in [0, 1] → the same.
        optimizer: makes the optimiser; AdamW with learning rate 1e-3 and weight decay 1e-3 by default.
        lr_scheduler: makes the schedule of the learning rate, stepped each epoch; none by default.
        divergence_weight: λ, 1e-3 in the paper; ``1/num_batches`` for one over the training batches an epoch.
        bottleneck_lr_factor: learning rate of ESVAE's prior over that of the rest; 10 in the published code.
        feature_checkpoint: checkpoint of a trained `FeatureAutoencoder`; without it, or `feature_weights`, no FAD.
        generated: images drawn from the prior for FAD, FID and Inception score; 5,120 in the published code's FAD.
        strengths: probabilities in [0, 1] of spike noise in the robustness test; 0.05 to 0.3 in the paper's figure.
        noise: what a hit spike becomes: ``flip``, the other value; ``replace``, one drawn anew.
        probe: whether to measure a linear probe on the features.
        probe_images: the probe learns from at most so many training images.
        eval_seed: seed of everything that evaluation, pictures and export draw.
        statistics: of the feature network's norms: ``eval``, those of its training, so that an image has the same
            features in every batch; ``batch``, those of the batch, as in the published code, for its figures.
        feature_weights: file of weights of a published feature network, in place of `feature_checkpoint`.
        reference_statistics: ``.npz`` with ``mu`` and ``sigma`` of the reference, in place of the test images' own.
        inception_weights: file of weights of torch-fidelity's Inception network (extra ``fidelity``); without it FID
            and Inception score are not measured.
        shuffles: orders of the latent steps at which the error is measured.
    """

    allows = Allows()

    def __init__(
        self,
        network: Callable[[], Autoencoder],
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        divergence_weight: NonNegativeFloat | Literal["1/num_batches"] = 1e-3,
        bottleneck_lr_factor: PositiveFloat = 10.0,
        feature_checkpoint: Path | None = None,
        generated: PositiveInt = 5120,
        strengths: Sequence[UnitInterval] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
        noise: Noise = "flip",
        probe: bool = True,
        probe_images: PositiveInt = 10_000,
        eval_seed: Seed = 0,
        statistics: Literal["eval", "batch"] = "eval",
        feature_weights: Path | None = None,
        reference_statistics: Path | None = None,
        inception_weights: Path | None = None,
        shuffles: PositiveInt = 16,
    ) -> None:
        super().__init__()
        if isinstance(divergence_weight, float) and divergence_weight < 0:
            raise UserError(f"divergence_weight: expected a number from 0, got {divergence_weight}")
        if generated < 2:
            raise UserError(f"generated: expected at least 2, got {generated}")
        if not all(0 <= strength <= 1 for strength in strengths) or len(strengths) < 2:
            raise UserError(f"strengths: expected two or more numbers in [0, 1], got {strengths}")
        if statistics not in ("eval", "batch"):
            raise UserError(f"statistics: expected eval or batch, got {statistics!r}")
        if feature_checkpoint is not None and feature_weights is not None:
            raise UserError("feature_weights: expected one feature network, got feature_checkpoint as well")
        if reference_statistics is not None and feature_checkpoint is None and feature_weights is None:
            raise UserError("reference_statistics: expected the feature network that they belong to, got none")
        save_hparams(self)
        self.network = network()
        self.make_optimizer = optimizer
        self.make_scheduler = lr_scheduler
        self.divergence_weight = divergence_weight
        self.bottleneck_lr_factor = bottleneck_lr_factor
        self.feature_checkpoint = feature_checkpoint
        self.generated = generated
        self.strengths = list(strengths)
        self.noise: Noise = noise
        self.probe, self.probe_images = probe, probe_images
        self.eval_seed = eval_seed
        self.statistics, self.feature_weights = statistics, feature_weights
        self.reference_statistics, self.inception_weights = reference_statistics, inception_weights
        self.shuffles = shuffles
        self._features: Frozen[Autoencoder] | None = None  # the feature autoencoder behind FAD
        self._reference: Gaussian | None = None
        self._inception: Frozen[nn.Module] | None = None
        self._terms: dict[str, Tensor] = {}
        self._shown: Tensor | None = None
        self._under_noise: UnderNoise | None = None

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check the network against the data; load the feature autoencoder."""
        meta = data_of(self, InMemoryImages).meta
        if tuple(meta.shape) != self.network.image_shape:
            channels, size = self.network.image_shape[0], self.network.image_shape[-1]
            raise UserError(
                f"network: made for in_channels {channels} and image_size {size}, the data has shape "
                f"{tuple(meta.shape)}; image_size of the data resizes it"
            )
        self._load_judges()

    def _load_judges(self) -> None:
        """The networks that the test measures with, before training, so that none lacks after it."""
        if self._features is None and (self.feature_checkpoint or self.feature_weights) is not None:
            features = self._load_features()
            if self.statistics == "batch":
                use_batch_statistics(features)
            if self.reference_statistics is not None:
                self._reference = reference_gaussian(self.reference_statistics, features.latent_size)
            self._features = Frozen(features)
        if self._inception is None and self.inception_weights is not None:
            self._inception = Frozen(load_inception(self.inception_weights))

    def _load_features(self) -> Autoencoder:
        if self.feature_weights is not None:
            return published_features(self.feature_weights, self.network.image_shape)
        source = frozen_module(ImageAutoencoder, self.feature_checkpoint, "feature_checkpoint", _PIPELINE)
        expected, got = self.network.image_shape, source.network.image_shape
        if got != expected:
            raise UserError(f"feature_checkpoint: expected one for images of shape {expected}, got {got}")
        return source.network

    def compile_networks(self, **options: Any) -> None:
        for part in ("encoder", "decoder"):
            self.network.get_submodule(part).compile(**options)

    def configure_optimizers(self) -> Any:
        bottleneck = self.network.bottleneck if isinstance(self.network, ESVAE) else None
        prior = list(bottleneck.parameters()) if bottleneck is not None else []
        known = set(map(id, prior))
        groups = [{"params": [p for p in self.network.parameters() if id(p) not in known]}]
        if prior:
            groups.append({"params": prior})

        def make(params: Any) -> torch.optim.Optimizer:
            chosen = self.make_optimizer or functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=1e-3)
            optimizer = chosen(params)
            for group in optimizer.param_groups[1:]:  # before a schedule notes the rates it starts from
                group["lr"] *= self.bottleneck_lr_factor
            return optimizer

        return optim.configure(groups, make, self.make_scheduler)

    def weight(self) -> float:
        """λ as a number."""
        if isinstance(self.divergence_weight, str):
            return 1.0 / int(self.trainer.num_training_batches)
        return self.divergence_weight

    # ---- steps ----

    def forward(self, image: Tensor) -> Tensor:
        """Reconstruct (N, C, H, W) in [0, 1]."""
        return self.network(image)

    def _reconstruct(self, batch: ImageBatch) -> tuple[Code, Tensor, Tensor]:
        """Code, reconstruction on [-1, 1] and its mean squared error."""
        image = to_signed(batch.image)
        code = self.network.encode(image)
        rebuilt = self.network.decode(code.z)
        return code, rebuilt, F.mse_loss(rebuilt, image)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        self.network.set_progress(min(1.0, self.global_step / self.trainer.estimated_stepping_batches))
        code, _, mse = self._reconstruct(batch)
        loss = mse + self.weight() * code.divergence
        self._terms = {"mse": mse.detach(), "divergence": code.divergence.detach()}
        values = {"train/loss": loss, "train/mse": mse, "train/divergence": code.divergence}
        log_step(self, values, len(batch), over_processes=True)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: ImageBatch, batch_idx: int, split: Split) -> None:
        with isolated_rng(self.eval_seed + batch_idx):
            code, rebuilt, mse = self._reconstruct(batch)
        values = {f"{split}/mse": mse, f"{split}/divergence": code.divergence}
        log_evaluation(self, values, len(batch))
        if batch_idx == 0:
            self._shown = pairs(batch.image, rebuilt)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``index`` (N,), ``image`` (N, C, H, W) reconstructed in [0, 1] and ``features`` (N, d)."""
        with isolated_rng(self.eval_seed + batch_idx):
            code, rebuilt, _ = self._reconstruct(batch)
        if batch_idx == 0:
            self._shown = pairs(batch.image, rebuilt)
        return {"index": batch.index, "image": to_unit(rebuilt), "features": code.features}

    def on_test_epoch_end(self) -> None:
        """Measure on the whole test set what needs more than a reconstruction; the same on every process."""
        data = data_of(self, InMemoryImages)
        train, test, network = data.train_split, data.test_split, self.network
        values = {
            "test/mse_mean_image": mean_image_error(train.images, test.images),
            "test/parameters": float(sum(p.numel() for p in network.parameters())),
        }
        with isolated_rng(self.eval_seed):
            if network.spiking:
                values |= self._measure_robustness(test.images)
            values |= self._measure_samples(train.images, test.images)
            if self.probe:
                few = train.images[: self.probe_images], train.labels[: self.probe_images]
                known, unknown = (encode_all(network, images) for images in (few[0], test.images))
                values["test/probe_accuracy"] = linear_probe(known, few[1], unknown, test.labels)
        self.log_dict({name: torch.tensor(value) for name, value in values.items()}, rank_zero_only=True)

    def _measure_robustness(self, images: Tensor) -> dict[str, float]:
        shuffled, noise = robustness(self.network, images, self.strengths, self.noise, self.shuffles)
        self._under_noise, levels = noise, noise.noisy[self.noise]
        values = noise.values("mse_") | noise.losses() | {"noise_slope": slope(list(levels), list(levels.values()))}
        values["mse_shuffled"] = float(shuffled.mean())
        values["mse_shuffled_std"] = float(shuffled.std(correction=0))
        values["shuffle_change"] = values["mse_shuffled"] / noise.clean - 1
        return {f"test/{name}": value for name, value in values.items()}

    def _measure_samples(self, train: Tensor, test: Tensor) -> dict[str, float]:
        network, values = self.network, {}
        if self._features is not None:
            features = self._features.to(self.device).network
            floor, distance = frechet_autoencoder_distances(
                network, features, test, train, self.generated, self._reference
            )
            values = {"test/fad_real": floor} | ({} if distance is None else {"test/fad": distance})
        if self._inception is not None and network.generates:
            inception = self._inception.to(self.device).network
            values["test/fid"], values["test/is"] = fid_and_score(network, inception, test, self.generated)
        return values

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/mse", "min")

    def progress(self) -> Progress:
        return Progress("step", self.global_step)

    def training_parts(self, shape: tuple[int, ...]) -> TrainingStep:
        return TrainingStep(self.network, shape, optim.optimizer_of(self.configure_optimizers()))

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """val, test: images beside their reconstructions, samples of the prior, latents; test: the noise curve too."""
        if split == "train" or self._shown is None:
            return {}
        training = self.network.training
        self.network.eval()
        with isolated_rng(self.eval_seed):
            items = pictures(self.network, self._shown)
        self.network.train(training)
        if split == "test" and self._under_noise is not None:
            items["noise"] = self._under_noise.curve("probability of noise on a latent spike", "mean squared error")
        return items

    def export(self, directory: Path) -> list[Path]:
        """Write the decoder for plain PyTorch: see `lit_modules.esvae.export`."""
        with isolated_rng(self.eval_seed):
            return export_autoencoder(self.network, Path(directory))
