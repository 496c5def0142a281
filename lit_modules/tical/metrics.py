"""How well emotions and sentiments are recognised, and what consistency κ tells of that.

Classes and signs are counted in whole numbers, whose sums over processes are exact. ``accuracy`` is what the field
calls WAR, the weighted average recall.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, Metric, MetricCollection, PearsonCorrCoef
from torchmetrics.utilities import dim_zero_cat

from leanlight.contracts import UserError

Scale = Literal["negative_nonnegative", "negative_positive", "five", "seven"]

_CLASSES = {"negative_nonnegative": 2, "negative_positive": 2, "five": 5, "seven": 7}


class _OfConfusion(Metric):
    """A figure of how often each class (row) is taken for each (column); NaN without clips."""

    full_state_update = False
    higher_is_better = True
    confusion: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def _count(self, predicted: Tensor, true: Tensor, counted: Tensor) -> None:
        self.confusion.view(-1).index_add_(0, true * len(self.confusion) + predicted, counted.long())


class _OfClasses(_OfConfusion):
    def update(self, predicted: Tensor, label: Tensor) -> None:
        """Take in classes (N,) int64."""
        self._count(predicted, label, torch.ones_like(label))


class WAR(_OfClasses):
    """Share of clips whose class is right: weighted average recall, accuracy.

    Args:
        num_classes: C.
    """

    def compute(self) -> Tensor:
        return _accuracy(self.confusion)


class UAR(_OfClasses):
    """Unweighted average recall: mean over the classes that occur of the share that is found.

    Args:
        num_classes: C.
    """

    def compute(self) -> Tensor:
        clips = self.confusion.sum(1)
        return (self.confusion.diagonal() / clips.clamp(min=1)).sum() / (clips > 0).sum()


class WeightedF1(_OfClasses):
    """F1 of each class, its mean weighted by how often the class occurs.

    Args:
        num_classes: C.
    """

    def compute(self) -> Tensor:
        return _weighted_f1(self.confusion)


class _OfSentiment(_OfConfusion):
    """A figure of classes that scores, negative to positive, are read as.

    Args:
        scale: ``negative_nonnegative``: below 0, or not; all clips. ``negative_positive``: above 0, or not; clips
            whose true score is not 0. ``five``, ``seven``: the nearest level from -2 to 2, from -3 to 3 (halves go to
            the even one).
    """

    def __init__(self, scale: Scale) -> None:
        if scale not in get_args(Scale):
            raise UserError(f"scale: expected one of {', '.join(get_args(Scale))}, got {scale!r}")
        super().__init__(_CLASSES[scale])
        self.scale = scale

    def update(self, score: Tensor, true_score: Tensor) -> None:
        """Take in predicted and true scores (N,)."""
        counted = true_score != 0 if self.scale == "negative_positive" else torch.ones_like(true_score)
        self._count(self._read(score), self._read(true_score), counted)

    def _read(self, score: Tensor) -> Tensor:
        if self.scale == "negative_nonnegative":
            return (score >= 0).long()
        if self.scale == "negative_positive":
            return (score > 0).long()
        half = _CLASSES[self.scale] // 2
        return score.float().clamp(-half, half).round().long() + half


class SentimentAccuracy(_OfSentiment):
    """ACC-2, in one of its two conventions, ACC-5 or ACC-7."""

    def compute(self) -> Tensor:
        return _accuracy(self.confusion)


class SentimentF1(_OfSentiment):
    """F1 of the levels, weighted by how often they occur."""

    def compute(self) -> Tensor:
        return _weighted_f1(self.confusion)


class ScoreError(MeanAbsoluteError):
    """MAE of scores."""

    def update(self, score: Tensor, true_score: Tensor) -> None:
        """Take in predicted and true scores (N,)."""
        super().update(score.float(), true_score.float())


class ScoreCorrelation(PearsonCorrCoef):
    """Corr, Pearson's correlation of scores."""

    def update(self, score: Tensor, true_score: Tensor) -> None:
        """Take in predicted and true scores (N,)."""
        super().update(score.float(), true_score.float())


class _OfConsistency(Metric):
    """A figure of κ and of something that is true of a clip or not. It keeps both for every clip."""

    full_state_update = False
    consistency: list[Tensor]
    flag: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("consistency", [], dist_reduce_fx="cat")
        self.add_state("flag", [], dist_reduce_fx="cat")

    def _keep(self, consistency: Tensor | None, flag: Tensor) -> None:
        if consistency is not None:
            self.consistency.append(consistency.detach().float())
            self.flag.append(flag)

    def _kept(self) -> tuple[Tensor, Tensor]:
        if len(self.consistency) == 0:
            return torch.zeros(0, device=self.device), torch.zeros(0, dtype=torch.bool, device=self.device)
        return dim_zero_cat(self.consistency), dim_zero_cat(self.flag)


class AccuracyByTercile(_OfConsistency):
    """Accuracy on the least consistent third of the clips, on the middle one and on the most consistent.

    Clips of equal κ fall into the same third, so that no order of clips matters; a third that is empty has NaN.
    """

    higher_is_better = True

    def update(self, predicted: Tensor, label: Tensor, consistency: Tensor | None) -> None:
        """Take in classes (N,) int64 and κ (N,); clips without κ are not counted."""
        self._keep(consistency, predicted == label)

    def compute(self) -> dict[str, Tensor]:
        """``accuracy_consistency_low``, ``_middle`` and ``_high``."""
        consistency, right = self._kept()
        cuts = (
            consistency.sort().values[[len(consistency) // 3, 2 * len(consistency) // 3]] if len(right) else consistency
        )
        third = (consistency[:, None] >= cuts).sum(1)
        names = ("low", "middle", "high")
        return {f"accuracy_consistency_{name}": right[third == k].float().mean() for k, name in enumerate(names)}


class ConflictAUROC(_OfConsistency):
    """Area under the ROC curve of 1 - κ for conflicts: how often a conflicted clip has a smaller κ than another.

    Equal ones count half. NaN unless there are clips of both kinds.
    """

    higher_is_better = True

    def update(self, consistency: Tensor | None, conflict: Tensor | None) -> None:
        """Take in κ (N,) and whether modalities conflict (N,) bool; clips without either are not counted."""
        if conflict is not None:
            self._keep(consistency, conflict)

    def compute(self) -> Tensor:
        consistency, conflict = self._kept()
        values, place = consistency.unique(return_inverse=True)
        conflicted, agreeing = (
            torch.zeros(len(values), dtype=torch.float64, device=values.device).index_add_(0, place, each.double())
            for each in (conflict, ~conflict)
        )
        above = agreeing.flip(0).cumsum(0).flip(0) - agreeing / 2
        return ((conflicted * above).sum() / (conflicted.sum() * agreeing.sum())).float()


class EmotionMetrics(MetricCollection):
    """All metrics of clips by name; those of scores where there are any, those of κ where it is known."""

    def update(  # type: ignore[override]
        self,
        predicted: Tensor,
        label: Tensor,
        score: Tensor | None = None,
        true_score: Tensor | None = None,
        consistency: Tensor | None = None,
        conflict: Tensor | None = None,
    ) -> None:
        """Take in a batch.

        Args:
            predicted: (N,) int64 class.
            label: (N,) int64 class.
            score: (N,) predicted score; needed where the data has scores.
            true_score: (N,) score; likewise.
            consistency: κ (N,); None where clips are not assessed.
            conflict: (N,) bool; None where nobody knows.
        """
        values = {"predicted": predicted, "label": label, "score": score, "true_score": true_score}
        super().update(**values, consistency=consistency, conflict=conflict)

    def compute(self) -> dict[str, Any]:
        """By name; without figures of κ that no clip gives."""
        found = super().compute()
        of_kappa = [name for name in found if name == "conflict_auroc" or name.startswith("accuracy_consistency_")]
        return {name: value for name, value in found.items() if name not in of_kappa or not value.isnan()}


def emotion_metrics(num_classes: int, score_range: tuple[float, float] | None = None) -> EmotionMetrics:
    """``accuracy``, ``uar``, ``weighted_f1``, ``accuracy_consistency_low`` …, ``conflict_auroc``.

    With scores on both sides of 0 also ``acc2_negative_nonnegative``, ``acc2_negative_positive`` and the same with
    ``f1_``; ``acc5`` and ``acc7`` where they reach from -3 to 3; ``mae`` and ``corr`` of all scores.

    Args:
        num_classes: C.
        score_range: least and greatest score; None where there are classes alone.
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "accuracy": WAR(num_classes),
        "uar": UAR(num_classes),
        "weighted_f1": WeightedF1(num_classes),
        "terciles": AccuracyByTercile(),
        "conflict_auroc": ConflictAUROC(),
    }
    groups = [["accuracy", "uar", "weighted_f1"], ["terciles"], ["conflict_auroc"]]
    if score_range is not None:
        metrics |= {"mae": ScoreError(), "corr": ScoreCorrelation()}
        groups += [["mae"], ["corr"]]
        if score_range[0] < 0 < score_range[1]:
            for scale in ("negative_nonnegative", "negative_positive"):
                pair = {f"acc2_{scale}": SentimentAccuracy(scale), f"f1_{scale}": SentimentF1(scale)}
                metrics |= pair
                groups.append([*pair])
        if tuple(score_range) == (-3, 3):
            metrics |= {"acc5": SentimentAccuracy("five"), "acc7": SentimentAccuracy("seven")}
            groups += [["acc5"], ["acc7"]]
    return EmotionMetrics(metrics, compute_groups=groups)


def _accuracy(confusion: Tensor) -> Tensor:
    return confusion.diagonal().sum() / confusion.sum()


def _weighted_f1(confusion: Tensor) -> Tensor:
    clips, right = confusion.sum(1), confusion.diagonal()
    f1 = 2 * right / (clips + confusion.sum(0)).clamp(min=1)
    return (clips * f1).sum() / clips.sum()
