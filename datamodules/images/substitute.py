"""Another training set in the place of the real one; validation, test and prediction stay with the real images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from datamodules.images.module import ImageDataModule, scaled
from leanlight.contracts import ImageBatch, ImageMeta, ImageSplit, UserError, sha256_file
from leanlight.ops.differentiable import find_augmentation
from leanlight.ops.whitening import apply_zca


class SubstituteDataModule(ImageDataModule):
    """Base of data whose training set comes from a file, and whose validation and test sets are real.

    An heir says what its file holds, in `load_substitute`. After `setup`, ``train_split`` is the substitute, and `meta`
    describes it in its counts and its fingerprint.

    Args:
        file: where the substitute lies.
        kwargs: of `ImageDataModule`; they say which real images.
    """

    #: The heir's argument that names the file, and what is expected there: for messages.
    argument: ClassVar[str]
    expected: ClassVar[str]

    def __init__(self, file: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.file, self._substituted = file, False

    def ensure_available(self) -> None:
        """Find the real data and the substitute; UserError for what is missing."""
        check_there(self.file, self.argument, self.expected)
        super().ensure_available()

    def setup(self, stage: str | None = None) -> None:
        """Load the real data, then put the substitute into the place of its training split, once."""
        if self._substituted:
            return
        super().setup(stage)
        self.train_split = self.load_substitute()
        self._substituted = True
        self.meta = with_training_set(self.meta, self.train_split.labels, self.file)

    def load_substitute(self) -> ImageSplit:
        """The training set in ``file``; ``train_split`` still is the real one. UserError unless it fits `meta`."""
        raise NotImplementedError


def check_there(file: Path, argument: str, expected: str) -> None:
    """Raise UserError unless there is a file."""
    if not file.is_file():
        raise UserError(f"{argument}: expected {expected}; nothing at {file}")


def with_training_set(meta: ImageMeta, labels: Tensor, file: Path) -> ImageMeta:
    """Facts of data whose training set came from a file, with (N,) classes or (N, K) soft labels."""
    labels = labels.argmax(1) if labels.ndim > 1 else labels
    return dataclasses.replace(
        meta,
        counts={**meta.counts, "train": len(labels)},
        class_counts=tuple(labels.bincount(minlength=meta.num_classes).tolist()),
        fingerprint=f"{meta.fingerprint}+{sha256_file(file)}",
    )


class DistilledDataModule(SubstituteDataModule):
    """Trains on a set that `leanlight export` wrote for a distillation run; validates and tests on real images.

    Images of all parts lie in the set's own space, not in [0, 1]: networks want mean 0 and std 1.

    Args:
        distilled: folder of the export, or its ``distilled.safetensors``.
        augment: of training batches; a name in `leanlight.ops.differentiable.ALL_AUGMENTATIONS`; none by default.
        kwargs: of `ImageDataModule`; they say which real images.
    """

    argument = "distilled"
    expected = "the folder that `leanlight export RUN_DIR` wrote for a distillation run, or its distilled.safetensors"

    def __init__(self, distilled: str | Path, augment: str | None = None, **kwargs: Any) -> None:
        path = Path(distilled)
        super().__init__(path / "distilled.safetensors" if path.is_dir() else path, **kwargs)
        if self.train_corruption is not None:
            raise UserError("train_corruption: expected none, since distilled images do not lie in [0, 1]")
        self._distilled_augment = find_augmentation(augment, "augment")
        self._space: dict[str, Tensor] = {}

    def load_substitute(self) -> ImageSplit:
        """Images (N, C, H, W) float32 and soft labels (N, K); the rest of the file says what space they lie in."""
        tensors = read_safetensors(self.file, self.argument)
        if not {"images", "labels"} <= set(tensors) or not (
            {"whitening"} <= set(tensors) or {"mean", "std"} <= set(tensors)
        ):
            raise UserError(
                f"distilled: expected images, labels, and whitening or mean and std; {self.file} holds "
                f"{sorted(tensors)}"
            )
        images, labels = tensors.pop("images"), tensors.pop("labels")
        for name, got, expected in (
            ("images of shape", tuple(images.shape[1:]), tuple(self.meta.shape)),
            ("classes", labels.shape[1], self.meta.num_classes),
        ):
            if got != expected:
                raise UserError(f"distilled: expected {name} {expected}, as {self.dataset} has; {self.file} has {got}")
        self._space = tensors
        return ImageSplit(images, labels, torch.arange(len(images)))

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Augment distilled images in training; bring real ones, which come as uint8, into the set's space."""
        if batch.image.dtype != torch.uint8:
            augment = self._distilled_augment if self.trainer is not None and self.trainer.training else None
            return dataclasses.replace(batch, image=augment(batch.image, None)) if augment else batch
        image = scaled(batch).image
        space = {name: value.to(image.device) for name, value in self._space.items()}
        if "whitening" in space:
            return dataclasses.replace(batch, image=apply_zca(image, space["whitening"]))
        return dataclasses.replace(batch, image=(image - space["mean"]) / space["std"])


def read_safetensors(file: Path, argument: str) -> dict[str, Tensor]:
    """Tensors of a file by name; UserError naming `argument` when it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise UserError(f"{argument}: {file} is damaged ({error})") from error
