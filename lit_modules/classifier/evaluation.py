"""How good a classifier is on held-out images, for every module that trains one; without Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassConfusionMatrix

from leanlight.contracts import MediaItem, Split, UserError
from lit_modules.classifier import pictures
from lit_modules.classifier.losses import class_index

_CALIBRATION_BINS = 15
_MISTAKES = 40


class ClassifierEvaluation(nn.Module):
    """Metrics, confusion and confident mistakes of a classifier, by split (``val``, ``test``).

    A LightningModule keeps one as a submodule, so that it moves to the module's device and Lightning finds the metric
    objects: `prepare` in ``setup``, then in every epoch `start`, `update` a batch, `finish`, of which the last two
    return what is to be logged. It has no parameters and leaves nothing in a state dict; `data` is for checkpoints.
    """

    def __init__(self) -> None:
        super().__init__()
        self.input_shape: tuple[int, ...] = ()
        self.classes: tuple[str, ...] = ()
        self.metrics = nn.ModuleDict()
        self.confusion: dict[str, Tensor] = {}
        self.mistakes: dict[str, ConfidentMistakes] = {}

    def prepare(self, input_shape: Sequence[int], classes: Sequence[str]) -> None:
        """Make the metrics. input_shape: (C, H, W) of an image. classes: label names; index = label."""
        self.input_shape, self.classes = tuple(input_shape), tuple(classes)
        for split in ("val", "test"):
            if split not in self.metrics:
                self.metrics[split] = _metrics(split, len(classes))

    @property
    def data(self) -> dict[str, list[int] | list[str]]:
        """The arguments of `prepare` in plain lists, for a checkpoint."""
        return {"input_shape": list(self.input_shape), "classes": list(self.classes)}

    def example(self) -> Tensor:
        """Two blank images, on the CPU; UserError before `prepare`."""
        if not self.input_shape:
            raise UserError(
                "the classifier does not know its image shape yet; expected a fitted module or its checkpoint"
            )
        return torch.zeros(2, *self.input_shape)

    def start(self, split: Split) -> None:
        """Forget the split's last epoch."""
        self.mistakes[split] = ConfidentMistakes()
        self._of(split)["confusion"].reset()

    def update(self, split: Split, image: Tensor, logits: Tensor, label: Tensor) -> Mapping[str, Tensor | Metric]:
        """Take in a batch; return its loss and the metric objects by name, to be logged over the epoch.

        Args:
            split: ``val`` or ``test``.
            image: (N, C, H, W) in [0, 1].
            logits: (N, K).
            label: (N,) int64, or (N, K) soft.
        """
        target, metrics = class_index(label), self._of(split)
        for metric in metrics.values():
            metric.update(logits, target)
        self.mistakes[split].update(image, logits, target)
        logged = {f"{split}/{name}": metric for name, metric in metrics.items() if name != "confusion"}
        return {f"{split}/loss": F.cross_entropy(logits, label), **logged}

    def finish(self, split: Split) -> Mapping[str, float]:
        """End the split's epoch; return what can be logged only now.

        Every process must call it, since it gathers; `media` may then run on one process alone.
        """
        self.confusion[split] = self._of(split)["confusion"].compute().float().cpu()
        if split != "test":
            return {}
        return {"test/accuracy_worst_class": float(class_accuracy(self.confusion[split]).nan_to_num(1.0).min())}

    def media(self, split: Split, network: nn.Module) -> dict[str, MediaItem]:
        """Confusion, accuracy by class, confident mistakes and the first filters of `network`.

        On several processes the mistakes are those of this one's share.
        """
        items: dict[str, MediaItem] = {}
        if (matrix := self.confusion.get(split)) is not None:
            items |= pictures.confusion(matrix, class_accuracy(matrix), self.classes)
        if (mistakes := self.mistakes.get(split)) is not None and mistakes.kept:
            items["mistakes"] = pictures.mistakes(mistakes.kept, self.classes)
        return items | pictures.first_filters(network)

    def _of(self, split: Split) -> dict[str, Metric]:
        return dict(cast(nn.ModuleDict, self.metrics[split]).items())  # type: ignore[arg-type]


class ConfidentMistakes:
    """The wrong answers given with most confidence so far; what is kept stays on the device."""

    def __init__(self) -> None:
        #: Confidence (M,), -1 of right answers; image (M, C, H, W); predicted and true class (M,). Empty at first.
        self.kept: tuple[Tensor, ...] = ()

    def update(self, image: Tensor, logits: Tensor, label: Tensor) -> None:
        """Merge a batch: image (N, C, H, W), logits (N, K), label (N,) int64."""
        confidence, predicted = logits.float().softmax(1).max(1)
        # Right answers sink to the bottom instead of being filtered out: their number is unknown without a wait for
        # the device.
        confidence = torch.where(predicted == label, -1.0, confidence)
        new = (confidence, image, predicted, label)
        merged = tuple(torch.cat(pair) for pair in zip(self.kept, new, strict=True)) if self.kept else new
        best = merged[0].topk(min(_MISTAKES, len(merged[0]))).indices
        self.kept = tuple(part[best] for part in merged)


def class_accuracy(confusion: Tensor) -> Tensor:
    """Share of each true class (rows) that is labelled right; nan for a class without items."""
    return confusion.diagonal() / confusion.sum(1)


def _metrics(split: str, classes: int) -> nn.ModuleDict:
    """Metrics by logged name; `confusion` is kept for pictures."""
    metrics: dict[str, nn.Module] = {
        "accuracy": MulticlassAccuracy(classes, average="micro"),
        "confusion": MulticlassConfusionMatrix(classes),
    }
    if split == "test":
        metrics["calibration_error"] = MulticlassCalibrationError(classes, n_bins=_CALIBRATION_BINS)
        if classes >= 10:
            metrics["top5_accuracy"] = MulticlassAccuracy(classes, top_k=5, average="micro")
    return nn.ModuleDict(metrics)
