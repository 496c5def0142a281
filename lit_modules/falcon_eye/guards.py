"""Answers that other guards have written to a file, as verdicts."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

from leanlight.contracts import SAFETY_FIELDS, SafetySample, UserError, Verdict, nearest, sha256_file
from lit_modules.falcon_eye.judges import digest
from lit_modules.falcon_eye.taxonomy import LLAMA_GUARD, LLAVA_GUARD, translated

GuardFormat = Literal["llama_guard", "llava_guard", "guard_reasoner_vl"]


def llama_guard(text: str, field: str = "response") -> Verdict:
    """Of Llama Guard: ``safe``, or ``unsafe`` and a line of codes such as ``S1,S10``.

    Args:
        text: what it wrote.
        field: that it was asked about.
    """
    lines = text.strip().splitlines() or [""]
    label = {"safe": False, "unsafe": True}.get(lines[0].strip(" .*").casefold())
    codes = re.findall(r"\bS\d{1,2}\b", " ".join(lines[1:]).upper()) if label else []
    return Verdict({field: label}, categories=translated(codes, LLAMA_GUARD), text=text)


def llava_guard(text: str, field: str = "image") -> Verdict:
    """Of LlavaGuard: a JSON object of ``rating`` (Safe, Unsafe), ``category`` (``O2: …``, ``NA: …``), ``rationale``.

    Args:
        text: what it wrote.
        field: that it was asked about.
    """
    try:
        answer = json.loads(text[text.find("{") : text.rfind("}") + 1])
    except (ValueError, RecursionError):
        return Verdict({field: None}, text=text)
    said = {key: str(answer.get(key, "")) for key in ("rating", "category", "rationale")}
    label = {"safe": False, "unsafe": True}.get(said["rating"].strip().casefold())
    codes = re.findall(r"\bO\d\b", said["category"].upper()) if label else []
    return Verdict({field: label}, categories=translated(codes, LLAVA_GUARD), explanation=said["rationale"], text=text)


def guard_reasoner_vl(text: str, field: str = "") -> Verdict:
    """Of GuardReasoner-VL: thoughts, then ``Request: harmful`` and ``Response: unharmful``, or None.

    Args:
        text: what it wrote.
        field: the only one to keep; both where it is empty.
    """
    thoughts, mark, result = text.rpartition("<result>") if "<result>" in text else text.rpartition("</think>")
    if not mark and "<think>" in text:  # cut off in its thoughts, which weigh both answers
        thoughts, result = text, ""
    labels: dict[str, bool | None] = {}
    for name, key in (("instruction", "Request"), ("response", "Response")):
        said = re.findall(rf"\b{key}\b[\s:*]+(harmful|unharmful)\b", result, re.IGNORECASE)
        labels[name] = said[-1].casefold() == "harmful" if said else None
    explanation = thoughts.replace("<think>", "").replace("</think>", "").strip()
    return Verdict({k: v for k, v in labels.items() if field in ("", k)}, explanation=explanation, text=text)


_READ: dict[str, Callable[..., Verdict]] = {
    "llama_guard": llama_guard,
    "llava_guard": llava_guard,
    "guard_reasoner_vl": guard_reasoner_vl,
}
_OUTPUT_OF = {"llama_guard": ("response",), "llava_guard": ("image",), "guard_reasoner_vl": ("instruction", "response")}


class OutputsJudge:
    """A guard that has answered before: its answers are read from a file, by the id of the sample.

    A row has ``id`` and ``output``; or, where the guard was asked about each part by itself as Llama Guard is,
    a column a field: ``instruction``, ``image``, ``response``. What is not of the format gives labels of None, and is
    counted in `malformed`; a sample without a row fails.

    Args:
        format: ``llama_guard``, ``llava_guard`` or ``guard_reasoner_vl``.
        path: of a JSONL or CSV file. UserError for one that is missing or has a bad row, which is named.
    """

    batch_size = 1024

    def __init__(self, format: GuardFormat, path: Path | str) -> None:
        if format not in get_args(GuardFormat):
            known = get_args(GuardFormat)
            raise UserError(f"format: expected one of {', '.join(known)}, got {format!r}{nearest(format, known)}")
        self.path, self.name = Path(path), str(format)
        self._verdicts: dict[str, Verdict] = {}
        fields: set[str] = set()
        for place, row in _rows(self.path):
            if str(row.get("id") or "") == "":
                raise UserError(f"{place}: expected an id")
            if str(row["id"]) in self._verdicts:
                raise UserError(f"{place}: id {row['id']!r} comes twice")
            asked = {key: str(row[key]) for key in ("output", *SAFETY_FIELDS) if row.get(key) not in (None, "")}
            if not asked and not {"output", *SAFETY_FIELDS} & row.keys():
                raise UserError(f"{place}: expected output, or {', '.join(SAFETY_FIELDS)}, got {', '.join(row)}")
            fields |= {name for key in asked for name in (_OUTPUT_OF[format] if key == "output" else (key,))}
            self._verdicts[str(row["id"])] = _joined([_of(format, key, text) for key, text in asked.items()])
        self.fields = tuple(name for name in SAFETY_FIELDS if name in fields)
        self.malformed = sum(all(label is None for label in v.labels.values()) for v in self._verdicts.values())
        self.fingerprint = digest(format, sha256_file(self.path))

    def judge(self, samples: Sequence[SafetySample]) -> list[Verdict]:
        lacking = dict.fromkeys(self.fields)
        absent = Verdict(lacking, failure=f"no answer in {self.path.name}")
        found = [self._verdicts.get(sample.id, absent) for sample in samples]
        return [Verdict(**{**vars(v), "labels": {**lacking, **v.labels}}) for v in found]


def _of(format: str, key: str, text: str) -> Verdict:
    return _READ[format](text) if key == "output" else _READ[format](text, key)


def _joined(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict of answers about several fields."""
    if len(verdicts) == 1:
        return verdicts[0]
    return Verdict(
        labels={name: label for v in verdicts for name, label in v.labels.items()},
        categories=tuple(dict.fromkeys(kind for v in verdicts for kind in v.categories)),
        explanation="\n".join(v.explanation for v in verdicts if v.explanation),
        text="\n".join(v.text for v in verdicts),
    )


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Rows of a file, each with its place for errors."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                csv.field_size_limit(sys.maxsize)  # answers may be long
                reader = csv.DictReader(file)
                for row in reader:
                    yield f"{path}, line {reader.line_num}", {k: v for k, v in row.items() if k is not None}
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _object(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a JSONL or CSV file of answers ({error})") from error


def _object(line: str, place: str) -> Mapping[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{place}: expected a JSON object")
    return row
