"""Training glue of the image classifier: hooks, optimisers, logging."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from leanlight.contracts import (
    ImageBatch,
    ImageData,
    MediaItem,
    Split,
    UserError,
    data_of,
)
from leanlight.contracts.ranges import PositiveFloat, Share, UnitInterval
from lit_modules.classifier import pictures
from lit_modules.classifier.hooks import ClassifierHooks
from lit_modules.classifier.losses import class_index, cross_entropy, distillation_loss
from lit_modules.frozen import Frozen, frozen_module
from lit_modules.hparams import save_hparams
from lit_modules.step_log import log_step


class ImageClassifier(ClassifierHooks):
    """Train a network on images with cross entropy, optionally beside a frozen teacher.

    With a teacher the loss is ``(1 - w) CE + w KD``, w being `distill_weight` and KD the knowledge distillation of
    Hinton et al. (2015), `lit_modules.classifier.distillation_loss`; both are weighted where the batch has weights.

    Args:
        network: makes the network: float images (N, C, H, W) in [0, 1] → logits (N, K).
        optimizer: makes the optimiser from the network's parameters; Adam with lr 0.001 by default.
        lr_scheduler: makes the learning-rate schedule from the optimiser; constant by default.
        lr_interval: what a step of the schedule follows, ``epoch`` or ``step``.
        label_smoothing: share of the label spread over all classes in training, in [0, 1).
        teacher_checkpoint: checkpoint of another ImageClassifier, for the same images and classes.
        distill_weight: share w of distillation in the loss, in [0, 1].
        distill_temperature: temperature T of distillation, positive; 4 by habit of the field.
        compile: compile the network with ``torch.compile`` before fitting.
        channels_last: keep images and weights in that memory format, which GPUs' tensor cores prefer.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: Share = 0.0,
        teacher_checkpoint: Path | None = None,
        distill_weight: UnitInterval = 0.0,
        distill_temperature: PositiveFloat = 4.0,
        compile: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if not 0.0 <= distill_weight <= 1.0:
            raise UserError(f"distill_weight: expected a number in [0, 1], got {distill_weight}")
        if teacher_checkpoint is not None and distill_weight == 0.0:
            raise UserError("distill_weight: expected a number above 0 with teacher_checkpoint, got 0")
        if distill_temperature <= 0.0:
            raise UserError(f"distill_temperature: expected a positive number, got {distill_temperature}")
        if not 0.0 <= label_smoothing < 1.0:
            raise UserError(f"label_smoothing: expected a number in [0, 1), got {label_smoothing}")
        save_hparams(self)
        self._compose(network(), optimizer, lr_scheduler, lr_interval, channels_last)
        self.label_smoothing = label_smoothing
        self.teacher_checkpoint = teacher_checkpoint
        self.distill_weight = distill_weight
        self.distill_temperature = distill_temperature
        self.compile_network = compile
        self._teacher: Frozen[nn.Module] | None = None
        self._train_images: Tensor | None = None

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check the network against the data, make metrics for its classes, load the teacher."""
        self._fit_to(data_of(self, ImageData).meta)
        if stage == "fit":
            if self.distill_weight > 0:
                self._teacher = Frozen(self._load_teacher())
            if self.compile_network:
                self.network.compile()

    def _load_teacher(self) -> nn.Module:
        helps = "leanlight run classifier/pipelines/fashion_mnist_small trains one first"
        shape, classes = self.evaluation.input_shape, self.evaluation.classes
        return frozen_teacher(self.teacher_checkpoint, "teacher_checkpoint", helps, shape, classes)

    def on_fit_start(self) -> None:
        if self._teacher is not None:
            self._teacher.to(self.device)

    # ---- steps ----

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        logits = self(batch.image)
        # With weights each process divides by those of its own batch, and DDP takes the mean of all gradients:
        # not that of the global batch, where the sums of their weights differ.
        loss = mistakes = cross_entropy(logits, batch.label, batch.weight, self.label_smoothing)
        self._terms = {"cross_entropy": mistakes.detach()}
        if self._teacher is not None:
            with torch.no_grad():
                targets = self._teacher(batch.image)
            distillation = distillation_loss(logits, targets, self.distill_temperature, batch.weight)
            loss = (1 - self.distill_weight) * mistakes + self.distill_weight * distillation
            self._terms["distillation"] = distillation.detach()
        if batch_idx == 0:
            self._train_images = batch.image[: pictures.SHOWN].detach().clone()
        right = (logits.detach().argmax(1) == class_index(batch.label)).float().mean()
        log_step(self, {"train/loss": loss, "train/accuracy": right}, len(batch), over_processes=True)
        return loss

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """train: the augmented first batch. val, test: see `ClassifierEvaluation.media`."""
        if split == "train":
            return {} if self._train_images is None else {"batch": pictures.batch(self._train_images)}
        return super().media(split)


def frozen_teacher(
    checkpoint: Path | None,
    argument: str,
    helps: str,
    shape: tuple[int, ...],
    classes: tuple[str, ...],
    same_classes: Callable[[Any, Any], bool] = operator.eq,
) -> nn.Module:
    """The network of an ImageClassifier's checkpoint, frozen, on the CPU.

    Args:
        checkpoint: the file.
        argument: name of the caller's argument that holds its path, for errors.
        helps: what to do when there is none.
        shape: (C, H, W) of the images that it must be for.
        classes: label names that it must be for.
        same_classes: whether two lists of label names mean the same; by default equal ones alone.

    Raises:
        UserError: no such checkpoint, or one for other images or classes.
    """
    # Without its own teacher, whose file may be gone.
    overrides: dict[str, Any] = {"teacher_checkpoint": None, "distill_weight": 0.0}
    teacher = frozen_module(ImageClassifier, checkpoint, argument, helps, **overrides)
    its = teacher.evaluation
    for name, expected, got, same in (
        ("images of shape", shape, its.input_shape, operator.eq),
        ("the classes", classes, its.classes, same_classes),
    ):
        if not same(expected, got):
            raise UserError(f"{argument}: expected a teacher for {name} {expected}, got one for {got}")
    return teacher.network
