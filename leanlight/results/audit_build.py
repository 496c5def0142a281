"""Data to train on from an audit: what judges agree on becomes labels, the rest goes to people.

After the construction of Falcon (arXiv:2509.23783) as far as it is known: judges vote on each part, ties go to people,
the kind of harm and the reason are those of judges whose verdict is that of the vote, near duplicates are left out, and
the parts of the split share no picture. Its numbers and thresholds are not published; those here are ours.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from datamodules.safety.files import write_samples
from datamodules.safety.splits import deal
from leanlight.contracts.files import atomic_write
from leanlight.contracts.safety import SAFETY_FIELDS, Picture, SafetySample, UnreadablePictureError, Verdict
from leanlight.results.audit import BENIGN, HARMFUL, MISSING, Verdicts
from leanlight.results.audit_summary import Panel

SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
NEAR = 4  # bits of 64 in which the hashes of like pictures differ at most
_AT_ONCE = 2**24  # pairs of hashes that are compared together


@dataclass(frozen=True)
class Built:
    """What becomes of the samples of an audit.

    Args:
        labelled: samples with the labels of the vote, each with its part.
        queue: samples on which judges leave a part open, with the labels of the other parts.
        notes: by id of a sample of the queue, its ``open`` parts and how many judges said what.
        duplicates: ids of samples that are left out, each with that of the one that stays.
        unreadable: ids of samples whose picture cannot be read; they are left out.
    """

    labelled: Sequence[tuple[SafetySample, str]]
    queue: Sequence[SafetySample]
    notes: Mapping[str, Mapping[str, Any]]
    duplicates: Mapping[str, str]
    unreadable: Sequence[str]


def build(panel: Panel, verdicts: Verdicts, agree: float = 0.5, seed: int = 0) -> Built:
    """Make labels of the judges' verdicts, leave near duplicates out, and split by picture.

    Args:
        panel: all verdicts.
        verdicts: with their texts.
        agree: a label stands where more than this share of a part's judges say it, in [0.5, 1).
        seed: of the split.
    """
    labels = settled(panel, agree)
    hashes, unreadable = _hashed(panel.samples)
    groups, gone = like_pictures(hashes), set(unreadable)
    kept: dict[tuple[str, ...], int] = {}
    duplicates: dict[str, str] = {}
    samples: list[SafetySample] = []
    queue: list[SafetySample] = []
    notes: dict[str, dict[str, Any]] = {}
    with verdicts.reading() as read:
        for row, (sample, group) in enumerate(zip(panel.samples, groups, strict=True)):
            if sample.id in gone:
                continue
            key = (group, *(" ".join(text.casefold().split()) for text in (sample.instruction, sample.response)))
            if kept.setdefault(key, row) != row:
                duplicates[sample.id] = panel.samples[kept[key]].id
                continue
            judged = [k for k, name in enumerate(SAFETY_FIELDS) if _is_judged(panel, sample, name)]
            known = {SAFETY_FIELDS[k]: labels[row, k] == HARMFUL for k in judged if labels[row, k] != MISSING}
            made = replace(sample, labels={name: bool(label) for name, label in known.items()}, categories=())
            made = replace(made, explanation="", group=group or sample.group)
            if len(known) < len(judged):
                queue.append(made)
                notes[sample.id] = _open(panel, row, [k for k in judged if labels[row, k] == MISSING])
            else:
                agreeing = [j for j in range(len(panel.judges)) if _agrees(panel, j, row, labels[row], judged)]
                samples.append(_explained(made, [read(int(panel.columns[j].offsets[row])) for j in agreeing]))
    parts = deal(samples, "group", list(SHARES.values()), seed, "build")
    dealt = [(sample, [*SHARES][part]) for sample, part in zip(samples, parts.tolist(), strict=True)]
    return Built(dealt, queue, notes, duplicates, unreadable)


def settled(panel: Panel, agree: float) -> np.ndarray:
    """(N, 3) int8 labels that more than a share `agree` of the judges of that part give, else `MISSING`."""
    judges = np.array([[name in judge.fields for name in SAFETY_FIELDS] for judge in panel.judges]).sum(0)
    harmful, benign = ((panel.said == label).sum(0) > agree * judges for label in (HARMFUL, BENIGN))
    return np.where(harmful, HARMFUL, np.where(benign, BENIGN, MISSING)).astype(np.int8)


def _is_judged(panel: Panel, sample: SafetySample, field: str) -> bool:
    return any(field in judge.fields for judge in panel.judges) and (field != "image" or sample.image is not None)


def _agrees(panel: Panel, judge: int, row: int, labels: np.ndarray, judged: Sequence[int]) -> bool:
    """Whether a judge says what the vote says, of all parts that it judges."""
    own = [k for k in judged if SAFETY_FIELDS[k] in panel.judges[judge].fields]
    return bool((panel.said[judge, row, own] == labels[own]).all())


def _open(panel: Panel, row: int, fields: Sequence[int]) -> dict[str, Any]:
    said = panel.said[:, row]
    votes = {
        SAFETY_FIELDS[k]: {
            "harmful": int((said[:, k] == HARMFUL).sum()),
            "benign": int((said[:, k] == BENIGN).sum()),
        }
        for k in fields
    }
    return {"open": list(votes), "votes": votes}


def _explained(sample: SafetySample, agreeing: Sequence[Verdict]) -> SafetySample:
    """With the kind of harm that most agreeing judges name, and the first reason that one of them gives."""
    kinds = Counter(kind for verdict in agreeing for kind in verdict.categories)
    reason = next((verdict.explanation for verdict in agreeing if verdict.explanation), "")
    most = [kind for kind, _ in kinds.most_common(1)] if any(sample.labels.values()) else []
    return replace(sample, categories=tuple(most), explanation=reason)


# ---- like pictures ----


def _hashed(samples: Sequence[SafetySample]) -> tuple[list[np.uint64 | None], list[str]]:
    """The hash of each sample's picture, None without one, and ids of those whose picture cannot be read."""
    hashes: list[np.uint64 | None] = []
    unreadable = []
    for sample in samples:
        try:
            hashes.append(None if sample.image is None else difference_hash(sample.image))
        except UnreadablePictureError:
            hashes.append(None)
            unreadable.append(sample.id)
    return hashes, unreadable


def like_pictures(hashes: Sequence[np.uint64 | None]) -> list[str]:
    """The name of a group for each hash, the same for those that differ in `NEAR` bits at most, or by way of others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    known, place = np.unique([one for one in hashes if one is not None], return_inverse=True)
    known, pairs = known.astype(np.uint64), [np.empty((0, 2), np.int64)]
    step = max(_AT_ONCE // max(len(known), 1), 1)
    for start in range(0, len(known), step):
        near = np.bitwise_count(known[start : start + step, None] ^ known[None]) <= NEAR
        pairs.append(np.argwhere(near) + np.array([start, 0]))
    one, other = np.concatenate(pairs).T
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(known),) * 2)
    group = iter(connected_components(graph, directed=False)[1][place].tolist() if len(known) else [])
    return ["" if found is None else f"picture {next(group)}" for found in hashes]


def difference_hash(picture: Picture) -> np.uint64:
    """64 bits that change little with size and coding: whether each of 8 x 8 spots is brighter than its right one."""
    grey = picture.pixels().float().mean(0)[None, None]
    small = F.interpolate(grey, (8, 9), mode="bilinear", antialias=True)[0, 0]
    bits = (small[:, :-1] > small[:, 1:]).flatten().to(torch.uint8).numpy()
    return np.packbits(bits).view(">u8").astype(np.uint64)[0]


# ---- files ----


def write_built(folder: Path, built: Built) -> dict[str, Any]:
    """Write ``data`` and ``queue``, tables with pictures, and ``build.json``; its content.

    Raises:
        UserError: other data are there.
    """
    if built.labelled:
        write_samples(built.labelled, folder / "data")
    if built.queue:
        write_samples([(sample, "queue") for sample in built.queue], folder / "queue", built.notes)
    told = {
        "parts": {part: sum(own == part for _, own in built.labelled) for part in SHARES},
        "queue": len(built.queue),
        "duplicates": dict(built.duplicates),
        "unreadable": list(built.unreadable),
    }
    atomic_write(folder / "build.json", json.dumps(told, indent=2) + "\n")
    return told
