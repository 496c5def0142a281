"""A distilled set for training, and the real images it stands for, brought into its space, for everything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from datamodules.images.module import ImageDataModule, scaled
from datamodules.loaders import TrainLoader, train_loader
from leanlight.contracts import ImageBatch, UserError, sha256_file
from leanlight.ops.differentiable import find_augmentation
from leanlight.ops.whitening import apply_zca


class DistilledDataModule(ImageDataModule):
    """Train on a set that `leanlight export` wrote for a distillation run; validate and test on real images.

    Images of all parts lie in the set's own space, not in [0, 1]: networks want mean 0 and std 1.

    Args:
        distilled: folder of the export, or its ``distilled.safetensors``.
        augment: of training batches; a name in `leanlight.ops.differentiable.ALL_AUGMENTATIONS`.
        kwargs: of `ImageDataModule`; they say which real images.
    """

    def __init__(self, distilled: str | Path, augment: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        path = Path(distilled)
        self.distilled = path / "distilled.safetensors" if path.is_dir() else path
        self._distilled_augment = find_augmentation(augment, "data.init_args.augment")
        self._tensors: dict[str, Tensor] = {}

    def ensure_available(self) -> None:
        """Find the real data and the distilled set; UserError for what is missing."""
        if not self.distilled.is_file():
            raise UserError(
                f"data.init_args.distilled: expected the folder that `leanlight export RUN_DIR` wrote for a "
                f"distillation run, or its distilled.safetensors; nothing at {self.distilled}"
            )
        super().ensure_available()

    def setup(self, stage: str | None = None) -> None:
        """Load both; `meta` describes the distilled set in its counts and fingerprint."""
        if self._tensors:
            return
        super().setup(stage)
        self._tensors = self._load_set()
        self.images, self.labels = self._tensors["images"], self._tensors["labels"]
        shape, classes = tuple(self.images.shape[1:]), self.labels.shape[1]
        for name, got, expected in (
            ("images of shape", shape, tuple(self.meta.shape)),
            ("classes", classes, self.meta.num_classes),
        ):
            if got != expected:
                raise UserError(
                    f"data.init_args.distilled: expected {name} {expected}, as {self.dataset} has; {self.distilled} "
                    f"has {got}"
                )
        self.meta = dataclasses.replace(
            self.meta,
            counts={**self.meta.counts, "train": len(self.images)},
            class_counts=tuple(self.labels.argmax(1).bincount(minlength=classes).tolist()),
            fingerprint=f"{self.meta.fingerprint}+{sha256_file(self.distilled)}",
        )

    def _load_set(self) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(self.distilled)
        except SafetensorError as error:
            raise UserError(f"data.init_args.distilled: {self.distilled} is damaged ({error})") from error
        if not {"images", "labels"} <= set(tensors) or not (
            {"whitening"} <= set(tensors) or {"mean", "std"} <= set(tensors)
        ):
            raise UserError(
                f"data.init_args.distilled: expected images, labels, and whitening or mean and std; {self.distilled} "
                f"holds {sorted(tensors)}"
            )
        return tensors

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches of the distilled set."""
        return train_loader(self, len(self.images), self._batches, self.batch_size, self.seed, self.drop_last)

    def _batches(self, blocks: Iterable[Tensor]) -> Iterator[ImageBatch]:
        for index in blocks:
            yield ImageBatch(self.images[index], self.labels[index], index)

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Augment training batches; bring all others into the set's space."""
        if self.trainer is not None and self.trainer.training:
            augment = self._distilled_augment
            return dataclasses.replace(batch, image=augment(batch.image, None)) if augment else batch
        image = scaled(batch).image
        tensors = {
            name: value.to(image.device) for name, value in self._tensors.items() if name not in ("images", "labels")
        }
        if "whitening" in tensors:
            return dataclasses.replace(batch, image=apply_zca(image, tensors["whitening"]))
        return dataclasses.replace(batch, image=(image - tensors["mean"]) / tensors["std"])
