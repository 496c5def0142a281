"""Pictures of distillation without data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from leanlight.contracts import Bars, Histogram, ImageGrid, MediaItem
from lit_modules.classifier.evaluation import class_accuracy
from lit_modules.classifier.pictures import drawable
from lit_modules.dda.bank import ImagePool
from lit_modules.history import History

SHOWN = 40  # images in a grid
SOURCES = 10  # images that are shown with their variations
_COLUMNS, _ROWS = 10, 20  # of a grid by class, at most


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
        "losses": history.curve(
            "epoch", {name.replace("_", " "): name for name in (*terms, "head_loss")}, "epoch", "loss"
        ),
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


def of_bank(bank: ImagePool, classes: Sequence[str], history: History) -> dict[str, MediaItem]:
    """Images by class, how far each layer's statistics are met, and the terms of the loss over images.

    Args:
        bank: its images.
        classes: names of the K classes.
        history: ``images``, ``bn_layers`` of the newest call, and terms, ``first_…`` before a call's first step.
    """
    terms = [name.removeprefix("first_") for name in history.values if name.startswith("first_")]
    lines = {name: name for name in terms} | {f"{name} at first": f"first_{name}" for name in terms}
    curves = {
        "losses": history.curve("images", lines, "images", "loss"),
        "teacher_accuracy": history.curve(
            "images", {"after rounding to 8 bits": "teacher_accuracy"}, "images", "share taken for their class"
        ),
    }
    drawn: dict[str, MediaItem] = {name: curve for name, curve in curves.items() if curve is not None}
    if layers := (history["bn_layers"] or [[]])[-1]:
        values = {f"layer {number}": value for number, value in enumerate(layers, 1)}
        drawn["batch_norm_layers"] = Bars(values, "distance of mean and variance to the teacher's")
    return drawn | {"bank": _by_class(bank, classes)}


def _by_class(bank: ImagePool, classes: Sequence[str]) -> ImageGrid:
    """The first images of each class, a row a class; white where there are fewer."""
    shown = classes[:_ROWS]
    tiles, captions = torch.ones(len(shown), _COLUMNS, *bank.shape), []
    for label, name in enumerate(shown):
        found = torch.from_numpy(np.flatnonzero(bank.labels[: len(bank)] == label)[:_COLUMNS])
        tiles[label, : len(found)] = bank.read(found)[0].float() / 255
        captions += [name] + [""] * (_COLUMNS - 1)
    return ImageGrid(drawable(tiles.flatten(0, 1)), _COLUMNS, captions)


def variations(source: Tensor, varied: Tensor, score: Tensor, kept: Tensor) -> ImageGrid:
    """A row a source: the image, then its variations with their scores.

    Args:
        source: (N, C, H, W) uint8.
        varied: (N, K, C, H, W) uint8.
        score: (N, K).
        kept: (N, K) bool.
    """
    tiles = torch.cat([source[:, None], varied], 1)
    captions = [
        caption
        for scores, keeps in zip(score.tolist(), kept.tolist(), strict=True)
        for caption in ("source", *(_verdict(*pair) for pair in zip(scores, keeps, strict=True)))
    ]
    return ImageGrid(drawable(tiles.flatten(0, 1) / 255), tiles.shape[1], captions)


def _verdict(score: float, kept: bool) -> str:
    return f"{score:.2f}" if kept else f"{score:.2f} out"


def scores(score: Tensor, kept: Tensor) -> Histogram:
    """Scores of what the filter kept and dropped; score: of any shape, kept: bool of that shape."""
    return Histogram({"kept": score[kept], "dropped": score[~kept]}, "cosine with the source")


def label_agreement(agrees: Tensor, kept: Tensor) -> Bars:
    """Share of variations to which the teacher gives their source's class, before and after the filter; bool alike."""
    groups = {"all": agrees.flatten(), "kept": agrees[kept], "dropped": agrees[~kept]}
    values = {name: float(group.double().mean()) for name, group in groups.items() if len(group)}
    return Bars(values, "share that keeps its class")
