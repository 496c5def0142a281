"""Training glue of the image classifier: hooks, optimisers, logging."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from leanlight.contracts import (
    Allows,
    ImageBatch,
    ImageData,
    MediaItem,
    PrimaryMetric,
    Progress,
    Split,
    TrainingStep,
    UserError,
    data_of,
    predicted_origin,
)
from lit_modules.classifier import pictures
from lit_modules.classifier.evaluation import ClassifierEvaluation
from lit_modules.classifier.export import export_network
from lit_modules.classifier.losses import class_index, cross_entropy, distillation_loss
from lit_modules.frozen import Frozen, frozen_module
from lit_modules.hparams import save_hparams
from lit_modules.nn.checks import check_classifier, follow_classes
from lit_modules.nn.features import logits_and_features
from lit_modules.optim import configure
from lit_modules.step_log import log_step


class ImageClassifier(LightningModule):
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

    allows = Allows()

    def __init__(
        self,
        network: Callable[[], nn.Module],
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: float = 0.0,
        teacher_checkpoint: Path | None = None,
        distill_weight: float = 0.0,
        distill_temperature: float = 4.0,
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
        self.network = network()
        # A class as default would be a trap: jsonargparse keeps its arguments when a config names another class.
        self.make_optimizer = optimizer or torch.optim.Adam
        self.make_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.label_smoothing = label_smoothing
        self.teacher_checkpoint = teacher_checkpoint
        self.distill_weight = distill_weight
        self.distill_temperature = distill_temperature
        self.compile_network = compile
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.evaluation = ClassifierEvaluation()
        self._teacher: Frozen[nn.Module] | None = None
        self._terms: dict[str, Tensor] = {}
        self._train_images: Tensor | None = None

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check the network against the data, make metrics for its classes, load the teacher."""
        meta = data_of(self, ImageData).meta
        follow_classes(self.network, meta.num_classes)
        check_classifier(self.network, meta.shape, meta.num_classes)
        self.evaluation.prepare(meta.shape, meta.classes)
        if stage == "fit":
            if self.distill_weight > 0:
                self._teacher = Frozen(self._load_teacher())
            if self.compile_network:
                self.network.compile()

    def _load_teacher(self) -> nn.Module:
        helps = "leanlight run classifier/pipelines/fashion_mnist_small trains one first"
        # Without its own teacher, whose file may be gone.
        overrides: dict[str, Any] = {"teacher_checkpoint": None, "distill_weight": 0.0}
        teacher = frozen_module(ImageClassifier, self.teacher_checkpoint, "teacher_checkpoint", helps, **overrides)
        ours, its = self.evaluation, teacher.evaluation
        for name, expected, got in (
            ("images of shape", ours.input_shape, its.input_shape),
            ("the classes", ours.classes, its.classes),
        ):
            if got != expected:
                raise UserError(f"teacher_checkpoint: expected a teacher for {name} {expected}, got one for {got}")
        return teacher.network

    def on_fit_start(self) -> None:
        if self._teacher is not None:
            self._teacher.to(self.device)

    def compile_networks(self, **options: Any) -> None:
        self.network.compile(**options)

    def configure_optimizers(self) -> Any:
        return configure(self.network.parameters(), self.make_optimizer, self.make_scheduler, self.lr_interval)

    # ---- steps ----

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] → (N, K) logits."""
        return self.network(self._laid_out(image))

    def _laid_out(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=self.memory_format)

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

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return what rules of selection ask for, too, so that a fitted classifier serves as their selector.

        ``index`` (N,), ``origin`` (N,) where the data knows it, ``label`` as the data has it, ``probabilities`` and
        ``logits`` (N, K), and ``embedding`` (N, D) where the network gives its vectors before the last layer.
        """
        logits, embedding = logits_and_features(self.network, self._laid_out(batch.image))
        outputs = {"index": batch.index, **predicted_origin(self, batch.index), "label": batch.label}
        outputs |= {"probabilities": logits.softmax(1), "logits": logits.float()}
        return outputs if embedding is None else outputs | {"embedding": embedding.float()}

    def _evaluate(self, batch: ImageBatch, split: Split) -> None:
        values = self.evaluation.update(split, batch.image, self(batch.image), batch.label)
        self.log_dict(values, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(batch))

    def on_validation_epoch_start(self) -> None:
        self.evaluation.start("val")

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish("val"), sync_dist=True)

    def on_test_epoch_start(self) -> None:
        self.evaluation.start("test")

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish("test"), sync_dist=True)

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/accuracy", "max")

    def progress(self) -> Progress:
        return Progress("step", self.global_step)

    def training_parts(self, shape: tuple[int, ...]) -> TrainingStep:
        return TrainingStep(self.network, shape, self.make_optimizer(self.network.parameters()))

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """train: the augmented first batch. val, test: see `ClassifierEvaluation.media`."""
        if split == "train":
            return {} if self._train_images is None else {"batch": pictures.batch(self._train_images)}
        return self.evaluation.media(split, self.network)

    def export(self, directory: Path) -> list[Path]:
        """Write the network for plain PyTorch: see `lit_modules.classifier.export`."""
        return export_network(self.network, self.evaluation.example(), Path(directory), self.evaluation.classes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["classifier"] = self.evaluation.data

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.evaluation.prepare(**checkpoint["classifier"])
        follow_classes(self.network, len(self.evaluation.classes))
