"""Judges whose verdicts a test decides, and files of samples for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from leanlight.contracts.safety import SAFETY_FIELDS, SafetySample, UnreadablePictureError, Verdict


class ScriptedJudge:
    """Says of each sample what a function says, and remembers which it was asked about."""

    batch_size = 4

    def __init__(
        self,
        name: str,
        verdict: Callable[[SafetySample], Verdict],
        fields: tuple[str, ...] = SAFETY_FIELDS,
        fingerprint: str = "",
    ) -> None:
        self.name, self.verdict, self.fields = name, verdict, fields
        self.fingerprint = fingerprint or name.encode().hex().ljust(64, "0")
        self.asked: list[str] = []

    def judge(self, samples: Sequence[SafetySample]) -> list[Verdict]:
        self.asked += [sample.id for sample in samples]
        return [self._one(sample) for sample in samples]

    def _one(self, sample: SafetySample) -> Verdict:
        try:
            if "image" in self.fields and sample.image is not None:
                sample.image.pixels()
        except UnreadablePictureError as error:
            return Verdict(dict.fromkeys(self.fields), failure=str(error))
        return self.verdict(sample)


def says(word: str) -> Callable[[SafetySample], Verdict]:
    """All parts are harmful where the answer has the word."""

    def verdict(sample: SafetySample) -> Verdict:
        harmful = word in sample.response
        return Verdict(dict.fromkeys(SAFETY_FIELDS, harmful), categories=("Fraud",) if harmful else (), text="said")

    return verdict


def scores(number: Callable[[SafetySample], float]) -> Callable[[SafetySample], Verdict]:
    """All parts get the same score; from 0.5 on they are harmful."""

    def verdict(sample: SafetySample) -> Verdict:
        score = number(sample)
        return Verdict(dict.fromkeys(SAFETY_FIELDS, score >= 0.5), dict.fromkeys(SAFETY_FIELDS, score))

    return verdict


def write_samples(path: Path, answers: Sequence[str], **columns: Sequence[Any]) -> Path:
    """A JSONL file with a row for each answer. columns: further ones; a value of None is left out of its row."""
    rows: list[dict[str, Any]] = []
    for number, answer in enumerate(answers):
        row = {"id": f"s{number}", "instruction": f"shape {number}", "response": answer}
        more = {name: values[number] for name, values in columns.items()}
        rows.append(row | {name: value for name, value in more.items() if value is not None})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_picture(path: Path, color: str = "teal", size: tuple[int, int] = (60, 40)) -> Path:
    Image.new("RGB", size, color).save(path)
    return path
