"""How good verdicts on a part of the data are, and what pictures need of them; no Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics.utilities import dim_zero_cat

from leanlight.contracts import MediaItem, SafetySample, Split, Verdict
from lit_modules.falcon_eye import pictures
from lit_modules.falcon_eye.metrics import SafetyMetrics, choose_threshold, decided


class SafetyEvaluation(nn.Module):
    """Metrics and pictures of verdicts, by split (``val``, ``test``).

    A LightningModule keeps one as a submodule, so that it moves to the module's device: `prepare` in ``setup``, then in
    every epoch `start`, `update` a batch, `finish`. It has no parameters and leaves nothing in a state dict.

    Attributes: ``fields``, those that are judged; ``thresholds``, by field, the one that was best on the last
    validation data (balanced accuracy), where both labels occur.
    """

    def __init__(self) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict()
        self.fields: tuple[str, ...] = ()
        self.thresholds: dict[str, float] = {}
        self._figures: dict[str, dict[str, float]] = {}
        self._rows: dict[str, list[tuple[SafetySample, Verdict]]] = {}
        self._shown: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def prepare(self, fields: Sequence[str]) -> None:
        """Make the metrics of these fields."""
        self.fields = tuple(fields)
        for split in ("val", "test", "test_at_threshold"):
            self.metrics[split] = SafetyMetrics(self.fields)

    def start(self, split: Split) -> None:
        """Forget the split's last epoch."""
        self._rows[split] = []
        for name in self._names(split):
            self._metric(name).reset()

    def update(self, split: Split, samples: Sequence[SafetySample], verdicts: Sequence[Verdict]) -> None:
        """Take in samples and their verdicts, one each, in order."""
        self._metric(split).update(samples, verdicts)
        if split == "test" and self.thresholds:
            at_threshold = [decided(verdict, self.thresholds) for verdict in verdicts]
            self._metric("test_at_threshold").update(samples, at_threshold)
        rows = self._rows[split]
        rows += list(zip(samples, verdicts, strict=True))[: pictures.ROWS - len(rows)]

    def finish(self, split: Split, written: bool = True) -> dict[str, Tensor]:
        """End the split's epoch; its metrics by name. Every process must call it, since it gathers.

        Beside what `SafetyMetrics` gives: ``balanced_accuracy``, the mean over the fields, of a field with one label
        alone its accuracy; of test, ``FIELD_balanced_accuracy_at_threshold`` with the thresholds of validation.

        Args:
            split: of the epoch.
            written: whether the judge wrote answers; of one that gave scores alone, figures of categories say nothing.
        """
        metric = self._metric(split)
        found = {name: value for name, value in metric.compute().items() if written or "categor" not in name}
        by_field = [
            found.get(f"{name}_balanced_accuracy", found.get(f"{name}_accuracy"))
            for name in self.fields
            if f"{name}_accuracy" in found
        ]
        if by_field:
            found["balanced_accuracy"] = torch.stack(by_field).mean()  # type: ignore[arg-type]  # each is a tensor
        if split == "test" and self.thresholds:
            chosen = self._metric("test_at_threshold").compute()
            for name in self.thresholds:
                if (value := chosen.get(f"{name}_balanced_accuracy")) is not None:
                    found[f"{name}_balanced_accuracy_at_threshold"] = value
        with metric.sync_context(should_unsync=True):
            self._take(split, metric)
        self._figures[split] = {name: float(value) for name, value in found.items()}
        return {f"{split}/{name}": value.float() for name, value in found.items()}

    def _take(self, split: Split, metric: SafetyMetrics) -> None:
        """Keep scores and counts of all processes for pictures, and choose thresholds on those of validation."""
        scores = dim_zero_cat(metric.scores).cpu() if len(metric.scores) else torch.zeros(0, len(self.fields))
        labels = dim_zero_cat(metric.labels).cpu() if len(metric.labels) else torch.zeros(0, len(self.fields)).long()
        confusion = metric.counts[: 9 * len(self.fields)].view(-1, 3, 3)[:, :2].cpu()
        self._shown[split] = scores, labels, confusion
        if split != "val":
            return
        self.thresholds = {}
        for k, name in enumerate(self.fields):
            known = ~scores[:, k].isnan() & (labels[:, k] >= 0)
            harmful = labels[known, k] == 1
            if harmful.any() and not harmful.all():
                self.thresholds[name] = choose_threshold(scores[known, k], harmful)

    def figures(self, split: Split) -> Mapping[str, float]:
        """What the split's last epoch gave, by name without the split."""
        return self._figures.get(split, {})

    def media(self, split: Split) -> dict[str, MediaItem]:
        """P(harmful) by truth and its calibration, confusion, accuracy beside the majority's, and the first verdicts.

        On several processes the table is that of this one's share.
        """
        if split not in self._shown:
            return {}
        scores, labels, confusion = self._shown[split]
        return {
            **pictures.scores(scores, labels, self.fields),
            **pictures.calibration(scores, labels, self.fields),
            **pictures.confusions(confusion, self.fields),
            **pictures.beside_majority(self._figures[split], self.fields),
            **pictures.table(self._rows[split], self.fields),
        }

    def _names(self, split: Split) -> tuple[str, ...]:
        return ("test", "test_at_threshold") if split == "test" else (split,)

    def _metric(self, name: str) -> SafetyMetrics:
        metric = self.metrics[name]
        assert isinstance(metric, SafetyMetrics)
        return metric
