"""Clips seen in several modalities: their batch, their facts, and what a DataModule of emotions offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from leanlight.contracts.batch import Batch
from leanlight.contracts.meta import DataMeta


@dataclass(frozen=True)
class MultimodalBatch(Batch):
    """Features of clips by modality, and the emotion or sentiment of each clip.

    A modality is one vector a clip, or a sequence of vectors: padded with 0 behind its length. Where a clip lacks a
    modality its features are 0 and its length is 0.

    Args:
        features: by modality, (N, D) float, or (N, L, D) for sequences.
        length: by modality that is a sequence, (N,) int64 steps.
        present: by modality, (N,) bool, whether the clip has it.
        label: (N,) int64 class. For scores: the class the score is rounded to.
        score: (N,) float score; None where the data has classes alone.
        unimodal: by modality, (N,) int64, the class that this modality alone shows; empty where nobody knows.
        conflict: (N,) bool, whether modalities show different classes; None where nobody knows.
        index: (N,) int64 position of each clip in its split.
    """

    features: Mapping[str, Tensor]
    length: Mapping[str, Tensor]
    present: Mapping[str, Tensor]
    label: Tensor
    score: Tensor | None
    unimodal: Mapping[str, Tensor]
    conflict: Tensor | None
    index: Tensor


@dataclass(frozen=True)
class Modality:
    """What a network must know of a modality.

    Args:
        width: D, numbers of a feature vector.
        longest: steps of the longest sequence; 0 for one vector a clip.
    """

    width: int
    longest: int = 0


@dataclass(frozen=True, kw_only=True)
class EmotionMeta(DataMeta):
    """Facts of a set of clips.

    Args:
        modalities: by name, in the order in which networks take them; two or more.
        classes: names of the classes, in the order of `label`.
        score_range: least and greatest score; None where there are classes alone.
        class_counts: clips of each class in the training part.
        extractors: sha256 of what made the features, by modality; empty where it is not known.
    """

    modalities: Mapping[str, Modality]
    classes: tuple[str, ...]
    score_range: tuple[float, float] | None
    class_counts: tuple[int, ...]
    extractors: Mapping[str, str]


@runtime_checkable
class EmotionData(Protocol):
    """A DataModule of clips: batches are `MultimodalBatch`."""

    meta: EmotionMeta

    def names(self, split: str) -> tuple[str, ...]:
        """Names of the clips of a part, by their index."""
        ...
