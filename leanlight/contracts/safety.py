"""Answers of models to people and pictures: a sample, a verdict on its parts, who gives one, and batches of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from leanlight.contracts.batch import Batch
from leanlight.contracts.errors import UserError
from leanlight.contracts.meta import DataMeta

#: What is judged of a sample, in the order in which judges write it down.
SAFETY_FIELDS = ("instruction", "image", "response")
#: The thirteen kinds of harm, in the order of the authors' evaluation.
HARM_CATEGORIES = (
    "Illegal Activity",
    "Violence and Physical Harm",
    "Hate Speech",
    "Malware",
    "Bias",
    "Economic Harm",
    "Fraud",
    "Abuse",
    "Politics",
    "Unethical Behavior",
    "Privacy Violation",
    "Adult Content",
    "Unlicensed Advice",
)
#: The label of a token that is not learned, as transformers has it.
IGNORED = -100


class UnreadablePictureError(UserError):
    """A picture that is missing, cut, too large or no picture; the text names it."""


@runtime_checkable
class Picture(Protocol):
    """A picture that is decoded when it is asked for."""

    @property
    def name(self) -> str:
        """How people find it: a file's name, or what it was made as."""

    @property
    def sha256(self) -> str:
        """Of its file's bytes, or of its pixels where it has no file. Raises UnreadablePictureError."""

    def pixels(self) -> Tensor:
        """(3, H, W) uint8 RGB, upright, on white where it was transparent. Raises UnreadablePictureError."""


@dataclass(frozen=True)
class SafetySample:
    """An instruction, perhaps with a picture, and the answer that a model gave.

    Args:
        id: unique in its set.
        instruction: q, what a person asked.
        response: a, what the model answered.
        image: v, None where there was none.
        labels: by field of `SAFETY_FIELDS`, whether it is harmful; what nobody labelled is absent.
        categories: names of `HARM_CATEGORIES`; empty where it is benign or not known.
        explanation: why, in words; may be empty.
        group: samples of one group (a prompt, a picture) belong to the same part of a split; empty: a group by itself.
        source: the model or set it comes from; may be empty.
        topic: a further partition, such as the kind of prompt; may be empty.
        opinions: by person who labelled it, labels that this person gave before all were settled; may be empty.
    """

    id: str
    instruction: str
    response: str
    image: Picture | None = None
    labels: Mapping[str, bool] = field(default_factory=dict)
    categories: tuple[str, ...] = ()
    explanation: str = ""
    group: str = ""
    source: str = ""
    topic: str = ""
    opinions: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a sample.

    Args:
        labels: by field that the judge judges, whether it is harmful; None: its answer does not say.
        scores: by field, P(harmful) in [0, 1], where the judge has one.
        categories: names of `HARM_CATEGORIES`.
        explanation: the judge's reason; may be empty.
        refused: whether the judge declined to answer.
        text: what the judge wrote, unchanged; empty for one that writes nothing.
        failure: why there is no answer (picture unreadable, endpoint down); empty where there is one.
    """

    labels: Mapping[str, bool | None]
    scores: Mapping[str, float] = field(default_factory=dict)
    categories: tuple[str, ...] = ()
    explanation: str = ""
    refused: bool = False
    text: str = ""
    failure: str = ""


class Judge(Protocol):
    """Whoever gives verdicts: a model, an endpoint, a rule, a file of answers."""

    #: How tables and pages call it.
    name: str
    #: The fields of `SAFETY_FIELDS` that it judges, in that order.
    fields: tuple[str, ...]
    #: sha256 of what decides its verdicts: weights, prompt, settings.
    fingerprint: str
    #: Samples that it likes to be given at a time.
    batch_size: int

    def judge(self, samples: Sequence[SafetySample]) -> list[Verdict]:
        """A verdict for each sample, in order. Trouble with one, such as its picture, is that verdict's failure."""


@dataclass(frozen=True)
class TokenBatch(Batch):
    """Samples as a vision-language model takes them; text is padded, pictures are ragged.

    Args:
        input_ids: (N, L) int64.
        attention_mask: (N, L) int64, 0 on padding.
        labels: (N, L) int64, the token to predict at each position as transformers has it (shifted inside the model),
            -100 where none counts; None without targets.
        token_types: (N, L) int64, 1 on placeholders of pictures, else 0.
        pixel_values: a sample, (P_i, 1176) float patches; (0, 1176) without a picture.
        grid: (N, 3) int64 frames, rows and columns of patches; zeros without a picture.
        index: (N,) int64 position of each sample in its split.
        learned: of the last positions, how many have logits that a loss on the labels needs; 0: all, or not known.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    token_types: Tensor
    pixel_values: tuple[Tensor, ...]
    grid: Tensor
    index: Tensor
    learned: int = 0


def learned_positions(labels: Tensor) -> int:
    """`TokenBatch.learned` of labels (N, L): the last positions, from the one before the first token learned.

    For whoever makes a batch: there labels are on the host, and later the host would have to wait for them.
    """
    learned = (labels != IGNORED).any(0)
    return labels.shape[1] - int(learned.to(torch.int8).argmax()) + 1 if bool(learned.any()) else 1


@dataclass(frozen=True, kw_only=True)
class SafetyMeta(DataMeta):
    """Facts of a set of samples.

    Args:
        fields: of `SAFETY_FIELDS`, those that have labels.
        pictures: samples with a picture, by split.
        harmful: by field, labelled samples that are harmful, by split: ``harmful["response"]["train"]``.
    """

    fields: tuple[str, ...]
    pictures: Mapping[str, int]
    harmful: Mapping[str, Mapping[str, int]]


@runtime_checkable
class SampleEncoder(Protocol):
    """Turns samples into batches of tokens; a module offers one to its DataModule as ``module.encoder``."""

    @property
    def pad_id(self) -> int:
        """Of the token that fills rows."""

    def lengths(self, samples: Sequence[SafetySample], targets: bool) -> Tensor:
        """(N,) int64 tokens that each sample takes, with or without its target, without padding."""

    def encode(self, samples: Sequence[SafetySample], index: Tensor, targets: bool) -> TokenBatch:
        """Samples as a batch: with targets padded on the right, for training; without on the left, to be continued.

        Args:
            samples: N of them.
            index: (N,) int64, their positions in the split.
            targets: whether the answers that a judge shall learn follow the prompts.
        """


@runtime_checkable
class SafetyData(Protocol):
    """A DataModule of answers to be judged: batches are `TokenBatch`."""

    meta: SafetyMeta

    def samples(self, split: str) -> Sequence[SafetySample]:
        """The samples of a part, by their index."""
        ...

    def texts(self) -> Iterable[str]:
        """All text of the training part, for a tokenizer of one's own."""
        ...
