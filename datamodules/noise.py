"""Noise and classes that images are to be made from, where there are no images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import lightning.pytorch as pl
import torch
from torch import Tensor

from datamodules.images.catalog import describe
from datamodules.loaders import TrainLoader, TrainOrder, rank_and_world
from leanlight.contracts import ImageMeta, NoiseBatch, UserError, run_seed
from leanlight.contracts.ranges import PositiveInt, Seed
from leanlight.ops import counter


class NoiseDataModule(pl.LightningDataModule):
    """What images of a catalogue set may be made from without it: latents and classes, by number of the image.

    Nothing is loaded. Batches are `NoiseBatch`, in order of `index`, and each is a function of the seed and its indices
    alone. A batch is never divided: rank r of W takes batches r, r + W, …, and one that lacks a last batch takes an
    early one again. There are no validation, test and predict batches.

    Args:
        dataset: name in ``leanlight data list``, whose shape and classes the images shall have.
        items: images of an epoch; a multiple of `batch_size`.
        batch_size: images that are made together.
        latent_size: numbers of a latent; 256 in the DDA code.
        image_size: side of the square images; default that of the set.
        seed: of latents and classes; default the seed of ``seed_everything``, else 0.

    Attributes (after `setup`): ``meta``.
    """

    meta: ImageMeta

    def __init__(
        self,
        dataset: str = "fashion_mnist",
        items: PositiveInt = 80_000,
        batch_size: PositiveInt = 200,
        latent_size: PositiveInt = 256,
        image_size: PositiveInt | None = None,
        seed: Seed | None = None,
    ) -> None:
        super().__init__()
        info = describe(dataset)
        if info.by_path or info.name == "celeba":
            raise UserError(
                f"dataset: expected a set whose classes the catalogue knows, each image of one; got {dataset}"
            )
        for name, value in (("batch_size", batch_size), ("latent_size", latent_size), ("image_size", image_size)):
            if value is not None and value < 1:
                raise UserError(f"{name}: expected at least 1, got {value}")
        if items < batch_size or items % batch_size:
            below = items // batch_size * batch_size
            fits = f"{below} or {below + batch_size}" if below else f"{batch_size}"
            raise UserError(f"items: expected a multiple of batch_size {batch_size}, such as {fits}; got {items}")
        self.info, self.items, self.batch_size, self.latent_size = info, items, batch_size, latent_size
        self.shape = (info.shape[0], *([image_size] * 2 if image_size else info.shape[1:]))
        self.seed = seed

    def ensure_available(self) -> None:
        """Nothing is to be found."""

    def setup(self, stage: str | None = None) -> None:
        """Draw up `meta`."""
        seed, classes = run_seed(self.seed), self.info.num_classes
        labels = counter.labels(seed, torch.arange(self.items), classes)
        said = f"noise {self.info.name} {self.shape} {classes} {self.items} {self.latent_size} {seed}"
        channels, height, width = self.shape
        self.meta = ImageMeta(
            name=self.info.name,
            source="noise",
            num_classes=classes,
            shape=(channels, height, width),
            classes=self.info.class_names,
            counts={"train": self.items, "val": 0, "test": 0},
            class_counts=tuple(labels.bincount(minlength=classes).tolist()),
            fingerprint=hashlib.sha256(said.encode()).hexdigest(),
        )

    def train_dataloader(self) -> TrainLoader[NoiseBatch]:
        """Batches in order, stateful."""
        seed, (rank, world) = run_seed(self.seed), rank_and_world()

        def batch(number: Tensor) -> NoiseBatch:
            index = torch.arange(self.batch_size) + number * self.batch_size
            return NoiseBatch(
                latent=counter.noise(seed, index, self.latent_size),
                label=counter.labels(seed, index, self.info.num_classes),
                index=index,
            )

        def fetch(numbers: Iterable[Tensor]) -> Iterator[NoiseBatch]:
            return map(batch, numbers)

        # Whole batches are what is dealt out, so they are the order's items.
        order = TrainOrder(self.items // self.batch_size, 1, seed, shuffle=False, rank=rank, world=world)
        return TrainLoader(order, fetch)
