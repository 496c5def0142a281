"""What each modality of a clip says by itself, how typical that is, and whether the modalities are at one.

The pseudo label y*_m of modality m is the class of its nearest anchor, its typicality τ_m in [0, 1] says how near that
is, and the consistency κ in [0, 1] follows from both. Nothing here has a gradient: a model must not lower its loss by
finding clips consistent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import UserError
from leanlight.contracts.ranges import (
    NonNegativeFloat,
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
)
from lit_modules.nn.checks import require_positive
from lit_modules.tical.anchors import AnchorLists, range_of
from lit_modules.tical.hyperbolic import Geometry, without_autocast

Reading = Literal["paper", "soft"]
Typicality = Literal["range", "margin", "prototype", "radius", "off"]
TypicalityRange = Literal["running", "batch"]
Disagreement = Literal["pairs", "levels", "power", "product", "jensen_shannon"]

_DISAGREEMENTS: dict[str, tuple[str, ...]] = {
    "paper": ("pairs", "levels", "power"),
    "soft": ("product", "jensen_shannon"),
}
_UNKNOWN = {"paper": 0.5, "soft": 1.0}  # κ where nothing is known: both ends alike, and no weight at all


@dataclass(frozen=True)
class Assessment:
    """The verdict on N clips. Mappings are by modality.

    Args:
        pseudo: (N,) int64 class that the modality alone suggests; -1 where it is absent or has no anchors.
        typicality: τ_m, (N,) in [0, 1]; 0 where there is no pseudo label.
        consistency: κ, (N,) in [0, 1].
        distance: (N,) from the nearest anchor; infinite where there is none.
        anchor: (N,) int64 position of the nearest anchor's clip in the training part; -1 where there is none.
        probabilities: q_m, (N, C); one class alone in reading ``paper``, 0 everywhere without a pseudo label.
    """

    pseudo: Mapping[str, Tensor]
    typicality: Mapping[str, Tensor]
    consistency: Tensor
    distance: Mapping[str, Tensor]
    anchor: Mapping[str, Tensor]
    probabilities: Mapping[str, Tensor]


class _Found(NamedTuple):
    """What the anchors say of (N, d) points of a modality: as in `Assessment`, and distances (N, C) from classes."""

    pseudo: Tensor
    known: Tensor
    distance: Tensor
    anchor: Tensor
    by_class: Tensor | None


@dataclass(frozen=True)
class ConsistencyAssessment:
    """How clips are assessed.

    ``paper`` is the published mechanism: y*_m of the nearest anchor, ``κ = (Π τ_m)^t exp(-k dis(y*))``. ``soft`` has
    probabilities ``q_m = softmax(-D_m / τ_p)`` of the mean distances D_m from the nearest anchors of each class, and
    ``κ = Σ τ_m τ_n a_mn / Σ τ_m τ_n`` over pairs of modalities with agreement a_mn.

    Args:
        reading: ``paper`` or ``soft``.
        geometry: the space of the points.
        dim: numbers from which a point is made.
        length: Q, anchors of a list.
        theta: θ in (0, 1); samples that are recognised rightly with more confidence become anchors.
        temperature: t, at least 0.
        scale: k, at least 0.
        density: ρ, positive; shapes ``levels`` and ``power``.
        disagreement: dis or 1 - a. Of ``paper``: ``pairs``, share of pairs with unequal labels; for ordered classes
            ``levels``, Σ |y*_m - y*_n| / ρ, and ``power``, (mean |y*_m - y*_n|)^ρ. Of ``soft``: ``product``, with
            a_mn = Σ_k q_mk q_nk, and ``jensen_shannon``, with a_mn = 1 - JS / ln 2. null: the first.
        typicality: ``range``: (max d - d) / (max d - min d) of the distance d from the nearest anchor; ``margin``:
            (D_2 - D_1) / (D_2 + D_1) of the two nearest classes; ``prototype``: exp(-d / ρ_k) of the distance from the
            mean of the class' anchors, over their mean distance from it; ``radius``: how far out the point lies;
            ``off``: 1. null: ``range`` (paper), ``margin`` (soft).
        typicality_range: of ``range``. ``running``: that of training, kept with the anchors, so that a clip's verdict
            does not change with its neighbours (½ until there is one); ``batch``: that of the batch, as published.
        range_momentum: share of a step in the running range, in (0, 1].
        warmup_epochs: epochs of the task loss alone.
        consistency: false leaves κ constant: ½ (paper) or 1 (soft).
        neighbours: nearest anchors of each class whose mean distance is D_m, in reading ``soft``.
        pseudo_temperature: τ_p, positive.
    """

    reading: Reading = "paper"
    geometry: Geometry = field(default_factory=Geometry)
    dim: PositiveInt = 32
    length: PositiveInt = 2048
    theta: OpenUnitInterval = 0.8
    temperature: NonNegativeFloat = 0.2
    scale: NonNegativeFloat = 0.5
    density: PositiveFloat = 4.0
    disagreement: Disagreement | None = None
    typicality: Typicality | None = None
    typicality_range: TypicalityRange = "running"
    range_momentum: PositiveShare = 0.05
    warmup_epochs: NonNegativeInt = 5
    consistency: bool = True
    neighbours: PositiveInt = 5
    pseudo_temperature: PositiveFloat = 0.2

    def __post_init__(self) -> None:
        self._check_choices()
        for name in ("theta", "range_momentum"):
            value, greatest = getattr(self, name), name == "range_momentum"
            if not (0 < value < 1 or (greatest and value == 1)):
                end = "1]" if greatest else "1)"
                raise UserError(f"assessment.{name}: expected a number in (0, {end}, got {value}")
        for name in ("density", "pseudo_temperature"):
            if not getattr(self, name) > 0:
                raise UserError(f"assessment.{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("temperature", "scale", "warmup_epochs"):
            if not getattr(self, name) >= 0:
                raise UserError(f"assessment.{name}: expected a number of at least 0, got {getattr(self, name)}")
        require_positive(**{f"assessment.{name}": getattr(self, name) for name in ("dim", "length", "neighbours")})

    def _check_choices(self) -> None:
        known = {"reading": get_args(Reading), "typicality_range": get_args(TypicalityRange)}
        known["typicality"] = (None, *get_args(Typicality))
        known["disagreement"] = (None, *_DISAGREEMENTS.get(self.reading, ()))
        for name, values in known.items():
            if getattr(self, name) not in values:
                choice = ", ".join(str(each) for each in values if each is not None)
                of = f" in reading {self.reading}" if name == "disagreement" else ""
                raise UserError(f"assessment.{name}: expected one of {choice}{of}, got {getattr(self, name)!r}")

    def lists(self, modalities: Sequence[str], num_classes: int) -> AnchorLists:
        """Empty lists of anchors for these settings."""
        return AnchorLists(modalities, num_classes, self.geometry.width(self.dim), self.length)

    @torch.no_grad()
    def chosen(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples become anchors (N,) bool, and the probability (N,) of their label.

        Args:
            logits: (N, C) of the head that judges: the fused one, or one by modality.
            label: (N,) int64.
        """
        probability = logits.float().softmax(1)
        confidence = probability.gather(1, label[:, None])[:, 0]
        return (probability.argmax(1) == label) & (confidence > self.theta), confidence

    @torch.no_grad()
    def assess(
        self,
        points: Mapping[str, Tensor],
        lists: AnchorLists,
        clip: Tensor | None = None,
        present: Mapping[str, Tensor] | None = None,
    ) -> Assessment:
        """The verdict on clips, from what the lists hold. It needs no label, and changes no state.

        Args:
            points: by modality, (N, dim) points.
            lists: anchors of the same modalities.
            clip: (N,) int64 positions in the training part, for clips of it: none is compared with itself. None: of
                other clips.
            present: by modality, (N,) bool, which clips have it; an absent one says nothing. None: all.
        """
        lists.check(tuple(points))
        found: dict[str, _Found] = {}
        typicality: dict[str, Tensor] = {}
        usable = lists.usable()
        for m, name in enumerate(lists.modalities):
            allowed = usable[m] if clip is None else usable[m] & (lists.clip[m] != clip[:, None])
            one = self._find(points[name], lists, m, allowed, None if present is None else present[name])
            found[name] = one
            measured = self._typicality(points[name], one, lists, m, usable[m])
            typicality[name] = torch.where(one.known, measured, 0)
        probabilities = {name: self._probability(one, lists.num_classes) for name, one in found.items()}
        known = torch.stack([one.known for one in found.values()], 1)
        agreement = self._agreement(torch.stack([*probabilities.values()], 1))
        pseudo = torch.stack([one.pseudo for one in found.values()], 1)
        return Assessment(
            {name: one.pseudo for name, one in found.items()},
            typicality,
            self._consistency(torch.stack([*typicality.values()], 1), pseudo, agreement, known),
            {name: one.distance for name, one in found.items()},
            {name: one.anchor for name, one in found.items()},
            probabilities,
        )

    @property
    def _measure(self) -> Typicality:
        return self.typicality or ("range" if self.reading == "paper" else "margin")

    def _find(self, points: Tensor, lists: AnchorLists, m: int, allowed: Tensor, present: Tensor | None) -> _Found:
        distance, position = self.geometry.nearest(points, lists.points[m], allowed)
        known = position >= 0 if present is None else (position >= 0) & present
        label, anchor = lists.label[m][position], lists.clip[m][position]
        by_class = None
        if self.reading == "soft" or self._measure == "margin":
            table = self.geometry.pairwise(points, lists.points[m]).masked_fill(~allowed, torch.inf)
            count = self.neighbours if self.reading == "soft" else 1
            by_class = _class_distances(table, lists.label[m], lists.num_classes, count)
        if self.reading == "soft" and by_class is not None:
            label = by_class.argmin(1)
        distance = distance.masked_fill(~known, torch.inf)
        return _Found(label.masked_fill(~known, -1), known, distance, anchor.masked_fill(~known, -1), by_class)

    def _typicality(self, points: Tensor, found: _Found, lists: AnchorLists, m: int, usable: Tensor) -> Tensor:
        """(N,) in [0, 1]; of no meaning where nothing is known."""
        measure = self._measure
        if measure == "range":
            running = self.typicality_range == "running"
            least, greatest = (lists.range[m] if running else range_of(found.distance[None])[0]).unbind()
            share = (greatest - found.distance) / (greatest - least)
            return torch.where(greatest > least, share.clamp(0, 1), 0.5)
        if measure == "margin" and found.by_class is not None:
            nearest, rival = found.by_class.topk(2, largest=False).values.unbind(1)
            margin = (rival - nearest) / (rival + nearest).clamp(min=torch.finfo(nearest.dtype).tiny)
            return torch.where(rival.isfinite(), margin, 1)  # without a rival there is nothing to doubt
        if measure == "prototype":
            return self._nearness(points, found.pseudo.clamp(min=0), lists, m, usable)
        return self.geometry.radius(points).clamp(max=1) if measure == "radius" else torch.ones_like(found.distance)

    def _nearness(self, points: Tensor, pseudo: Tensor, lists: AnchorLists, m: int, usable: Tensor) -> Tensor:
        anchors, label = lists.points[m], lists.label[m].clamp(min=0)
        member = F.one_hot(label, lists.num_classes).T * usable
        prototype = self.geometry.mean(anchors, member)
        apart = self.geometry.distance(anchors, prototype[label])
        spread = (member * apart).sum(1) / member.sum(1).clamp(min=1)
        # A single anchor is its own prototype: then what is apart from it at all is not typical.
        scale = spread[pseudo].clamp(min=torch.finfo(apart.dtype).eps)
        return (-self.geometry.distance(points, prototype[pseudo]) / scale).exp()

    def _probability(self, found: _Found, num_classes: int) -> Tensor:
        if self.reading == "paper" or found.by_class is None:
            probability = F.one_hot(found.pseudo.clamp(min=0), num_classes).float()
        else:
            probability = (-found.by_class / self.pseudo_temperature).softmax(1)
        return torch.where(found.known[:, None], probability, 0)

    def _agreement(self, probability: Tensor) -> Tensor:
        """a_mn, (N, M, M) of q_m (N, M, C)."""
        if self.disagreement != "jensen_shannon":
            with without_autocast(probability.device.type):
                return probability @ probability.mT
        one, other = probability[:, :, None], probability[:, None]
        middle = (one + other) / 2
        entropies = [torch.special.entr(each).sum(-1) for each in (middle, one, other)]
        divergence = entropies[0] - (entropies[1] + entropies[2]) / 2
        return (1 - divergence / math.log(2)).clamp(0, 1)

    def _consistency(self, typicality: Tensor, pseudo: Tensor, agreement: Tensor, known: Tensor) -> Tensor:
        """κ (N,) of τ_m (N, M), y*_m (N, M), a_mn (N, M, M) and what is known (N, M) of each."""
        unknown = _UNKNOWN[self.reading]
        if not self.consistency:
            return torch.full_like(typicality[:, 0], unknown)
        count = typicality.shape[1]
        pair = torch.ones(count, count, dtype=torch.bool, device=known.device).triu(1)
        if self.reading == "soft":
            weight = typicality[:, :, None] * typicality[:, None] * pair
            total = weight.sum((1, 2))
            return torch.where(total > 0, (weight * agreement).sum((1, 2)) / total, unknown)
        pair = pair & known[:, :, None] & known[:, None]
        pairs = pair.sum((1, 2)).clamp(min=1)
        if self.disagreement in (None, "pairs"):
            disagreement = ((1 - agreement) * pair).sum((1, 2)) / pairs
        else:
            levels = ((pseudo[:, :, None] - pseudo[:, None]).abs() * pair).sum((1, 2))
            disagreement = levels / self.density if self.disagreement == "levels" else (levels / pairs) ** self.density
        likely = torch.where(known, typicality, 1).prod(1) ** self.temperature
        return torch.where(known.any(1), likely * (-self.scale * disagreement).exp(), unknown)


def _class_distances(table: Tensor, label: Tensor, num_classes: int, count: int) -> Tensor:
    """(N, C) mean of the `count` smallest distances from each class, of fewer where it has fewer; infinite without.

    Args:
        table: (N, Q) distances from anchors, infinite where they do not count.
        label: (Q,) classes of the anchors.
    """
    means = []
    for each in range(num_classes):
        near = table.masked_fill(label != each, torch.inf).topk(min(count, len(label)), largest=False, sorted=False)
        finite = near.values.isfinite()
        mean = torch.where(finite, near.values, 0).sum(1) / finite.sum(1)
        means.append(torch.where(finite.any(1), mean, torch.inf))
    return torch.stack(means, 1)
