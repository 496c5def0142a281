"""The Lightning hooks that modules share which train a classifier of images."""

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
    ImageMeta,
    MediaItem,
    PrimaryMetric,
    Progress,
    Split,
    TrainingStep,
    predicted_origin,
)
from lit_modules.classifier.evaluation import ClassifierEvaluation
from lit_modules.classifier.export import export_network
from lit_modules.nn.checks import check_classifier, follow_classes
from lit_modules.nn.features import logits_and_features
from lit_modules.optim import configure
from lit_modules.step_log import log_evaluation


class EvaluatedClassifier(LightningModule):
    """Evaluation, export and checkpoint of a module whose `network` maps images to logits, however it is trained."""

    network: nn.Module
    evaluation: ClassifierEvaluation

    # ---- evaluation ----

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def evaluate(self, batch: ImageBatch, split: Split) -> None:
        """Measure and log a batch of validation or test data."""
        values = self.evaluation.update(split, batch.image, self(batch.image), batch.label)
        log_evaluation(self, values, len(batch))

    def on_validation_epoch_start(self) -> None:
        self.evaluation.start("val")

    def on_validation_epoch_end(self) -> None:
        self.end_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self.evaluation.start("test")

    def on_test_epoch_end(self) -> None:
        self.end_evaluation("test")

    def end_evaluation(self, split: Split) -> None:
        """Log what follows from the split as a whole."""
        self.log_dict(self.evaluation.finish(split), sync_dist=True)

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/accuracy", "max")

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """val, test: see `ClassifierEvaluation.media`."""
        return {} if split == "train" else self.evaluation.media(split, self.network)

    def export(self, directory: Path) -> list[Path]:
        """Write the network for plain PyTorch: see `lit_modules.classifier.export`."""
        return export_network(self.network, self.evaluation.example(), Path(directory), self.evaluation.classes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["classifier"] = self.evaluation.data

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.evaluation.prepare(**checkpoint["classifier"])


class ClassifierHooks(EvaluatedClassifier):
    """An `EvaluatedClassifier` that Lightning trains: its network, optimiser, passes and predictions.

    What is left to a module: its ``__init__``, which calls `_compose`, and its training step.
    """

    allows = Allows()

    def _compose(
        self,
        network: nn.Module,
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        lr_interval: Literal["epoch", "step"],
        channels_last: bool = False,
    ) -> None:
        """Keep the parts; arguments as in `lit_modules.classifier.ImageClassifier`, but a network for its factory."""
        self.network = network
        # A class as default would be a trap: jsonargparse keeps its arguments when a config names another class.
        self.make_optimizer: Callable[..., torch.optim.Optimizer] = optimizer or torch.optim.Adam
        self.make_scheduler = lr_scheduler
        self.lr_interval: Literal["epoch", "step"] = lr_interval
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.evaluation = ClassifierEvaluation()
        self._terms: dict[str, Tensor] = {}

    def _fit_to(self, meta: ImageMeta) -> None:
        """Check the network against the data, make metrics for its classes."""
        follow_classes(self.network, meta.num_classes)
        check_classifier(self.network, meta.shape, meta.num_classes)
        self.evaluation.prepare(meta.shape, meta.classes)

    def trained_parameters(self) -> Any:
        """What the optimiser gets: parameters, or groups of them."""
        return self.network.parameters()

    def configure_optimizers(self) -> Any:
        return configure(self.trained_parameters(), self.make_optimizer, self.make_scheduler, self.lr_interval)

    def compile_networks(self, **options: Any) -> None:
        self.network.compile(**options)

    # ---- steps ----

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] → (N, K) logits."""
        return self.network(self._laid_out(image))

    def _laid_out(self, image: Tensor) -> Tensor:
        return image.contiguous(memory_format=self.memory_format)

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return what rules of selection ask for, too, so that a fitted classifier serves as their selector.

        ``index`` (N,), ``origin`` (N,) where the data knows it, ``label`` as the data has it, ``probabilities`` and
        ``logits`` (N, K), and ``embedding`` (N, D) where the network gives its vectors before the last layer.
        """
        logits, embedding = logits_and_features(self.network, self._laid_out(batch.image))
        outputs = {"index": batch.index, **predicted_origin(self, batch.index), "label": batch.label}
        outputs |= {"probabilities": logits.softmax(1), "logits": logits.float()}
        return outputs if embedding is None else outputs | {"embedding": embedding.float()}

    # ---- what callbacks and commands ask ----

    def progress(self) -> Progress:
        return Progress("step", self.global_step)

    def training_parts(self, shape: tuple[int, ...]) -> TrainingStep:
        return TrainingStep(self.network, shape, self.make_optimizer(self.trained_parameters()))

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        follow_classes(self.network, len(self.evaluation.classes))
