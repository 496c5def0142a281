"""Losses of TiCAL: of its stages, of the label tree, and those of the reading ``soft`` (docs/methods/tical.md).

Targets are (N,) int64 classes, with cross entropy, or (N,) float scores, with the absolute error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import UserError
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat
from lit_modules.tical.anchors import AnchorLists
from lit_modules.tical.assessment import Assessment
from lit_modules.tical.encoders import Answer
from lit_modules.tical.hyperbolic import Geometry
from lit_modules.tical.stages import StagedAnswer
from lit_modules.tical.tree import LabelTree

_STILL = 1e-8  # variance of distances, squared lengths: below, their correlation is rounding
_UNKNOWN = 0.5  # κ of clips that are not assessed: early perception and advanced cognition count alike


def staged_loss(
    answer: Answer,
    target: Tensor,
    assessment: Assessment | None = None,
    class_weight: Tensor | None = None,
    present: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """κ L_EP + L_CI + (1 - κ) Σ_m φ(τ_m) L_m with φ(τ) = exp(-τ); of a network without stages, its one loss.

    Args:
        answer: of N clips. Where it ends after early perception, that has no other stage to share with, and κ is 1.
        target: classes or scores.
        assessment: κ and τ of the clips; None, in the warm-up: κ is ½ and φ is 1.
        class_weight: (C,) weights of the classes; means are over them. None, and for scores: all alike.
        present: by modality, (N,) bool; branches of others are not taught. None: all.
    """
    weight = _weights(target, class_weight)
    if not isinstance(answer, StagedAnswer) or answer.middle is None:
        return _mean(_each(answer.output, target), weight)
    kappa = torch.full_like(weight, _UNKNOWN) if assessment is None else assessment.consistency
    values = kappa * _each(answer.early, target) + _each(answer.middle, target)
    for name, output in answer.advanced.items():
        share = 1 - kappa
        if assessment is not None:
            share = share * (-assessment.typicality[name]).exp()
        if present is not None:
            share = share * present[name]
        values = values + share * _each(output, target)
    return _mean(values, weight)


def _weights(target: Tensor, class_weight: Tensor | None) -> Tensor:
    """(N,) float32 weights of the clips."""
    if class_weight is None or target.is_floating_point():
        return torch.ones_like(target, dtype=torch.float32)
    return class_weight[target]


def _each(output: Tensor, target: Tensor) -> Tensor:
    """(N,) losses of outputs (N, C), or (N, 1) for scores."""
    if target.is_floating_point():
        return (output[:, 0] - target).abs().float()
    return F.cross_entropy(output.float(), target, reduction="none")


def _mean(values: Tensor, weight: Tensor) -> Tensor:
    return (weight * values).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).eps)


def hyp_cpcc(points: Tensor, label: Tensor, tree: LabelTree, geometry: Geometry) -> Tensor:
    """1 - ρ of tree distances and distances of the batch's means, over pairs of nodes, inner ones and the root too.

    HypCPCC of HypStructure (Zhang et al. 2024, arXiv 2412.01023). A node's mean is that of all points whose class lies
    at or below it; nodes without points are left out. Where one of the two does not vary ρ is not defined: then the
    loss is 1, without gradient.

    Args:
        points: (N, d) points of the geometry.
        label: (N,) int64 classes; clips with -1 are left out.
        tree: K nodes.
        geometry: of the points.
    """
    inside = tree.members[:, label.clamp(min=0)] & (label >= 0)
    mean = geometry.mean(points, inside.to(points.dtype))
    distance, some = geometry.distance(mean[:, None], mean), inside.any(1)
    above = torch.ones_like(distance, dtype=torch.bool).triu(1)
    return 1 - _correlation(distance, tree.distances.to(distance), some & some[:, None] & above)


def _correlation(one: Tensor, other: Tensor, counted: Tensor) -> Tensor:
    """Pearson's ρ over the counted entries; 0, with a gradient of 0, where one side does not vary."""
    count = counted.sum().clamp(min=1)
    one, other = ((side - (side * counted).sum() / count) * counted for side in (one, other))
    variances = torch.stack([one.square().sum(), other.square().sum()]) / count
    varies = (variances > _STILL).all()
    # The root is taken of 1 where nothing varies: its gradient at 0 is infinite, and stays so when multiplied by 0.
    spread = torch.where(varies, variances.prod(), 1).sqrt()
    return torch.where(varies, (one * other).sum() / count / spread, 0)


@dataclass(frozen=True)
class SoftLoss:
    """Losses of the reading ``soft``; with every factor 0 that of the plain network.

    The task's loss, each clip by 1 + γ(1 - κ); λ_u Σ_m L(U_m, ỹ_m) of the unimodal heads; and
    λ_h Σ_m L(softmax(-D_m / τ_h), ỹ_m) of the mean distances D_m from all anchors of each class. Their target
    ỹ_m = (1 - τ_m) y + τ_m q_m trusts the pseudo label as far as it is typical.

    Args:
        gamma: γ, at least -1; above 0 inconsistent clips weigh more, below 0 less.
        unimodal: λ_u, at least 0.
        hyperbolic: λ_h, at least 0.
        temperature: τ_h, positive.
    """

    gamma: NonNegativeFloat = 1.0
    unimodal: NonNegativeFloat = 0.3
    hyperbolic: NonNegativeFloat = 0.1
    temperature: PositiveFloat = 0.5

    def __post_init__(self) -> None:
        for name, least in (("gamma", -1), ("unimodal", 0), ("hyperbolic", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"soft.{name}: expected a number of at least {least}, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise UserError(f"soft.temperature: expected a positive number, got {self.temperature}")

    def terms(
        self,
        answer: Answer,
        target: Tensor,
        label: Tensor,
        assessment: Assessment | None = None,
        points: Mapping[str, Tensor] | None = None,
        lists: AnchorLists | None = None,
        geometry: Geometry | None = None,
        class_weight: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
        levels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """``task``, ``unimodal`` and ``hyperbolic``, their factors in them; those that are off are left out.

        Args:
            answer: of N clips, with unimodal outputs where λ_u is not 0.
            target: classes or scores.
            label: (N,) int64 classes, also of scores.
            assessment: of the clips; None, in the warm-up: plain labels, and no hyperbolic term.
            points: by modality, (N, d) with gradient; needed with an assessment.
            lists: the anchors; likewise.
            geometry: of the points; likewise.
            class_weight: (C,) weights of the classes, in the task's loss.
            present: by modality, (N,) bool; others are left out. None: all.
            levels: (C,) scores that the classes stand for; needed with an assessment for scores.
        """
        weight = _weights(target, class_weight)
        values = _each(answer.output, target)
        if assessment is not None:
            values = (1 + self.gamma * (1 - assessment.consistency)) * values
        terms = {"task": _mean(values, weight)}
        there = {name: torch.ones_like(weight) for name in answer.unimodal} if present is None else present
        if self.unimodal > 0 and answer.unimodal:
            losses = [
                _mean(_toward(output, target, assessment, name, levels), there[name].float())
                for name, output in answer.unimodal.items()
            ]
            terms["unimodal"] = self.unimodal * torch.stack(losses).sum()
        if self.hyperbolic > 0 and assessment is not None and points is not None and lists and geometry:
            terms["hyperbolic"] = self.hyperbolic * self._hyperbolic(points, label, assessment, lists, geometry)
        return terms

    def _hyperbolic(
        self,
        points: Mapping[str, Tensor],
        label: Tensor,
        assessment: Assessment,
        lists: AnchorLists,
        geometry: Geometry,
    ) -> Tensor:
        usable, losses = lists.usable(), []
        for m, name in enumerate(lists.modalities):
            member = F.one_hot(lists.label[m].clamp(min=0), lists.num_classes) * usable[m, :, None]
            count = member.sum(0)
            table = geometry.pairwise(points[name], lists.points[m])
            with torch.autocast(table.device.type, enabled=False):
                mean = (table @ member.to(table.dtype)) / count.clamp(min=1)
            log = (-mean / self.temperature).masked_fill(count == 0, -torch.inf).log_softmax(1)
            target = _softened(label, assessment, name) * (count > 0)
            known = assessment.pseudo[name] >= 0
            loss = -(target * torch.where(target > 0, log, 0)).sum(1)
            losses.append(_mean(torch.where(known, loss, 0), known.float()))
        return torch.stack(losses).sum()


def _softened(label: Tensor, assessment: Assessment, name: str) -> Tensor:
    """ỹ_m (N, C) of labels (N,)."""
    probabilities, trust = assessment.probabilities[name], assessment.typicality[name][:, None]
    return (1 - trust) * F.one_hot(label, probabilities.shape[1]) + trust * probabilities


def _toward(output: Tensor, target: Tensor, assessment: Assessment | None, name: str, levels: Tensor | None) -> Tensor:
    """(N,) losses of a unimodal output against ỹ_m."""
    if assessment is None:
        return _each(output, target)
    if not target.is_floating_point():
        return -(_softened(target, assessment, name) * output.float().log_softmax(1)).sum(1)
    if levels is None:
        raise UserError("levels: expected the scores of the classes, got none")
    trust, pseudo = assessment.typicality[name], (assessment.probabilities[name] * levels).sum(1)
    return _each(output, (1 - trust) * target + trust * pseudo)
