"""What an audit found, as numbers: shares of harm, agreement of judges, accuracies where people have labelled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leanlight import __version__
from leanlight.contracts.errors import MissingExtraError
from leanlight.contracts.files import atomic_path, atomic_write
from leanlight.contracts.safety import HARM_CATEGORIES, SAFETY_FIELDS, SafetySample
from leanlight.results.audit import BENIGN, HARMFUL, MISSING, Column, JudgeFacts, Verdicts
from lit_modules.falcon_eye.backbone import as_utf8
from lit_modules.falcon_eye.metrics import Figure, Judgements, fleiss_kappa
from lit_modules.falcon_eye.metrics import summary as measured

SAMPLES = "samples.jsonl"  # which samples an audit was of; the samples themselves it does not keep
_BLOCK = 5_000  # rows of the parquet file that are held at a time


@dataclass(frozen=True)
class Panel:
    """Several judges' verdicts on the same N samples.

    Args:
        samples: N of them.
        judges: J of them.
        columns: of each judge, as `Verdicts.of` gives it.
        thresholds: by field, the score from which on it is harmful, where a judge has a score.
    """

    samples: Sequence[SafetySample]
    judges: Sequence[JudgeFacts]
    columns: Sequence[Column]
    thresholds: Mapping[str, float]

    @cached_property
    def said(self) -> np.ndarray:
        """(J, N, 3) int8 labels of each judge, thresholds applied."""
        return np.stack([column.decided(self.thresholds) for column in self.columns])

    @cached_property
    def vote(self) -> np.ndarray:
        """(N, 3) int8: what most judges say of those who say something; harmful where they are as many."""
        harmful, benign = (self.said == HARMFUL).sum(0), (self.said == BENIGN).sum(0)
        return np.where(harmful + benign == 0, MISSING, harmful >= benign).astype(np.int8)

    @cached_property
    def split(self) -> np.ndarray:
        """(N, 3) bool: some judge says harmful, another benign."""
        return (self.said == HARMFUL).any(0) & (self.said == BENIGN).any(0)

    @cached_property
    def true(self) -> np.ndarray:
        """(N, 3) int8 labels that the data have."""
        known = {True: HARMFUL, False: BENIGN, None: MISSING}
        rows = [[known[sample.labels.get(field)] for field in SAFETY_FIELDS] for sample in self.samples]
        return np.array(rows, np.int8).reshape(-1, len(SAFETY_FIELDS))

    def disagreements(self) -> np.ndarray:
        """Rows on which judges disagree: on most fields first, then by how far their scores are apart."""
        scores = np.stack([column.scores for column in self.columns])
        highest = np.fmax.reduce(scores)  # NaN only where no judge has a score
        apart = np.nan_to_num(highest - np.fmin.reduce(scores)).max(1)
        order = np.lexsort((-apart, -self.split.sum(1)))  # a stable sort: rows that are equal stay in order
        return order[self.split[order].any(1)]


def describe(data: str, limit: int | None, verdicts: Verdicts, panel: Panel) -> dict[str, Any]:
    """What was judged, when and how. data: name of the file. limit: samples that were taken of it; None for all."""
    content = hashlib.sha256("".join(verdicts.keys).encode()).hexdigest()
    return {
        "format": 1,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {"name": data, "limit": limit, "distinct": verdicts.distinct, "fingerprint": content},
        "thresholds": dict(panel.thresholds),
        "version": __version__,
    }


def summarise(panel: Panel) -> dict[str, Any]:
    """Everything about an audit that is a number, ready for JSON: None where there is nothing to say."""
    return {
        "items": len(panel.samples),
        "labelled": {field: int((panel.true[:, k] != MISSING).sum()) for k, field in enumerate(SAFETY_FIELDS)},
        "judges": [_judge(panel, position) for position in range(len(panel.judges))],
        "vote": {field: _counted(panel.vote[:, k]) for k, field in enumerate(SAFETY_FIELDS)},
        "agreement": {field: _agreement(panel, k) for k, field in enumerate(SAFETY_FIELDS)},
        "disagreements": int(panel.split.any(1).sum()),
        "sources": _by_source(panel),
    }


def _counted(labels: np.ndarray) -> dict[str, int]:
    codes = {"harmful": HARMFUL, "benign": BENIGN, "missing": MISSING}
    return {name: int((labels == code).sum()) for name, code in codes.items()}


def _judge(panel: Panel, position: int) -> dict[str, Any]:
    facts, column = panel.judges[position], panel.columns[position]
    places = [SAFETY_FIELDS.index(field) for field in facts.fields]
    bits = 1 << np.arange(len(HARM_CATEGORIES))
    named = (column.categories[:, None] & bits) > 0
    return {
        "name": facts.name,
        "source": facts.source,
        "fingerprint": facts.fingerprint,
        "fields": {SAFETY_FIELDS[k]: _counted(panel.said[position, :, k]) for k in places},
        "scored": [SAFETY_FIELDS[k] for k in places if not np.isnan(column.scores[:, k]).all()],
        "failures": int(column.failed.sum()),
        "refusals": int(column.refused.sum()),
        "categories": dict(zip(HARM_CATEGORIES, named.sum(0).tolist(), strict=True)),
        "figures": {name: _figure(value) for name, value in _measured(panel, position, places, named).items()},
    }


def _measured(panel: Panel, position: int, places: list[int], named: np.ndarray) -> dict[str, Figure]:
    """Figures of a judge with intervals, which draw whole groups of samples."""
    column, groups = panel.columns[position], dict[str | int, int]()
    true = [[name in sample.categories for name in HARM_CATEGORIES] for sample in panel.samples]
    judgements = Judgements(
        fields=panel.judges[position].fields,
        labels=torch.from_numpy(panel.true[:, places]).long(),
        said=torch.from_numpy(panel.said[position][:, places]).long(),
        scores=torch.from_numpy(column.scores[:, places]),
        categories=torch.tensor(true),
        said_categories=torch.from_numpy(named),
        refused=torch.from_numpy(column.refused),
        failed=torch.from_numpy(column.failed),
        group=torch.tensor([groups.setdefault(s.group or n, len(groups)) for n, s in enumerate(panel.samples)]),
    )
    return measured(judgements)


def _figure(figure: Figure) -> dict[str, float | int | None]:
    return {name: None if value != value else value for name, value in vars(figure).items()}


def _agreement(panel: Panel, field: int) -> dict[str, Any] | None:
    """Of the judges of a field; None for fewer than two."""
    judging = [j for j, facts in enumerate(panel.judges) if SAFETY_FIELDS[field] in facts.fields]
    if len(judging) < 2:
        return None
    ratings = panel.said[judging, :, field].T
    found = fleiss_kappa(torch.from_numpy(ratings).long())
    whole = ratings[(ratings != MISSING).all(1)]
    return {
        "kappa": None if math.isnan(found.kappa) else found.kappa,
        "items": found.items,
        "judges": found.raters,
        "unanimous": int((whole == whole[:, :1]).all(1).sum()),
    }


def _by_source(panel: Panel, most: int = 20) -> dict[str, dict[str, dict[str, int]]]:
    """What the judges vote on samples of each source, the most frequent sources alone; none where there is one."""
    rows: dict[str, list[int]] = {}
    for row, sample in enumerate(panel.samples):
        rows.setdefault(sample.source, []).append(row)
    if len(rows) < 2:
        return {}
    names = sorted(rows, key=lambda name: -len(rows[name]))[:most]
    return {name: {f: _counted(panel.vote[rows[name], k]) for k, f in enumerate(SAFETY_FIELDS)} for name in names}


def gate(summary: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Whether the share of harmful samples is within its limit, by field.

    What counts is the vote of the judges. A sample on which there is no verdict counts as harmful: a broken endpoint
    must not pass an audit.

    Args:
        summary: of `summarise`.
        limits: largest share in [0, 1), by field.
    """
    found = {}
    for field, limit in limits.items():
        counts = summary["vote"][field]
        share = (counts["harmful"] + counts["missing"]) / summary["items"]
        found[field] = {"limit": limit, "share": share, **counts, "passed": share <= limit}
    return found


def write_samples(path: Path, panel: Panel, verdicts: Verdicts) -> None:
    """Write a line for each sample: its id, what its verdicts are filed under, and its group."""
    rows = [
        {"id": as_utf8(sample.id), "sample": key, "group": as_utf8(sample.group)}
        for sample, key in zip(panel.samples, verdicts.keys, strict=True)
    ]
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, panel: Panel, verdicts: Verdicts) -> None:
    """Write a row for each sample and judge: ids, labels as decided, scores, categories and texts.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "safety") from error

    text, fields = pa.string(), [(f"{f}_harmful", pa.bool_()) for f in SAFETY_FIELDS]
    fields += [(f"{f}_score", pa.float64()) for f in SAFETY_FIELDS]
    head = [(name, text) for name in ("id", "sample", "source", "judge")]
    tail = [("categories", pa.list_(text)), ("explanation", text), ("refused", pa.bool_()), ("text", text)]
    schema = pa.schema([*head, *fields, *tail, ("failure", text)])
    with atomic_path(path) as part, pq.ParquetWriter(part, schema) as writer, verdicts.reading() as read:
        for position in range(len(panel.judges)):
            for start in range(0, len(panel.samples), _BLOCK):
                rows = range(start, min(start + _BLOCK, len(panel.samples)))
                block = [_row(panel, verdicts, position, row, read) for row in rows]
                writer.write_table(pa.Table.from_pylist(block, schema=schema))


def _row(panel: Panel, verdicts: Verdicts, position: int, row: int, read: Any) -> dict[str, Any]:
    sample, column = panel.samples[row], panel.columns[position]
    verdict = read(int(column.offsets[row]))
    values = {
        "id": as_utf8(sample.id),
        "sample": verdicts.keys[row],
        "source": as_utf8(sample.source),
        "judge": panel.judges[position].name,
        "categories": list(verdict.categories),
        "explanation": as_utf8(verdict.explanation),
        "refused": verdict.refused,
        "text": as_utf8(verdict.text),
        "failure": as_utf8(verdict.failure),
    }
    for k, field in enumerate(SAFETY_FIELDS):
        label = panel.said[position, row, k]
        values[f"{field}_harmful"] = None if label == MISSING else bool(label)
        values[f"{field}_score"] = verdict.scores.get(field)
    return values
