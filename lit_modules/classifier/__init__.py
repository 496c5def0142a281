"""The image classifier that every method shares: a baseline, a teacher, and the judge of distilled or selected data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_modules.classifier.losses import class_index, distillation_loss
    from lit_modules.classifier.module import ImageClassifier
    from lit_modules.classifier.training import Recipe, accuracy, train, train_and_score

_HOME = {
    "ImageClassifier": "module",
    "Recipe": "training",
    "accuracy": "training",
    "class_index": "losses",
    "distillation_loss": "losses",
    "train": "training",
    "train_and_score": "training",
}

__all__ = [
    "ImageClassifier",
    "Recipe",
    "accuracy",
    "class_index",
    "distillation_loss",
    "train",
    "train_and_score",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
