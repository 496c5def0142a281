"""The page of an audit: one file, no scripts, nothing loaded from elsewhere, pictures blurred until a click."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from leanlight.contracts.files import atomic_write
from leanlight.contracts.safety import HARM_CATEGORIES, SAFETY_FIELDS, Picture, UnreadablePictureError, Verdict
from leanlight.results import format as form
from leanlight.results.audit import HARMFUL, MISSING, Verdicts
from leanlight.results.audit_summary import Panel
from leanlight.results.page import style, template
from lit_modules.falcon_eye.backbone import as_utf8

SHOWN = 150  # samples in full, of those on which judges disagree and of the others
FAILURES = 50  # that are listed
PAGE_BYTES = 8 * 2**20  # of samples in full; more are left out
TEXT_LENGTH = 4_000  # characters of a text that are shown
SIDE = 320  # of a picture, in pixels
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_WORDS = {HARMFUL: "harmful", MISSING: "no verdict", 0: "benign"}


def write_page(
    path: Path, panel: Panel, verdicts: Verdicts, summary: Mapping[str, Any], troubles: Mapping[int, str]
) -> None:
    """Write the page.

    Args:
        path: of the page.
        panel: all verdicts.
        verdicts: with their texts.
        summary: of `summarise`, with what `describe` and `gate` add.
        troubles: row → what is wrong with its picture.
    """
    fields = [f for f in SAFETY_FIELDS if any(f in judge.fields for judge in panel.judges)]
    split = panel.disagreements()
    with verdicts.reading() as read:
        cards = _Cards(panel, fields, read, PAGE_BYTES)
        disputed, others = cards.take(split, SHOWN), cards.take(_others(panel), SHOWN)
        failures = _failures(panel, read)
    text = template("audit.html.j2").render(
        css=style("report.css", "audit.css"),
        s=summary,
        fields=fields,
        judges=[_judge(judge, fields) for judge in summary["judges"]],
        vote={field: _share(summary["vote"][field], summary["items"]) for field in fields},
        agreement={field: found for field in fields if (found := summary["agreement"][field])},
        accuracies=_accuracies(summary, fields),
        categories=_categories(panel, summary),
        sources=_sources(summary, fields),
        disputed=disputed,
        others=others,
        undisputed=len(panel.samples) - len(split),
        failures=failures,
        failed=sum(judge["failures"] for judge in summary["judges"]),
        troubles=[(row + 1, printable(panel.samples[row].id)[0], why) for row, why in [*troubles.items()][:FAILURES]],
        unreadable=len(troubles),
    )
    atomic_write(path, as_utf8(text))


# -- numbers


def _percent(value: float | None) -> str:
    return form.MISSING if value is None else f"{value:.1%}"


def _share(counts: Mapping[str, int], items: int) -> dict[str, Any]:
    """Share of harmful of all samples, as text and as a width; counts beside it."""
    share = counts["harmful"] / items
    return {"text": _percent(share), "width": f"{share:.1%}", "interval": "", **counts}


def _judge(judge: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """A judge with its share of harm in each field, None where it does not judge it."""
    shares: dict[str, Any] = {}
    for field in fields:
        counts = judge["fields"].get(field)
        shares[field] = counts and _share(counts, sum(counts.values()))
        if counts and (figure := judge["figures"].get(f"{field}_harmful_share")):
            shares[field]["interval"] = _interval(figure)
    return {**judge, "shares": shares}


def _interval(figure: Mapping[str, Any]) -> str:
    return "" if figure["low"] is None else f"{figure['low']:.1%} to {figure['high']:.1%}"


_FIGURES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "f1": "F1 of harmful",
    "auroc": "AUROC of scores",
}


def _accuracies(summary: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any] | None:
    """A row for each judge and labelled field with its figures; None without labels."""
    rows = []
    for judge in summary["judges"]:
        for field in fields:
            figures = {name: judge["figures"].get(f"{field}_{name}") for name in _FIGURES}
            if figures["accuracy"]:
                cells = [
                    {"text": _percent(f["value"]), "interval": _interval(f), "majority": _percent(f["majority"])}
                    if f
                    else None
                    for f in figures.values()
                ]
                rows.append({"judge": judge["name"], "field": field, "n": figures["accuracy"]["items"], "cells": cells})
    return {"heads": list(_FIGURES.values()), "rows": rows} if rows else None


def _categories(panel: Panel, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Kinds of harm that a judge or a label names, with how often, the most frequent first."""
    labelled = {name: sum(name in sample.categories for sample in panel.samples) for name in HARM_CATEGORIES}
    rows: list[dict[str, Any]] = []
    for name in HARM_CATEGORIES:
        counts = [judge["categories"][name] for judge in summary["judges"]]
        if any(counts) or labelled[name]:
            rows.append({"name": name, "counts": counts, "labelled": labelled[name]})
    most = max((count for row in rows for count in row["counts"]), default=0) or 1
    for row in rows:
        row["widths"] = [f"{count / most:.1%}" for count in row["counts"]]
    return sorted(rows, key=lambda row: -max(row["counts"]))


def _sources(summary: Mapping[str, Any], fields: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for name, by_field in summary["sources"].items():
        items = sum(by_field[fields[0]].values())
        shares = [_share(by_field[field], items) for field in fields]
        rows.append({"name": printable(name)[0] or "not named", "items": items, "shares": shares})
    return rows


# -- samples


def _others(panel: Panel) -> np.ndarray:
    """Rows on which no judges disagree: harmful answers first, then what else is harmful."""
    harmful = panel.vote == HARMFUL
    order = np.lexsort((~harmful.any(1), ~harmful[:, SAFETY_FIELDS.index("response")]))
    return order[~panel.split[order].any(1)]


@dataclass
class _Cards:
    """Samples in full, as long as there is room on the page."""

    panel: Panel
    fields: Sequence[str]
    read: Callable[[int], Verdict]
    room: int  # bytes of cards that fit in

    def take(self, rows: Iterable[int], most: int) -> list[Markup]:
        """Cards of the first rows."""
        cards: list[Markup] = []
        page = template("audit_card.html.j2")
        for row in [*rows][:most]:
            card = Markup(page.render(card=self._card(int(row)), fields=self.fields))  # its texts are escaped
            self.room -= len(as_utf8(card).encode())
            if self.room < 0:
                break
            cards.append(card)
        return cards

    def _card(self, row: int) -> dict[str, Any]:
        panel, sample = self.panel, self.panel.samples[row]
        places = [SAFETY_FIELDS.index(field) for field in self.fields]
        return {
            "number": row + 1,
            "id": printable(sample.id)[0],
            "facts": [text for text in (printable(sample.source)[0], printable(sample.topic)[0]) if text],
            "votes": [(field, _WORDS[panel.vote[row, k]], panel.split[row, k]) for field, k in self._placed(places)],
            "truth": [(field, _WORDS[panel.true[row, k]]) for field, k in self._placed(places)],
            "labelled": (panel.true[row] != MISSING).any(),
            "categories": sample.categories,
            "instruction": printable(sample.instruction),
            "response": printable(sample.response),
            "picture": thumbnail(sample.image) if sample.image else None,
            "verdicts": [self._verdict(position, row) for position in range(len(panel.judges))],
        }

    def _placed(self, places: Sequence[int]) -> list[tuple[str, int]]:
        return list(zip(self.fields, places, strict=True))

    def _verdict(self, position: int, row: int) -> dict[str, Any]:
        facts, column = self.panel.judges[position], self.panel.columns[position]
        verdict = self.read(int(column.offsets[row]))
        cells = []
        for field in self.fields:
            label = int(self.panel.said[position, row, SAFETY_FIELDS.index(field)])
            score = verdict.scores.get(field)
            words = _WORDS[label] if field in facts.fields else ""
            cells.append({"words": words, "score": "" if score is None else f"{score:.2f}"})
        return {
            "judge": facts.name,
            "cells": cells,
            "categories": verdict.categories,
            "explanation": printable(verdict.explanation),
            "text": printable(verdict.text),
            "refused": verdict.refused,
            "failure": printable(verdict.failure)[0],
        }


def _failures(panel: Panel, read: Callable[[int], Verdict]) -> list[dict[str, Any]]:
    """The first samples on which judges failed, with the reason."""
    found: list[dict[str, Any]] = []
    for facts, column in zip(panel.judges, panel.columns, strict=True):
        for row in np.flatnonzero(column.failed)[: FAILURES - len(found)].tolist():
            why, sample = read(int(column.offsets[row])).failure, panel.samples[row]
            place = {"number": row + 1, "id": printable(sample.id)[0]}
            found.append({**place, "judge": facts.name, "why": printable(why)[0]})
    return found


def printable(text: str, length: int = TEXT_LENGTH) -> tuple[str, int]:
    """The beginning of a text, and how many characters are left out.

    Control characters, halves of surrogates and what turns the direction of writing become replacement characters: they
    would show one text and hold another.
    """
    return _STEERING.sub("\N{REPLACEMENT CHARACTER}", text[:length]), max(len(text) - length, 0)


def thumbnail(picture: Picture) -> dict[str, Any]:
    """``uri``, ``width`` and ``height`` of a small JPEG of nothing but the pixels, or ``trouble``."""
    from PIL import Image

    try:
        image = Image.fromarray(picture.pixels().permute(1, 2, 0).numpy())
    except UnreadablePictureError as error:
        return {"name": printable(picture.name)[0], "trouble": printable(str(error))[0]}
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"name": printable(picture.name)[0], "trouble": "", "uri": uri, "width": image.width, "height": image.height}
