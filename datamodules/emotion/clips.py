"""All clips of a set as arrays, and what must hold for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from leanlight.contracts import UserError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Clips:
    """N clips of all parts together.

    Args:
        names: of the clips, each once.
        features: by modality, (N, D) or, for sequences, (N, L, D) float32.
        source: where they come from, in words.
        length: by modality that is a sequence, (N,) int64 steps.
        present: by modality, (N,) bool, whether a clip has it; a modality that is not there: all have it.
        label: (N,) int64; None without classes.
        score: (N,) float64; None without scores. Both are None where nobody knows what the clips show.
        classes: names of the classes.
        unimodal: by modality, (N,) what this modality alone shows: int64 classes, or float64 scores where there are
            scores.
        conflict: (N,) bool; None where nobody knows.
        splits: by scheme, (N,) the part of each clip: ``train``, ``val``, ``test``, or an empty string for none.
        speaker: (N,) strings; None where nobody knows.
        extractors: sha256 of what made the features, by modality.
        refused: by scheme and modality, why these must not be used together.
    """

    names: tuple[str, ...]
    features: Mapping[str, Array]
    source: str
    length: Mapping[str, Array] = field(default_factory=dict)
    present: Mapping[str, Array] = field(default_factory=dict)
    label: Array | None = None
    score: Array | None = None
    classes: tuple[str, ...] = ()
    unimodal: Mapping[str, Array] = field(default_factory=dict)
    conflict: Array | None = None
    splits: Mapping[str, Array] = field(default_factory=dict)
    speaker: Array | None = None
    extractors: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Array) -> Clips:
        """The clips at these positions."""

        def each(arrays: Mapping[str, Array]) -> dict[str, Array]:
            return {name: array[rows] for name, array in arrays.items()}

        def one(array: Array | None) -> Array | None:
            return None if array is None else array[rows]

        return replace(
            self,
            names=tuple(self.names[row] for row in rows.tolist()),
            features=each(self.features),
            length=each(self.length),
            present=each(self.present),
            unimodal=each(self.unimodal),
            splits=each(self.splits),
            label=one(self.label),
            score=one(self.score),
            conflict=one(self.conflict),
            speaker=one(self.speaker),
        )

    def only(self, modalities: Sequence[str]) -> Clips:
        """With these modalities, in this order."""

        def each(arrays: Mapping[str, Any]) -> dict[str, Any]:
            return {name: arrays[name] for name in modalities if name in arrays}

        return replace(
            self,
            features=each(self.features),
            length=each(self.length),
            present=each(self.present),
            unimodal=each(self.unimodal),
            extractors=each(self.extractors),
        )


def checked(clips: Clips, clean: bool) -> Clips:
    """Clips whose numbers can be used: finite, padded with 0, each with a modality.

    Minus infinity, which some extractors write for silence, becomes 0. A clip without steps in a modality lacks it.

    Args:
        clips: as they were read.
        clean: set NaN and infinity to 0 and leave clips without any modality out, instead of an error with the first.
    """
    _same_lengths(clips)
    features, length, present = {}, {}, {}
    for name, read in clips.features.items():
        has = clips.present.get(name, np.ones(len(clips), bool)).astype(bool)
        if read.ndim == 3:
            steps = clips.length.get(name)
            length[name] = _padding(read) if steps is None else _within(clips, name, steps.astype(np.int64))
            has &= length[name] > 0
            length[name] = np.where(has, length[name], 0)
        array = _finite(clips, name, _own(read), clean, has, length.get(name))
        features[name], present[name] = array, has
    clips = replace(clips, features=features, length=length, present=present)
    empty = ~np.any(list(present.values()), axis=0)
    if empty.any() and not clean:
        raise UserError(
            f"features: clip {_first(clips, empty)} has no step in any of {', '.join(features)}; clean: true leaves "
            "such clips out"
        )
    return clips.take(np.flatnonzero(~empty)) if empty.any() else clips


def _own(array: Array) -> Array:
    """float32 that may be written to."""
    array = np.ascontiguousarray(array, np.float32)
    return array if array.flags.writeable else array.copy()


def _first(clips: Clips, mask: Array) -> str:
    return repr(clips.names[int(np.flatnonzero(mask)[0])])


def _same_lengths(clips: Clips) -> None:
    """UserError where an array has not one row a clip, or a name comes twice."""
    if len(set(clips.names)) < len(clips.names):
        seen: set[str] = set()
        twice = next(name for name in clips.names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise UserError(f"id: expected every clip once in {clips.source}, got {twice!r} twice")
    arrays = {name: getattr(clips, name) for name in ("label", "score", "conflict", "speaker")}
    for kind in ("features", "length", "present", "unimodal", "splits"):
        arrays |= {f"{kind} of {name}": array for name, array in getattr(clips, kind).items()}
    for name, array in arrays.items():
        if array is not None and len(array) != len(clips.names):
            raise UserError(
                f"{name}: expected a row a clip, {len(clips.names):,} in {clips.source}, got {len(array):,}"
            )
    for name, array in clips.features.items():
        if array.ndim not in (2, 3) or not array.shape[-1]:
            raise UserError(f"features of {name}: expected (N, D) or (N, L, D), got {array.shape} in {clips.source}")


def _padding(array: Array) -> Array:
    """Steps up to the last one that is not all 0."""
    used = (array != 0).any(axis=2)
    return np.where(used.any(axis=1), array.shape[1] - used[:, ::-1].argmax(axis=1), 0).astype(np.int64)


def _within(clips: Clips, name: str, steps: Array) -> Array:
    most = clips.features[name].shape[1]
    if (beyond := (steps < 0) | (steps > most)).any():
        raise UserError(
            f"length of {name}: expected 0 to {most}, the steps of its features, got "
            f"{int(steps[beyond][0])} of clip {_first(clips, beyond)}"
        )
    return steps


def _finite(clips: Clips, name: str, array: Array, clean: bool, has: Array, length: Array | None) -> Array:
    """`array` with 0 for minus infinity, behind the length and where a clip lacks the modality; it is written to."""
    array[~has] = 0
    if length is not None:
        array[np.arange(array.shape[1]) >= length[:, None]] = 0
    array[array == -np.inf] = 0
    # The sum of a row is finite where all are, but for sums that overflow; so no mask as large as the features is made.
    with np.errstate(over="ignore", invalid="ignore"):
        odd = ~np.isfinite(array.sum(axis=tuple(range(1, array.ndim)), dtype=np.float64))
    if odd.any() and not clean:
        raise UserError(
            f"features: expected numbers, got NaN or infinity in {name} of clip {_first(clips, odd)}"
            f"{f' and {int(odd.sum()) - 1:,} more' if odd.sum() > 1 else ''}; clean: true sets them to 0"
        )
    if odd.any():
        array[odd] = np.nan_to_num(array[odd], nan=0.0, posinf=0.0, neginf=0.0)
    return array


def graded(
    clips: Clips, score_range: tuple[float, float], levels: Sequence[float] = (), names: Sequence[str] = ()
) -> Clips:
    """Scores as classes too; clips that have no scores as they are.

    Args:
        clips: with scores.
        score_range: least and greatest score.
        levels: where a class ends, inclusive, and the next begins; none: scores are rounded to whole numbers, halves
            to even ones as in the published metrics.
        names: of the classes that `levels` make.
    """
    if clips.score is None:
        return clips
    low, high = score_range
    bad = ~((clips.score >= low) & (clips.score <= high))
    if bad.any():
        raise UserError(
            f"score_range: expected scores from {low:g} to {high:g}, got {clips.score[bad][0]:g} of clip "
            f"{_first(clips, bad)}; give the range of {clips.source}"
        )
    if levels:
        bounds = [low, *levels, high]
        classes = tuple(names) or tuple(f"{a:g} to {b:g}" for a, b in pairwise(bounds))
    else:
        whole = range(round(low), round(high) + 1)
        classes = tuple(map(str, whole))

    def label(score: Array) -> Array:
        if levels:
            return np.digitize(score, np.asarray(levels), right=True).astype(np.int64)
        return np.rint(np.clip(score, low, high)).astype(np.int64) - round(low)

    unimodal = {name: label(score) for name, score in clips.unimodal.items()}
    return replace(clips, label=label(clips.score), classes=classes, unimodal=unimodal)


def with_conflicts(clips: Clips) -> Clips:
    """With `conflict` where it follows from what the modalities show: two of them, of those a clip has, differ."""
    if clips.conflict is not None or len(clips.unimodal) < 2:
        return clips
    shown = np.stack([np.where(clips.present[name], clips.unimodal[name], -1) for name in clips.unimodal])
    most = shown.max(axis=0)
    return replace(clips, conflict=((shown != most) & (shown >= 0)).any(axis=0))
