"""How well emotions are recognised, conflicts found and modalities understood, and what pictures need; no Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from leanlight.contracts import MediaItem, MultimodalBatch, Split
from lit_modules.tical import pictures
from lit_modules.tical.metrics import emotion_metrics
from lit_modules.tical.network import EmotionNetwork, Facts, Verdict


class EmotionEvaluation(nn.Module):
    """Metrics and pictures of verdicts, by split (``val``, ``test``).

    A LightningModule keeps one as a submodule, so that it moves to the module's device: `prepare` in ``setup``, then in
    every epoch `start`, `update` a batch, `finish`. It has no parameters and leaves nothing in a state dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self.metrics, self.statistics = nn.ModuleDict(), nn.ModuleDict()
        self._facts: Facts | None = None
        self._shown: dict[str, dict[str, Tensor]] = {}
        self._clips: dict[str, ShownClips] = {}

    def prepare(self, facts: Facts) -> None:
        """Make the metrics for the classes and scores of `facts`."""
        self._facts = facts
        for split in ("val", "test"):
            if split not in self.metrics:
                self.metrics[split] = emotion_metrics(len(facts.classes), facts.score_range)
                self.statistics[split] = ClipStatistics(len(facts.classes), tuple(facts.modalities))

    def start(self, split: Split) -> None:
        """Forget the split's last epoch."""
        self._clips[split] = ShownClips()
        for metric in self._of(split):
            metric.reset()

    def update(self, split: Split, network: EmotionNetwork, verdict: Verdict, batch: MultimodalBatch) -> None:
        """Take in the verdict of a batch."""
        metrics, statistics = self._of(split)
        kappa = None if verdict.assessed is None else verdict.assessed.consistency
        predicted = network.classes(verdict.output)
        score = None if batch.score is None else network.scores(verdict.output)
        metrics.update(predicted, batch.label, score, batch.score, kappa, batch.conflict)
        statistics.update(predicted, batch.label, network.says(verdict), batch.conflict, batch.unimodal)
        self._clips[split].add(network, verdict, batch, predicted)

    def finish(self, split: Split) -> dict[str, Tensor]:
        """End the split's epoch; its metrics by name. Every process must call it, since it gathers."""
        metrics, statistics = self._of(split)
        counts = {name: value.cpu() for name, value in statistics.compute().items()}
        found = {**metrics.compute(), **shares(counts)}
        self._shown[split] = counts | {name: value for name, value in found.items() if name in pictures.TERCILES}
        return {f"{split}/{name}": value.float() for name, value in found.items()}

    def media(self, split: Split, network: EmotionNetwork) -> dict[str, MediaItem]:
        """Confusion, what modalities say of one another, accuracy by tercile of κ, κ itself, and disks of the points.

        On several processes κ and the points are those of this one's share.
        """
        if split not in self._shown or self._facts is None:
            return {}
        facts, shown = self._facts, self._shown[split]
        items = pictures.counts(shown, facts.classes, tuple(facts.modalities))
        return items | self._clips[split].media(network)

    def _of(self, split: Split) -> tuple[Metric, Metric]:
        return cast(Metric, self.metrics[split]), cast(Metric, self.statistics[split])


class ClipStatistics(Metric):
    """Counts of clips: by class, by what pairs of modalities say, of conflicts, and of modalities read rightly.

    Args:
        num_classes: C.
        modalities: names.
    """

    full_state_update = False
    confusion: Tensor
    says: Tensor
    clips: Tensor
    right: Tensor

    def __init__(self, num_classes: int, modalities: tuple[str, ...]) -> None:
        super().__init__()
        self.num_classes, self.pairs = num_classes, pictures.pairs(modalities)
        shapes = {
            "confusion": (num_classes, num_classes),
            "says": (len(self.pairs), num_classes + 1, num_classes + 1),  # the first row and column: says nothing
            "clips": (3,),  # agreeing, conflicted, and modalities that show another class than the clip has
            "right": (3,),
        }
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        predicted: Tensor,
        label: Tensor,
        says: Mapping[str, Tensor],
        conflict: Tensor | None,
        unimodal: Mapping[str, Tensor],
    ) -> None:
        """Take in a batch.

        Args:
            predicted: (N,) int64.
            label: (N,) int64.
            says: by modality, (N,) int64 class that it suggests, -1 for none; those that are not asked are left out.
            conflict: (N,) bool, or None where nobody knows.
            unimodal: by modality, (N,) int64 class that it shows; empty where nobody knows.
        """
        one, classes = torch.ones_like(label), self.num_classes
        self.confusion.view(-1).index_add_(0, label * classes + predicted, one)
        for place, (first, second) in enumerate(self.pairs):
            if first in says and second in says:
                cell = (says[first] + 1) * (classes + 1) + says[second] + 1
                self.says[place].view(-1).index_add_(0, cell, one)
        if conflict is not None:
            self.clips[:2].index_add_(0, conflict.long(), one)
            self.right[:2].index_add_(0, conflict.long(), (predicted == label).long())
        for name in says.keys() & unimodal.keys():
            foreign = (unimodal[name] != label) & (unimodal[name] >= 0)
            self.clips[2] += foreign.sum()
            self.right[2] += (foreign & (says[name] == unimodal[name])).sum()

    def compute(self) -> Mapping[str, Tensor]:
        """``confusion`` (C, C), ``says`` (P, C, C), and ``clips`` and ``right`` (3,)."""
        return {"confusion": self.confusion, "says": self.says[:, 1:, 1:], "clips": self.clips, "right": self.right}


_SHARES = ("accuracy_agreeing", "accuracy_conflicted", "pseudo_accuracy")


def shares(counts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shares of what is right, by name, of the counts of `ClipStatistics`; without those that nobody knows."""
    right, clips = counts["right"].cpu(), counts["clips"].cpu()
    return {name: right[k] / clips[k] for k, name in enumerate(_SHARES) if clips[k]}


class ShownClips:
    """The first clips of a part, as pictures need them; what is kept stays on the device."""

    def __init__(self) -> None:
        self._kept: list[dict[str, Tensor]] = []
        self._count = 0

    def add(self, network: EmotionNetwork, verdict: Verdict, batch: MultimodalBatch, predicted: Tensor) -> None:
        """Keep a batch, unless there are enough."""
        assessment, assessed = network.assessment, verdict.assessed
        if self._count >= pictures.POINTS or assessment is None:
            return
        self._count += len(batch)
        kept = {"label": batch.label, "right": predicted == batch.label}
        kept |= {f"point {name}": assessment.geometry.log(point.detach()) for name, point in verdict.points.items()}
        if assessed is not None:
            kept["kappa"] = assessed.consistency
            kept |= {f"typicality {name}": value for name, value in assessed.typicality.items()}
        if batch.conflict is not None:
            kept["conflict"] = batch.conflict
        self._kept.append(kept)

    def media(self, network: EmotionNetwork) -> dict[str, MediaItem]:
        """Disks of the points, and κ."""
        if not self._kept or network.assessment is None:
            return {}
        kept = {name: torch.cat([part[name] for part in self._kept]).cpu() for name in self._kept[0]}
        geometry, modalities = network.assessment.geometry, tuple(network.facts.modalities)
        curved = geometry.kind != "euclidean"
        scale = geometry.curvature**0.5 if curved else 1.0
        flat = {name: pictures.plane(kept[f"point {name}"].float() * scale, curved) for name in modalities}
        typicality = {name: kept[key] for name in modalities if (key := f"typicality {name}") in kept}
        items = pictures.disks(flat, kept["label"], typicality, network.facts.classes, curved)
        if "kappa" in kept:
            items["consistency"] = pictures.consistency(kept["kappa"], kept.get("conflict"), kept["right"])
        return items
