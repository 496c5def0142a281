"""Pictures of distillation without data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from leanlight.contracts import Bars, ImageGrid, MediaItem
from lit_modules.classifier.evaluation import class_accuracy
from lit_modules.classifier.pictures import drawable
from lit_modules.history import History

SHOWN = 40  # images in a grid


def of_student(history: History, terms: Iterable[str]) -> dict[str, MediaItem]:
    """Agreement with the teacher, and the terms of the loss, over epochs.

    Args:
        history: ``epoch``, ``val_agreement``, of training ``agreement`` and terms, of the pool's images the terms of
            their inversion (``pool_…``), each where it is measured.
        terms: names of the terms.
    """
    lines = {"held-out images": "val_agreement", "training images": "agreement", "rotation head": "head_accuracy"}
    made = {"loss": "pool_loss", "class prior": "pool_class_prior", "batch norm": "pool_batch_norm"}
    curves = {
        "agreement": history.curve("epoch", lines, "epoch", "share of answers"),
        "inversion": history.curve("epoch", made, "epoch", "loss of the images made"),
        "losses": history.curve("epoch", {name: name for name in (*terms, "head_loss")}, "epoch", "loss"),
    }
    return {name: curve for name, curve in curves.items() if curve is not None}


def agreement(confusion: Tensor, classes: Sequence[str]) -> dict[str, MediaItem]:
    """Share of the teacher's answers that the student gives, too, by class.

    Args:
        confusion: (K, K) counts, the teacher's answers in rows.
        classes: names of the K classes.
    """
    values = zip(classes, class_accuracy(confusion).tolist(), strict=True)
    return {"class_agreement": Bars({name: value for name, value in values if value == value}, "agreement")}


def pool(images: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, MediaItem]:
    """Images that were made, under the class that each was made for.

    Args:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
        classes: names of the K classes.
    """
    return {"pool": ImageGrid(drawable(images / 255), captions=[classes[label] for label in labels.tolist()])}
