"""Lists of anchors: points of training samples that were recognised with confidence, by modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveInt
from lit_modules.nn.checks import require_positive

_RESERVE = 3  # samples a class that stand in for its anchors
_FADING = 0.99  # of a reserve's confidence at each step, so that points of an older network give way


class AnchorLists(nn.Module):
    """Of each modality, the last Q anchors in the order in which they came, and a reserve of each class.

    A list is a ring: a new anchor takes the place of the oldest. The reserve of a class holds its most confident
    samples, however unsure they are, and stands in while the class has no anchor. With the anchors goes the range of
    distances that training has seen. All of it is state: checkpoint and export carry it. Nothing waits for the device.

    Args:
        modalities: names, in the order of the first dimension of the state.
        num_classes: C.
        dim: coordinates of a point, see `Geometry.width`.
        length: Q, anchors of a list.
    """

    #: (M, Q + 3 C, dim) rings, and behind each the reserve, class by class.
    points: Tensor
    #: (M, Q + 3 C) int64 classes; -1 where there is nothing.
    label: Tensor
    #: (M, Q + 3 C) int64 positions of the clips in the training part; -1 where there is nothing.
    clip: Tensor
    #: (M, C, 3) confidence of the reserve; -1 where there is nothing.
    confidence: Tensor
    #: (M,) int64 anchors that ever came.
    written: Tensor
    #: (M, 2) least and greatest distance from the nearest anchor in training; infinite until there is one.
    range: Tensor

    def __init__(self, modalities: Sequence[str], num_classes: int, dim: int, length: PositiveInt = 2048) -> None:
        super().__init__()
        require_positive(num_classes=num_classes, dim=dim, length=length)
        self.modalities, self.num_classes, self.length = tuple(modalities), num_classes, length
        count, rows = len(self.modalities), length + _RESERVE * num_classes
        self.register_buffer("points", torch.zeros(count, rows, dim))
        self.register_buffer("label", torch.full((count, rows), -1))
        self.register_buffer("clip", torch.full((count, rows), -1))
        self.register_buffer("confidence", torch.full((count, num_classes, _RESERVE), -1.0))
        self.register_buffer("written", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("range", torch.tensor([torch.inf, -torch.inf]).repeat(count, 1))

    @torch.no_grad()
    def add(
        self,
        points: Mapping[str, Tensor],
        label: Tensor,
        clip: Tensor,
        chosen: Mapping[str, Tensor] | Tensor,
        confidence: Mapping[str, Tensor] | Tensor,
        present: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take in the samples of a step in ascending order of `clip`: on several processes, those of all of them.

        Args:
            points: by modality, (N, dim).
            label: (N,) int64.
            clip: (N,) int64 position in the training part.
            chosen: (N,) bool, which become anchors; the same for all modalities, or by modality.
            confidence: (N,) probability of the label; the same for all modalities, or by modality.
            present: by modality, (N,) bool, which clips have it; the others are left out. None: all.
        """
        order = clip.argsort(stable=True)
        label, clip = label[order], clip[order]
        new = self._rows(points)[:, order].to(self.points.dtype)
        there = torch.ones_like(new[..., 0], dtype=torch.bool) if present is None else self._rows(present)[:, order]
        chosen, confidence = (self._rows(each)[:, order] for each in (chosen, confidence))
        self._append(new, label, clip, chosen & there)
        self._reserve(new, label, clip, torch.where(there, confidence.float(), -1))

    def _rows(self, values: Mapping[str, Tensor] | Tensor) -> Tensor:
        """(M, N, ...) in the order of the modalities."""
        if isinstance(values, Tensor):
            return values.expand(len(self.modalities), *values.shape)
        return torch.stack([values[name] for name in self.modalities])

    def _append(self, points: Tensor, label: Tensor, clip: Tensor, chosen: Tensor) -> None:
        """Write (M, N) samples where they are chosen. The number of rows written is N, or Q where that is less.

        Samples that are not chosen come last, and put back what is in the places after those of the chosen ones: so
        all places differ, and nothing depends on a count that only the device knows.
        """
        count = chosen.sum(1, keepdim=True)
        row = torch.arange(min(len(label), self.length), device=label.device)
        skipped = (count - self.length).clamp(min=0)  # more than a ring holds: the first would be overwritten
        sample = (~chosen).int().argsort(dim=1, stable=True).gather(1, (skipped + row).clamp(max=len(label) - 1))
        place = (self.written[:, None] + skipped + row) % self.length
        fresh = skipped + row < count
        m = torch.arange(len(chosen), device=label.device)[:, None]
        self.points[m, place] = torch.where(fresh[..., None], points[m, sample], self.points[m, place])
        for kept, new in ((self.label, label), (self.clip, clip)):
            kept[m, place] = torch.where(fresh, new[sample], kept[m, place])
        self.written += count[:, 0]

    def _reserve(self, points: Tensor, label: Tensor, clip: Tensor, confidence: Tensor) -> None:
        """Keep the most confident samples of each class among those of before and (M, N) new ones."""
        classes = torch.arange(self.num_classes, device=label.device)
        new = torch.where(label == classes[:, None], confidence[:, None], -1)
        found, which = torch.cat([_FADING * self.confidence, new], 2).topk(_RESERVE, 2)
        self.confidence.copy_(torch.where(found < 0, -1, found))
        filled = self.confidence.flatten(1) >= 0
        # Columns of `which` are the class' own reserve, then the new samples; here: all reserves, then the samples.
        own = which + _RESERVE * classes[:, None]
        source = torch.where(which < _RESERVE, own, which + _RESERVE * (self.num_classes - 1)).flatten(1)
        m = torch.arange(len(points), device=label.device)[:, None]
        self.points[:, self.length :] = torch.cat([self.points[:, self.length :], points], 1)[m, source]
        clips = torch.cat([self.clip[:, self.length :], clip.expand(len(points), -1)], 1)[m, source]
        self.clip[:, self.length :] = torch.where(filled, clips, -1)
        self.label[:, self.length :] = torch.where(filled, classes.repeat_interleave(_RESERVE), -1)

    @torch.no_grad()
    def observe(self, distance: Mapping[str, Tensor], momentum: float) -> None:
        """Move the range of distances towards that of a step: on several processes, of all their samples.

        Args:
            distance: by modality, (N,) from the nearest anchor; infinite where there is none.
            momentum: share of the step in the range, in (0, 1]; the first step is taken as it is.
        """
        step = range_of(self._rows(distance).float())
        moved = torch.where(self.range.isfinite(), self.range.lerp(step, momentum), step)
        self.range.copy_(torch.where(step.isfinite(), moved, self.range))

    def usable(self) -> Tensor:
        """(M, Q + 3 C) bool: anchors, and the reserve of classes that have none."""
        anchored = self.counts() > 0
        of_label = anchored.gather(1, self.label.clamp(min=0))
        ring = torch.arange(self.label.shape[1], device=self.label.device) < self.length
        return (self.label >= 0) & (ring | ~of_label)

    def counts(self) -> Tensor:
        """(M, C) int64 anchors by modality and class, without the reserve."""
        ring = self.label[:, : self.length]
        counts = torch.zeros(len(ring), self.num_classes + 1, dtype=torch.int64, device=ring.device)
        return counts.scatter_add_(1, ring + 1, torch.ones_like(ring))[:, 1:]

    def without_anchors(self) -> dict[str, tuple[int, ...]]:
        """Classes by modality whose reserve stands in for anchors, or would; waits for the device."""
        empty = (self.counts() == 0).cpu()
        return {name: tuple(row.nonzero()[:, 0].tolist()) for name, row in zip(self.modalities, empty, strict=True)}

    def check(self, modalities: Sequence[str]) -> None:
        """Raise UserError unless there is a list for each of `modalities`, and no other."""
        if sorted(modalities) != sorted(self.modalities):
            raise UserError(f"modalities: expected {', '.join(self.modalities)}, got {', '.join(modalities)}")


def range_of(distance: Tensor) -> Tensor:
    """(M, 2) least and greatest of the finite ones among distances (M, N); infinite where there are none."""
    finite = distance.isfinite()
    least = distance.masked_fill(~finite, torch.inf).amin(1)
    return torch.stack([least, distance.masked_fill(~finite, -torch.inf).amax(1)], 1)
