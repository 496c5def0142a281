"""Training glue of the image classifier: hooks, optimisers, logging, pictures, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from leanlight.contracts import (
    Bars,
    Heatmap,
    ImageBatch,
    ImageData,
    ImageGrid,
    MediaItem,
    PrimaryMetric,
    Progress,
    Split,
    UserError,
    data_of,
    isolated_rng,
)
from lit_modules.classifier.export import export_network
from lit_modules.classifier.losses import class_index, distillation_loss
from lit_modules.hparams import save_hparams
from lit_modules.nn.checks import check_classifier, first_line

_SHOWN = 40  # images in a grid


class ImageClassifier(LightningModule):
    """Train a network on images with cross entropy, optionally beside a frozen teacher.

    network: makes the network, float images (N, C, H, W) in [0, 1] → logits (N, K). optimizer, lr_scheduler: make
    them from parameters and from the optimiser; lr_interval says whether the schedule counts epochs or steps.
    label_smoothing: in [0, 1). teacher_checkpoint: checkpoint of another ImageClassifier. distill_weight: share w of
    knowledge distillation (Hinton et al. 2015) in the loss ``(1 - w) CE + w KD``, in [0, 1]; distill_temperature: its
    temperature. compile: compile the network before fitting. channels_last: keep images and weights in that memory
    format.
    """

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
            raise UserError(f"model.init_args.distill_weight: expected a number in [0, 1], got {distill_weight}")
        if teacher_checkpoint is not None and distill_weight == 0.0:
            raise UserError("model.init_args.distill_weight: expected a number above 0 with teacher_checkpoint, got 0")
        if distill_temperature <= 0.0:
            raise UserError(
                f"model.init_args.distill_temperature: expected a positive number, got {distill_temperature}"
            )
        if not 0.0 <= label_smoothing < 1.0:
            raise UserError(f"model.init_args.label_smoothing: expected a number in [0, 1), got {label_smoothing}")
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
        self.input_shape: tuple[int, ...] = ()
        self.classes: tuple[str, ...] = ()
        # In a tuple, hidden from nn.Module: the teacher belongs neither to the parameters nor to the checkpoint.
        self._teacher: tuple[nn.Module, ...] = ()
        self.metrics = nn.ModuleDict()  # by split, made in `setup` for the classes of the data
        self._terms: dict[str, Tensor] = {}
        self._train_images: Tensor | None = None
        self._confusion: dict[str, Tensor] = {}
        self._mistakes: dict[str, _Mistakes] = {}

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check the network against the data, make metrics for its classes, load the teacher."""
        meta = data_of(self, ImageData).meta
        self.input_shape, self.classes = tuple(meta.shape), tuple(meta.classes)
        check_classifier(self.network, self.input_shape, meta.num_classes, self.device)
        for split in ("val", "test"):
            if split not in self.metrics:
                self.metrics[split] = _metrics(split, meta.num_classes)
        if stage == "fit":
            if self.distill_weight > 0:
                self._teacher = (self._load_teacher(),)
            if self.compile_network:
                self.network.compile()

    def _load_teacher(self) -> nn.Module:
        key = "model.init_args.teacher_checkpoint"
        helps = "leanlight run classifier/pipelines/fashion_mnist_small trains one first"
        if self.teacher_checkpoint is None or not Path(self.teacher_checkpoint).is_file():
            raise UserError(
                f"{key}: expected the checkpoint of a trained classifier, got {self.teacher_checkpoint}; {helps}"
            )
        with isolated_rng():  # building the teacher must not change the student's training
            try:
                teacher = ImageClassifier.load_from_checkpoint(
                    self.teacher_checkpoint,
                    map_location="cpu",
                    weights_only=True,
                    teacher_checkpoint=None,
                    distill_weight=0.0,
                )
            except Exception as error:
                raise UserError(
                    f"{key}: expected a classifier's checkpoint; {self.teacher_checkpoint} gives {first_line(error)}"
                ) from error
        for name, expected, got in (
            ("images of shape", self.input_shape, teacher.input_shape),
            ("the classes", self.classes, teacher.classes),
        ):
            if got != expected:
                raise UserError(f"{key}: expected a teacher for {name} {expected}, got one for {got}")
        return teacher.network.eval().requires_grad_(False)

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            teacher.to(self.device)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.network.parameters())
        if self.make_scheduler is None:
            return optimizer
        scheduler = self.make_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

    # ---- steps ----

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] → (N, K) logits."""
        return self.network(image.contiguous(memory_format=self.memory_format))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        logits = self(batch.image)
        loss = cross_entropy = F.cross_entropy(logits, batch.label, label_smoothing=self.label_smoothing)
        self._terms = {"cross_entropy": cross_entropy.detach()}
        if self._teacher:
            with torch.no_grad():
                targets = self._teacher[0](batch.image)
            distillation = distillation_loss(logits, targets, self.distill_temperature)
            loss = (1 - self.distill_weight) * cross_entropy + self.distill_weight * distillation
            self._terms["distillation"] = distillation.detach()
        if batch_idx == 0:
            self._train_images = batch.image[:_SHOWN].detach().clone()
        right = (logits.detach().argmax(1) == class_index(batch.label)).float().mean()
        values = {"train/loss": loss, "train/accuracy": right}
        self.log_dict(values, on_step=True, on_epoch=False, sync_dist=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``index`` (N,) and ``probabilities`` (N, K)."""
        return {"index": batch.index, "probabilities": self(batch.image).softmax(1)}

    def _evaluate(self, batch: ImageBatch, split: Split) -> None:
        logits, label = self(batch.image), class_index(batch.label)
        loss = F.cross_entropy(logits, batch.label)
        self.log(f"{split}/loss", loss, on_epoch=True, on_step=False, sync_dist=True, batch_size=len(batch))
        for name, metric in self._split_metrics(split).items():
            metric.update(logits, label)
            if name != "confusion":
                self.log(f"{split}/{name}", metric, on_epoch=True, on_step=False, batch_size=len(batch))
        self._mistakes[split].update(batch.image, logits, label)

    def _split_metrics(self, split: Split) -> dict[str, Metric]:
        return dict(cast(nn.ModuleDict, self.metrics[split]).items())  # type: ignore[arg-type]

    def _start_evaluation(self, split: Split) -> None:
        self._mistakes[split] = _Mistakes()
        self._split_metrics(split)["confusion"].reset()

    def _end_evaluation(self, split: Split) -> None:
        # Every rank computes, since that gathers; `media` may run on one rank only.
        self._confusion[split] = self._split_metrics(split)["confusion"].compute().float().cpu()

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation("val")

    def on_validation_epoch_end(self) -> None:
        self._end_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self._start_evaluation("test")

    def on_test_epoch_end(self) -> None:
        self._end_evaluation("test")
        worst = _class_accuracy(self._confusion["test"]).nan_to_num(1.0).min()
        self.log("test/accuracy_worst_class", float(worst), sync_dist=True)

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/accuracy", "max")

    def progress(self) -> Progress:
        return Progress("step", self.global_step)

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """train: the augmented first batch. val, test: confusion, accuracy by class, confident mistakes, first filters.

        On several ranks the mistakes are those of this rank's share.
        """
        if split == "train":
            return {} if self._train_images is None else {"batch": ImageGrid(_drawable(self._train_images))}
        items: dict[str, MediaItem] = {}
        if split in self._confusion:
            matrix = self._confusion[split]
            items["confusion"] = Heatmap(matrix, "predicted", "true", rows=self.classes, columns=self.classes)
            values = dict(zip(self.classes, _class_accuracy(matrix).tolist(), strict=True))
            items["class_accuracy"] = Bars(
                {name: value for name, value in values.items() if value == value}, "accuracy"
            )
        if (mistakes := self._mistakes.get(split)) is not None and mistakes.found:
            items["mistakes"] = mistakes.grid(self.classes)
        if (filters := _first_filters(self.network)) is not None:
            items["filters"] = ImageGrid(filters, columns=8)
        return items

    def example_input(self) -> tuple[Tensor, ...]:
        """Two blank images; UserError before the module has seen its data or a checkpoint made with it."""
        if not self.input_shape:
            raise UserError(
                "the classifier does not know its image shape yet; expected a fitted module or its checkpoint"
            )
        return (torch.zeros(2, *self.input_shape, device=self.device),)

    def export(self, directory: Path) -> list[Path]:
        """Write the network for plain PyTorch: see `lit_modules.classifier.export`."""
        (example,) = self.example_input()
        return export_network(self.network, example, Path(directory), self.classes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["classifier"] = {"input_shape": list(self.input_shape), "classes": list(self.classes)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.input_shape = tuple(checkpoint["classifier"]["input_shape"])
        self.classes = tuple(checkpoint["classifier"]["classes"])


class _Mistakes:
    """The wrong answers given with most confidence so far; stays on the device."""

    def __init__(self) -> None:
        self.found: tuple[Tensor, ...] = ()

    def update(self, image: Tensor, logits: Tensor, label: Tensor) -> None:
        """Merge a batch: image (N, C, H, W), logits (N, K), label (N,) int64."""
        confidence, predicted = logits.float().softmax(1).max(1)
        confidence = torch.where(predicted == label, -1.0, confidence)
        new = (confidence, image, predicted, label)
        merged = tuple(torch.cat(pair) for pair in zip(self.found, new, strict=True)) if self.found else new
        best = merged[0].topk(min(_SHOWN, len(merged[0]))).indices
        self.found = tuple(part[best] for part in merged)

    def grid(self, classes: Sequence[str]) -> ImageGrid:
        confidence, image, predicted, label = (part.cpu() for part in self.found)
        wrong = confidence >= 0
        captions = [
            f"{classes[true]} → {classes[guess]} {share:.0%}"
            for true, guess, share in zip(label[wrong], predicted[wrong], confidence[wrong].tolist(), strict=True)
        ]
        return ImageGrid(_drawable(image[wrong]), columns=8, captions=captions)


def _metrics(split: str, classes: int) -> nn.ModuleDict:
    """Metrics by logged name; `confusion` is kept for pictures."""
    metrics: dict[str, nn.Module] = {
        "accuracy": MulticlassAccuracy(classes, average="micro"),
        "confusion": MulticlassConfusionMatrix(classes),
    }
    if split == "test":
        metrics["calibration_error"] = MulticlassCalibrationError(classes, n_bins=15)
        if classes >= 10:
            metrics["top5_accuracy"] = MulticlassAccuracy(classes, top_k=5, average="micro")
    return nn.ModuleDict(metrics)


def _class_accuracy(confusion: Tensor) -> Tensor:
    """Share of each true class that is labelled right; nan for a class without items."""
    return confusion.diagonal() / confusion.sum(1)


def _drawable(image: Tensor) -> Tensor:
    """Clamp to [0, 1] and reduce to 1 or 3 channels, on the CPU."""
    image = image.detach().float().clamp(0, 1).cpu()
    return image if image.shape[1] in (1, 3) else image.mean(1, keepdim=True)


def _first_filters(network: nn.Module) -> Tensor | None:
    """Weights of the first convolution, each filter stretched to [0, 1]; none for networks that do not convolve."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            low, high = weight.amin((1, 2, 3), keepdim=True), weight.amax((1, 2, 3), keepdim=True)
            return _drawable((weight - low) / (high - low).clamp(min=1e-12))
    return None
