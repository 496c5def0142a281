"""Pictures of distillation without data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from leanlight.contracts import Bars, MediaItem
from lit_modules.classifier.evaluation import class_accuracy
from lit_modules.history import History


def of_student(history: History, terms: Iterable[str]) -> dict[str, MediaItem]:
    """Agreement with the teacher, and the terms of the loss, over epochs.

    Args:
        history: ``epoch``, ``val_agreement``, and of training ``agreement`` and terms, each where it is measured.
        terms: names of the terms.
    """
    lines = {"held-out images": "val_agreement", "training images": "agreement", "rotation head": "head_accuracy"}
    curves = {
        "agreement": history.curve("epoch", lines, "epoch", "share of answers"),
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
