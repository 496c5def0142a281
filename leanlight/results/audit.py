"""Verdicts of an audit on disk: appended as they come, found again after a kill, counted without their texts."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from leanlight.contracts.errors import UserError
from leanlight.contracts.safety import (
    HARM_CATEGORIES,
    SAFETY_FIELDS,
    Judge,
    SafetySample,
    SampleEncoder,
    UnreadablePictureError,
    Verdict,
)

HARMFUL, BENIGN, MISSING = 1, 0, -1  # codes of a label
_CATEGORY_BITS = {name: 1 << bit for bit, name in enumerate(HARM_CATEGORIES)}


def sample_key(sample: SafetySample) -> tuple[str, str]:
    """What a verdict on the sample is filed under, and what is wrong with its picture, empty for nothing.

    The key is the sha256 of instruction, answer and picture in hex digits. A picture that cannot be read counts by its
    name, so that one put in its place is judged anew.
    """
    picture = trouble = ""
    if sample.image is not None:
        try:
            picture = sample.image.sha256
        except UnreadablePictureError as error:
            picture, trouble = f"unreadable: {sample.image.name}", str(error)
    digest = hashlib.sha256()
    for part in (sample.instruction, sample.response, picture):
        content = part.encode("utf-8", "surrogatepass")  # JSON may hold half of a pair
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest(), trouble


class VerdictFile:
    """``verdicts.jsonl``: a line a verdict, appended in whole batches that are on disk when `append` returns.

    Args:
        path: of the file; it and its folder are made on the first `append`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Number, offset and content of each line; a last line that a kill has cut is removed from the file.

        Raises:
            UserError: a line before the last is no JSON object.
        """
        if not self.path.is_file():
            return
        offset = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    os.truncate(self.path, offset)
                    return
                try:
                    record = dict(json.loads(line))
                except (ValueError, TypeError):
                    raise UserError(f"{self.path}, line {number}: damaged; remove that line to go on") from None
                yield number, offset, record
                offset += len(line)

    def append(self, records: Sequence[Mapping[str, Any]]) -> list[int]:
        """Write a line for each record; return the lines' offsets."""
        lines = [json.dumps(record).encode() + b"\n" for record in records]  # ASCII: no text can break a line
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            start = file.tell()
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
        return [start, *(start + np.cumsum([len(line) for line in lines[:-1]])).tolist()]

    @contextmanager
    def reading(self) -> Iterator[Callable[[int], dict[str, Any]]]:
        """A function that gives the record at an offset."""
        with open(self.path, "rb") as file:

            def read(offset: int) -> dict[str, Any]:
                file.seek(offset)
                return dict(json.loads(file.readline()))

            yield read


class Column:
    """What one judge says of N samples, without texts.

    Attributes:
        labels: (N, 3) int8 by `SAFETY_FIELDS`: `HARMFUL`, `BENIGN` or `MISSING`.
        scores: (N, 3) float64 P(harmful), NaN where there is none.
        categories: (N,) uint16, a bit for each of `HARM_CATEGORIES`.
        refused: (N,) bool.
        failed: (N,) bool.
        offsets: (N,) int64 of the verdict in its file, -1 where there is none.
    """

    def __init__(self, size: int) -> None:
        self.labels = np.full((size, len(SAFETY_FIELDS)), MISSING, np.int8)
        self.scores = np.full((size, len(SAFETY_FIELDS)), np.nan, np.float64)
        self.categories = np.zeros(size, np.uint16)
        self.refused = np.zeros(size, bool)
        self.failed = np.zeros(size, bool)
        self.offsets = np.full(size, -1, np.int64)

    def note(self, row: int, offset: int, verdict: Verdict) -> None:
        """Take the verdict on a sample, in place of an earlier one."""
        known = {True: HARMFUL, False: BENIGN, None: MISSING}
        self.labels[row] = [known[verdict.labels.get(field)] for field in SAFETY_FIELDS]
        self.scores[row] = [verdict.scores.get(field, np.nan) for field in SAFETY_FIELDS]
        self.categories[row] = sum(_CATEGORY_BITS[name] for name in set(verdict.categories))
        self.refused[row], self.failed[row], self.offsets[row] = verdict.refused, bool(verdict.failure), offset

    def take(self, rows: np.ndarray) -> Column:
        """The column of other samples, which are these in another order or several times."""
        other = Column(0)
        for name, values in vars(self).items():
            setattr(other, name, values[rows])
        return other

    def decided(self, thresholds: Mapping[str, float]) -> np.ndarray:
        """(N, 3) int8 labels; those of a field with a threshold follow from the score where there is one."""
        labels = self.labels.copy()
        for name, threshold in thresholds.items():
            field = SAFETY_FIELDS.index(name)
            scores = self.scores[:, field]
            labels[:, field] = np.where(np.isnan(scores), labels[:, field], scores >= threshold)
        return labels


@dataclass(frozen=True)
class JudgeFacts:
    """A judge when it is no longer in memory.

    Args:
        name: how tables call it; unique in an audit.
        source: what the user named, without keys.
        fields: that it judges.
        fingerprint: sha256 of what decides its verdicts.
    """

    name: str
    source: str
    fields: tuple[str, ...]
    fingerprint: str


class Verdicts:
    """The verdicts on a list of samples, by judge. Equal samples have one verdict, which is asked for once.

    Args:
        path: of ``verdicts.jsonl``; what it holds of these samples is taken over, other lines are left alone.
        keys: `sample_key` of each sample.
    """

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        self.file, self.keys = VerdictFile(path), keys
        self._row: dict[str, int] = {}
        self._same = np.array([self._row.setdefault(key, row) for row, key in enumerate(keys)], np.int64)
        self._columns: dict[tuple[str, str], Column] = {}
        for number, offset, record in self.file.records():
            try:
                row = self._row.get(record["sample"])
                if row is not None:
                    self._column(record["judge"], record["fingerprint"]).note(row, offset, _verdict(record))
            except (KeyError, TypeError, ValueError):
                raise UserError(f"{path}, line {number}: no verdict; remove that line to go on") from None

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def distinct(self) -> int:
        """Samples that differ."""
        return len(self._row)

    def _column(self, name: str, fingerprint: str) -> Column:
        if (name, fingerprint) not in self._columns:
            self._columns[name, fingerprint] = Column(len(self.keys))
        return self._columns[name, fingerprint]

    def pending(self, judge: Judge) -> list[int]:
        """First row of each sample that the judge has not judged; one on which it failed is asked again."""
        column = self._column(judge.name, judge.fingerprint)
        asked = (column.offsets >= 0) & ~column.failed
        return [row for row in self._row.values() if not asked[row]]

    def add(self, judge: Judge, rows: Sequence[int], samples: Sequence[SafetySample], found: Sequence[Verdict]) -> None:
        """Keep the verdicts on some rows, on disk first."""
        facts = {"judge": judge.name, "fingerprint": judge.fingerprint}
        records = [
            {"sample": self.keys[row], **facts, "id": sample.id, **asdict(verdict)}
            for row, sample, verdict in zip(rows, samples, found, strict=True)
        ]
        column = self._column(judge.name, judge.fingerprint)
        for row, offset, verdict in zip(rows, self.file.append(records), found, strict=True):
            column.note(row, offset, verdict)

    def of(self, name: str, fingerprint: str) -> Column:
        """A judge's column, a row for every sample of the list. name: the judge's own."""
        return self._column(name, fingerprint).take(self._same)

    @contextmanager
    def reading(self) -> Iterator[Callable[[int], Verdict]]:
        """A function that gives the verdict at an offset of a column, texts and all."""
        with self.file.reading() as read:
            yield lambda offset: _verdict(read(offset))


def _verdict(record: Mapping[str, Any]) -> Verdict:
    names = ("labels", "scores", "explanation", "refused", "text", "failure")
    return Verdict(**{name: record[name] for name in names}, categories=tuple(record["categories"]))


def ask(
    judge: Judge,
    samples: Sequence[SafetySample],
    verdicts: Verdicts,
    rows: Sequence[int],
    batch: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> None:
    """Let a judge judge some samples; what it has said is on disk after each batch.

    Args:
        judge: to be asked.
        samples: all of the audit.
        verdicts: where its verdicts go.
        rows: of the samples to judge.
        batch: samples at a time, by default as many as the judge likes.
        advance: told after each batch how many it had.
    """
    size = batch or judge.batch_size
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        given = [samples[row] for row in some]
        verdicts.add(judge, some, given, judge.judge(given))
        advance(len(some))


@runtime_checkable
class Limited(Protocol):
    """A judge that keeps to limits: of requests at a time, of time, of what it spends."""

    def limits(self, samples: int, tokens: int | None) -> str:
        """What they are, and for how many of so many samples, with so many tokens, they are enough; in words."""


@dataclass(frozen=True)
class Estimate:
    """What a judge has before it.

    Args:
        judge: its name.
        pending: samples that it has not judged.
        tokens: that it would read on them, or has used on a few, where it can say.
        seconds: that it would take, from a few that it has judged for this.
        limits: what it keeps to meanwhile, in words; empty for nothing.
    """

    judge: str
    pending: int
    tokens: int | None
    seconds: float
    limits: str


def estimate(
    judge: Judge,
    samples: Sequence[SafetySample],
    verdicts: Verdicts,
    batch: int | None = None,
    judged: int = 16,
    read: int = 256,
) -> Estimate:
    """Let a judge judge a few samples, whose verdicts are kept, and say what the others would take.

    Args:
        judge: to be asked.
        samples: all of the audit.
        verdicts: where its verdicts go.
        batch: samples at a time, by default as many as the judge likes.
        judged: samples, spread over those that are left, whose time is taken.
        read: samples, likewise, whose tokens are counted.
    """
    rows = verdicts.pending(judge)
    lengths = [length for row in _spread(rows, read) if (length := _tokens(judge, samples[row])) is not None]
    some = _spread(rows, judged)
    begin = time.perf_counter()
    ask(judge, samples, verdicts, some, batch)
    seconds = time.perf_counter() - begin
    left = len(rows) - len(some)
    used = getattr(judge, "tokens", 0)  # of an endpoint, which counts them itself
    a_sample = sum(lengths) / len(lengths) if lengths else used / max(len(some), 1)
    tokens = round(left * a_sample) if a_sample else None
    return Estimate(
        judge=judge.name,
        pending=left,
        tokens=tokens,
        seconds=seconds / max(len(some), 1) * left,
        limits=judge.limits(left, tokens) if isinstance(judge, Limited) else "",
    )


def _spread(rows: Sequence[int], number: int) -> list[int]:
    return [rows[position] for position in np.linspace(0, len(rows) - 1, min(number, len(rows))).round().astype(int)]


def _tokens(judge: Judge, sample: SafetySample) -> int | None:
    encoder = getattr(judge, "encoder", None)
    if not isinstance(encoder, SampleEncoder):
        return None
    try:
        return int(encoder.lengths([sample], False).sum())
    except UnreadablePictureError:
        return None
