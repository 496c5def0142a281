"""Training glue of the ESVAE family: hooks, optimisers, logging, pictures, measurements, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from leanlight.contracts import (
    Curve,
    Heatmap,
    Histogram,
    ImageBatch,
    ImageGrid,
    InMemoryImages,
    MediaItem,
    PrimaryMetric,
    Progress,
    Split,
    UserError,
    data_of,
    isolated_rng,
)
from lit_modules.esvae.evaluation import (
    encode_all,
    frechet_autoencoder_distance,
    mean_image_error,
    robustness,
)
from lit_modules.esvae.export import export_autoencoder
from lit_modules.esvae.metrics import Noise, linear_probe, slope
from lit_modules.esvae.networks import ESVAE, Autoencoder, Code, to_signed, to_unit
from lit_modules.hparams import save_hparams

_SHOWN = 20  # images in a grid
_PIPELINE = "leanlight run esvae/pipelines/fashion_mnist_small trains one first"


class ImageAutoencoder(LightningModule):
    """Train and measure an autoencoder of the ESVAE family: ESVAE, FSVAE, VAE, SAE or the feature autoencoder.

    Loss: ``MSE(x', x) + divergence_weight * divergence`` on the [-1, 1] scale. Latents are sampled in evaluation too,
    from fixed seeds.

    network: makes the network (`lit_modules.esvae`), images (N, C, H, W) in [0, 1]. optimizer: AdamW with lr 1e-3 and
    weight decay 1e-3 by default. lr_scheduler: stepped each epoch. divergence_weight: λ, or ``1/num_batches`` for one
    over the training batches an epoch. bottleneck_lr_factor: learning rate of ESVAE's prior over that of the rest (10).
    feature_checkpoint: trained feature autoencoder for the Fréchet distance; without it FAD is not measured. generated:
    images drawn for FAD. strengths, noise: spike noise of the robustness test. probe: measure a linear probe on the
    features. probe_images: at most so many training images for it. eval_seed: of everything that evaluation draws.
    """

    def __init__(
        self,
        network: Callable[[], Autoencoder],
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        divergence_weight: float | Literal["1/num_batches"] = 1e-3,
        bottleneck_lr_factor: float = 10.0,
        feature_checkpoint: Path | None = None,
        generated: int = 5120,
        strengths: Sequence[float] = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
        noise: Noise = "flip",
        probe: bool = True,
        probe_images: int = 10_000,
        eval_seed: int = 0,
    ) -> None:
        super().__init__()
        if isinstance(divergence_weight, float) and divergence_weight < 0:
            raise UserError(f"model.init_args.divergence_weight: expected a number from 0, got {divergence_weight}")
        if generated < 2:
            raise UserError(f"model.init_args.generated: expected at least 2, got {generated}")
        if not all(0 <= strength <= 1 for strength in strengths) or len(strengths) < 2:
            raise UserError(f"model.init_args.strengths: expected two or more numbers in [0, 1], got {strengths}")
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
        # In a tuple, hidden from nn.Module: the judge belongs neither to the parameters nor to the checkpoint.
        self._judge: tuple[Autoencoder, ...] = ()
        self._terms: dict[str, Tensor] = {}
        self._shown: Tensor | None = None
        self._curve: list[float] = []

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check the network against the data; load the feature autoencoder."""
        meta = data_of(self, InMemoryImages).meta
        if tuple(meta.shape) != self.network.image_shape:
            channels, size = self.network.image_shape[0], self.network.image_shape[-1]
            raise UserError(
                f"model.init_args.network: made for in_channels {channels} and image_size {size}, the data has shape "
                f"{tuple(meta.shape)}; data.init_args.image_size resizes it"
            )
        if self.feature_checkpoint is not None and not self._judge:
            self._judge = (self._load_judge(),)

    def _load_judge(self) -> Autoencoder:
        key = "model.init_args.feature_checkpoint"
        if not Path(str(self.feature_checkpoint)).is_file():
            raise UserError(f"{key}: no file at {self.feature_checkpoint}; {_PIPELINE}")
        with isolated_rng():  # building it must not change this module's training
            try:
                judge = ImageAutoencoder.load_from_checkpoint(
                    str(self.feature_checkpoint), map_location="cpu", weights_only=True
                )
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                what = str(error).splitlines()[0]
                raise UserError(f"{key}: {self.feature_checkpoint} is no autoencoder ({what}); {_PIPELINE}") from error
        if judge.network.image_shape != self.network.image_shape:
            expected, found = self.network.image_shape, judge.network.image_shape
            raise UserError(f"{key}: expected one for images of shape {expected}, got {found}")
        return judge.network.eval().requires_grad_(False)

    def configure_optimizers(self) -> Any:
        network = self.network
        bottleneck = network.bottleneck if isinstance(network, ESVAE) else None
        prior = list(bottleneck.parameters()) if bottleneck is not None else []
        known = set(map(id, prior))
        groups = [{"params": [p for p in network.parameters() if id(p) not in known]}]
        if prior:
            groups.append({"params": prior})
        make = self.make_optimizer or (lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=1e-3))
        optimizer = make(groups)
        for group in optimizer.param_groups[1:]:
            group["lr"] *= self.bottleneck_lr_factor
        return optimizer if self.make_scheduler is None else ([optimizer], [self.make_scheduler(optimizer)])

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
        self.log_dict(values, sync_dist=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def _evaluate(self, batch: ImageBatch, batch_idx: int, split: Split) -> None:
        with isolated_rng(self.eval_seed + batch_idx):
            code, rebuilt, mse = self._reconstruct(batch)
        values = {f"{split}/mse": mse, f"{split}/divergence": code.divergence}
        self.log_dict(values, sync_dist=True, batch_size=len(batch))
        if batch_idx == 0:
            self._show(batch.image, rebuilt)

    def _show(self, image: Tensor, rebuilt: Tensor) -> None:
        """Keep the first images, in [0, 1], beside their reconstructions, in [-1, 1]."""
        pair = (image[:_SHOWN], to_unit(rebuilt[:_SHOWN]))
        self._shown = torch.stack(pair, 1).flatten(0, 1).float().cpu()

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``index`` (N,), ``image`` (N, C, H, W) reconstructed in [0, 1] and ``features`` (N, d)."""
        with isolated_rng(self.eval_seed + batch_idx):
            code, rebuilt, _ = self._reconstruct(batch)
        if batch_idx == 0:
            self._show(batch.image, rebuilt)
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
                shuffled, self._curve = robustness(network, test.images, self.strengths, self.noise)
                noisy = zip(self.strengths, self._curve, strict=True)
                values |= {f"test/mse_{self.noise}_{strength:g}": error for strength, error in noisy}
                values |= {"test/mse_shuffled": shuffled, "test/noise_slope": slope(self.strengths, self._curve)}
            if self._judge and network.generates:
                judge = self._judge[0].to(self.device)
                values["test/fad"] = frechet_autoencoder_distance(network, judge, test.images, self.generated)
            if self.probe:
                few = train.images[: self.probe_images], train.labels[: self.probe_images]
                features = [encode_all(network, images) for images in (few[0], test.images)]
                values["test/probe_accuracy"] = linear_probe(features[0], few[1], features[1], test.labels)
        self.log_dict({name: torch.tensor(value) for name, value in values.items()}, rank_zero_only=True)

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/mse", "min")

    def progress(self) -> Progress:
        return Progress("step", self.global_step)

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """val, test: images beside their reconstructions, samples of the prior, latents; test: the noise curve too."""
        if split == "train" or self._shown is None:
            return {}
        items: dict[str, MediaItem] = {"reconstructions": ImageGrid(self._shown, columns=10)}
        training = self.network.training
        self.network.eval()
        with isolated_rng(self.eval_seed):
            if self.network.generates:
                items["samples"] = ImageGrid(self.network.generate(40).float().clamp(0, 1).cpu(), columns=10)
            items |= self._latent_media()
        self.network.train(training)
        if split == "test" and self._curve:
            axis = f"probability of spike noise ({self.noise})"
            items["noise"] = Curve(self.strengths, {"test": self._curve}, axis, "mean squared error")
        return items

    def _latent_media(self) -> dict[str, MediaItem]:
        assert self._shown is not None
        code = self.network.encode(to_signed(self._shown[::2].to(self.device)))
        if not self.network.spiking:
            return {"latent": Histogram({"means": code.features.cpu()}, "latent value")}
        rates = {"encoder": code.features.cpu()}
        if isinstance(self.network, ESVAE):
            rates["prior"] = self.network.prior_rates(1000).cpu()
        raster = Heatmap(code.z[:, 0].T.cpu(), "time step", "latent neuron")
        return {"latent_rates": Histogram(rates, "firing rate"), "raster": raster}

    def export(self, directory: Path) -> list[Path]:
        """Write the decoder for plain PyTorch: see `lit_modules.esvae.export`."""
        return export_autoencoder(self.network, Path(directory))
