"""Training glue of judges that need no optimiser: they are measured as runs, beside those that are trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from leanlight.contracts import (
    Allows,
    Judge,
    MediaItem,
    PrimaryMetric,
    Progress,
    SafetyData,
    SafetySample,
    Split,
    TokenBatch,
    UserError,
    atomic_write,
    data_of,
)
from lit_modules.falcon_eye.evaluation import SafetyEvaluation
from lit_modules.falcon_eye.judge_sources import IndexEncoder, JudgeSource
from lit_modules.falcon_eye.judges import FeatureJudge
from lit_modules.falcon_eye.predictions import outputs, write_verdicts
from lit_modules.hparams import save_hparams


class JudgeEvaluation(LightningModule):
    """Measure any judge on the parts of the data, as a fit without an optimiser.

    The judge is made of the training part, on each process for itself, and is in no checkpoint:
    another fit or test makes it again.

    Args:
        judge: where the judge comes from: `Majority`, `Keyword`, `Person`, `FrozenFeatures`,
            `WrittenOutputs` or `Model`.
    """

    allows = Allows()
    collected_in = "verdicts"

    def __init__(self, judge: JudgeSource) -> None:
        super().__init__()
        save_hparams(self)
        self.automatic_optimization = False
        self.source, self.encoder = judge, IndexEncoder()
        self.evaluation = SafetyEvaluation()
        self._needless = nn.Parameter(torch.zeros(()))  # DistributedDataParallel wraps no module without one
        self._judge: Judge | None = None
        self._batches = 0

    def setup(self, stage: str) -> None:
        """Make the judge, and the metrics of what it judges and the data have labels of."""
        labelled = data_of(self, SafetyData).meta.fields
        fields = [name for name in labelled if name in self.judge.fields]
        if labelled and not fields:
            raise UserError(
                f"judge: {self.judge.name} judges {', '.join(self.judge.fields)}; the data have labels of "
                f"{', '.join(labelled)} alone"
            )
        self.evaluation.prepare(fields)

    def configure_optimizers(self) -> list[Any]:
        return []

    @property
    def judge(self) -> Judge:
        """The judge, made when it is first asked."""
        if self._judge is None:
            data = data_of(self, SafetyData)
            self._judge = self.source.make(data.samples("train"), data.samples("val"))
        return self._judge

    # ---- steps ----

    def training_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self._batches += 1

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: TokenBatch, split: Split) -> None:
        samples = self._samples(split, batch.index)
        self.evaluation.update(split, samples, self.judge.judge(samples))

    def _samples(self, split: str, index: Tensor) -> list[SafetySample]:
        samples = data_of(self, SafetyData).samples(split)
        return [samples[place] for place in index.tolist()]

    def on_validation_epoch_start(self) -> None:
        self.evaluation.start("val")

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish("val"), sync_dist=True)

    def on_test_epoch_start(self) -> None:
        self.evaluation.start("test")

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish("test"), sync_dist=True)

    # ---- predictions ----

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> dict[str, Tensor | list[str]]:
        """As `SafetyJudge.predict_step`, of the fields that this judge judges."""
        part = self.trainer.datamodule.predict_split  # type: ignore[attr-defined]
        samples = self._samples(part, batch.index)
        return outputs(batch.index, samples, self.judge.judge(samples), self.judge.fields)

    def collect(self, pieces: Callable[[], Iterator[Mapping[str, Any]]], directory: Path) -> dict[str, float]:
        """Write ``verdicts.jsonl``: see `lit_modules.falcon_eye.predictions`."""
        return write_verdicts(pieces(), self.judge.fields, directory / "verdicts.jsonl")

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/balanced_accuracy", "max")

    def progress(self) -> Progress:
        return Progress("step", self._batches)

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        return {} if split == "train" else self.evaluation.media(split)

    def export(self, directory: Path) -> list[Path]:
        """Write a regression on features, for ``leanlight audit --judge features:FOLDER``; of others, what they are."""
        if self._judge is None and self._trainer is None:
            raise UserError("source: a judge without an optimiser is made in its fit, which exports it; fit it again")
        if isinstance(self.judge, FeatureJudge):
            self.judge.save(directory)
            return [Path(directory) / "judge.json", Path(directory) / "judge.safetensors"]
        facts = {"judge": self.judge.name, "fields": list(self.judge.fields), "fingerprint": self.judge.fingerprint}
        atomic_write(Path(directory) / "judge.json", json.dumps(facts, indent=2) + "\n")
        return [Path(directory) / "judge.json"]

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["judge"] = {"batches": self._batches, "thresholds": dict(self.evaluation.thresholds)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._batches = checkpoint["judge"]["batches"]
        self.evaluation.thresholds = dict(checkpoint["judge"]["thresholds"])
