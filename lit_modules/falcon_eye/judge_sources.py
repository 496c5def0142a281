"""Judges that a config names: how each is made from labelled samples, or from files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from leanlight.contracts import Judge, SafetySample, TokenBatch, UserError
from leanlight.contracts.ranges import PositiveInt
from lit_modules.falcon_eye.answering import Mode
from lit_modules.falcon_eye.guards import GuardFormat, OutputsJudge
from lit_modules.falcon_eye.judges import (
    READS,
    FeatureJudge,
    KeywordJudge,
    MajorityJudge,
    PersonJudge,
    SentenceFeatures,
)
from lit_modules.falcon_eye.vlm_judge import VLMJudge


class JudgeSource(ABC):
    """Where a judge comes from."""

    @abstractmethod
    def make(self, train: Sequence[SafetySample], val: Sequence[SafetySample]) -> Judge:
        """The judge, for data with these parts; both empty where there are none."""


@dataclass(frozen=True)
class Majority(JudgeSource):
    """Always says what is most frequent in the training part: the floor."""

    def make(self, train: Sequence[SafetySample], val: Sequence[SafetySample]) -> Judge:
        return MajorityJudge.fit(train)


@dataclass(frozen=True)
class Keyword(JudgeSource):
    """An answer is harmful unless it reads like a refusal."""

    def make(self, train: Sequence[SafetySample], val: Sequence[SafetySample]) -> Judge:
        return KeywordJudge()


@dataclass(frozen=True)
class Person(JudgeSource):
    """One of the people who labelled the samples: how far people agree, where another's labels are the truth.

    Args:
        person: a name in the samples' opinions; of XSTest ``annotation_1`` or ``annotation_2``.
    """

    person: str

    def make(self, train: Sequence[SafetySample], val: Sequence[SafetySample]) -> Judge:
        return PersonJudge.of(self.person, train)


@dataclass(frozen=True)
class FrozenFeatures(JudgeSource):
    """Logistic regression on frozen features of the texts, its strength chosen on validation data.

    Args:
        path: folder of an encoder of text, model and tokenizer in one, such as MiniLM.
        reads: what it may read: ``prompt``, ``answer``, ``both``, or ``any``, the best of these on validation data.
    """

    path: str
    reads: Literal["prompt", "answer", "both", "any"] = "any"

    def __post_init__(self) -> None:
        if self.reads not in (*READS, "any"):
            raise UserError(f"judge.reads: expected one of {', '.join(READS)}, any, got {self.reads!r}")

    def make(self, train: Sequence[SafetySample], val: Sequence[SafetySample]) -> Judge:
        reads = READS if self.reads == "any" else (self.reads,)
        return FeatureJudge.fit(train, SentenceFeatures(self.path), validation=val or None, reads=reads)


@dataclass(frozen=True)
class WrittenOutputs(JudgeSource):
    """A guard that has answered before.

    Args:
        format: ``llama_guard``, ``llava_guard`` or ``guard_reasoner_vl``.
        path: JSONL or CSV of its answers by the samples' ids.
    """

    format: GuardFormat
    path: str

    def make(self, train: Sequence[SafetySample], val: Sequence[SafetySample]) -> Judge:
        return OutputsJudge(self.format, self.path)


@dataclass(frozen=True)
class Model(JudgeSource):
    """A vision-language model that is asked as it is: from disk, or the result of another run.

    Args:
        path: run folder, checkpoint, exported folder, or any folder of a model.
        mode: ``generate``, it writes answers; ``score_only``, scores alone.
        batch_size: samples at a time.
    """

    path: str
    mode: Mode = "generate"
    batch_size: PositiveInt = 8

    def make(self, train: Sequence[SafetySample], val: Sequence[SafetySample]) -> Judge:
        return VLMJudge.from_source(Path(self.path), mode=self.mode, batch_size=self.batch_size)


class IndexEncoder:
    """Batches that say which samples they are and nothing else. Satisfies `leanlight.contracts.SampleEncoder`."""

    pad_id = 0

    def lengths(self, samples: Sequence[SafetySample], targets: bool) -> Tensor:
        """Zeros (N,): nothing is read of a sample here."""
        return torch.zeros(len(samples), dtype=torch.int64)

    def encode(self, samples: Sequence[SafetySample], index: Tensor, targets: bool) -> TokenBatch:
        """A batch of no tokens and no pictures."""
        empty = torch.zeros(len(samples), 0, dtype=torch.int64)
        grid = torch.zeros(len(samples), 3, dtype=torch.int64)
        return TokenBatch(
            empty, empty, empty if targets else None, empty, (torch.zeros(0, 0),) * len(samples), grid, index
        )
