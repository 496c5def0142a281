"""Two audits beside each other: which verdicts have changed, and how far shares of harm have moved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leanlight import __version__
from leanlight.contracts.errors import UserError
from leanlight.contracts.files import atomic_write
from leanlight.contracts.safety import SAFETY_FIELDS
from leanlight.results import format as form
from leanlight.results.audit import BENIGN, HARMFUL, MISSING, JudgeFacts, Verdicts
from leanlight.results.audit_page import printable
from leanlight.results.audit_summary import SAMPLES, Panel
from leanlight.results.page import style, template
from lit_modules.falcon_eye.backbone import as_utf8
from lit_modules.falcon_eye.metrics import fleiss_kappa, group_draws

VOTE = "vote of all"  # how tables call what most judges say
SHOWN = 300  # changes on the page
_RESAMPLES = 1000  # draws of the bootstrap
_WORDS = {HARMFUL: "harmful", BENIGN: "benign", MISSING: "no verdict"}


@dataclass(frozen=True)
class Audit:
    """An audit that has ended, as its folder holds it.

    Args:
        name: of the folder.
        summary: its ``summary.json``.
        samples: of each, in order, its ``id``, ``sample`` (what verdicts are filed under) and ``group``.
        panel: its verdicts, without the samples themselves, which no audit keeps.
        verdicts: with their texts.
    """

    name: str
    summary: Mapping[str, Any]
    samples: Sequence[Mapping[str, str]]
    panel: Panel
    verdicts: Verdicts

    @classmethod
    def read(cls, folder: Path) -> Audit:
        """Read a folder; UserError for one that holds no audit, or one that has not ended."""
        try:
            summary = json.loads((folder / "summary.json").read_text("utf-8"))
            samples = [json.loads(line) for line in (folder / SAMPLES).read_text("utf-8").splitlines()]
            verdicts = Verdicts(folder / "verdicts.jsonl", [sample["sample"] for sample in samples])
            judges = [
                JudgeFacts(judge["name"], judge["source"], tuple(judge["fields"]), judge["fingerprint"])
                for judge in summary["judges"]
            ]
            thresholds = dict(summary["thresholds"])
        except OSError as error:
            lacking = Path(error.filename or folder).name
            raise UserError(
                f"--compare: expected the folder of an audit that has ended, {folder} lacks {lacking}; the command "
                "that made it writes it anew, and asks nothing twice"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--compare: {folder} holds no audit ({type(error).__name__}: {error})") from error
        # Judges of one name have a part of their fingerprint behind it.
        columns = [verdicts.of(one.name.removesuffix(f" ({one.fingerprint[:6]})"), one.fingerprint) for one in judges]
        return cls(folder.resolve().name, summary, samples, Panel([], judges, columns, thresholds), verdicts)

    @property
    def voices(self) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
        """By name of each judge, and of the vote of all, the fields that are judged and (N, 3) int8 labels."""
        judges = self.panel.judges
        all_fields = tuple(f for f in SAFETY_FIELDS if any(f in judge.fields for judge in judges))
        return {VOTE: (all_fields, self.panel.vote)} | {
            judge.name: (judge.fields, said) for judge, said in zip(judges, self.panel.said, strict=True)
        }


class Comparison:
    """Two audits, and which of their samples are the same by id.

    Args:
        before: the earlier audit.
        after: the later one.

    Attributes: ``rows``, (M, 2) int64, of each sample that both have its rows in both, in the later one's order.
    """

    def __init__(self, before: Audit, after: Audit) -> None:
        self.before, self.after = before, after
        place = {sample["id"]: row for row, sample in enumerate(before.samples)}
        pairs = [(place[s["id"]], row) for row, s in enumerate(after.samples) if s["id"] in place]
        self.rows = np.array(pairs, np.int64).reshape(-1, 2)

    @property
    def rewritten(self) -> np.ndarray:
        """(M,) bool, where the sample itself has changed: its instruction, its answer or its picture."""
        keys = [(self.before.samples[a]["sample"], self.after.samples[b]["sample"]) for a, b in self.rows.tolist()]
        return np.array([one != other for one, other in keys], bool)

    def shared(self) -> Iterator[tuple[str, str, np.ndarray]]:
        """Name of each judge that both have, field, and (M, 2) int8 labels before and after; the vote first.

        Where both have one judge, and the same, the vote would only repeat it.
        """
        earlier, later = self.before.voices, self.after.voices
        if len(earlier) == 2 and earlier.keys() == later.keys():
            del earlier[VOTE]
        for name, (fields, said) in earlier.items():
            for field in fields:
                if name in later and field in later[name][0]:
                    k = SAFETY_FIELDS.index(field)
                    yield name, field, np.stack([said[self.rows[:, 0], k], later[name][1][self.rows[:, 1], k]], 1)

    def summarise(self) -> dict[str, Any]:
        """All that is a number, ready for JSON."""
        later = [self.after.samples[row] for row in self.rows[:, 1].tolist()]
        numbers: dict[str, int] = {}
        group = np.array([numbers.setdefault(s["group"] or f"\0{s['id']}", len(numbers)) for s in later], np.int64)
        matched = {sample["id"] for sample in later}
        names = [[judge.name for judge in audit.panel.judges] for audit in (self.before, self.after)]
        prints = [{j.name: j.fingerprint for j in audit.panel.judges} for audit in (self.before, self.after)]
        return {
            "format": 1,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "before": _facts(self.before),
            "after": _facts(self.after),
            "samples": {
                "both": len(self.rows),
                "rewritten": int(self.rewritten.sum()),
                "new": [sample["id"] for sample in self.after.samples if sample["id"] not in matched],
                "absent": [sample["id"] for sample in self.before.samples if sample["id"] not in matched],
            },
            "judges": {
                "changed": [name for name in names[0] if name in prints[1] and prints[0][name] != prints[1][name]],
                "before_only": [name for name in names[0] if name not in names[1]],
                "after_only": [name for name in names[1] if name not in names[0]],
            },
            "figures": [{"judge": name, "field": field, **paired(said, group)} for name, field, said in self.shared()],
        }

    def changes(self) -> Iterator[dict[str, Any]]:
        """Every verdict that is another one now: ``id``, ``judge``, ``field``, ``before``, ``after``, ``rewritten``."""
        rewritten = self.rewritten
        for name, field, said in self.shared():
            for row in np.flatnonzero(said[:, 0] != said[:, 1]).tolist():
                yield {
                    "id": self.after.samples[int(self.rows[row, 1])]["id"],
                    "judge": name,
                    "field": field,
                    "before": _WORDS[int(said[row, 0])],
                    "after": _WORDS[int(said[row, 1])],
                    "rewritten": bool(rewritten[row]),
                }


def _facts(audit: Audit) -> dict[str, Any]:
    summary = audit.summary
    return {
        "name": audit.name,
        "data": summary["data"]["name"],
        "date": summary["date"],
        "items": len(audit.samples),
        "thresholds": dict(summary["thresholds"]),
    }


def paired(said: np.ndarray, group: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """How the verdicts of two audits on the same samples compare; None where nothing can be said.

    Shares and agreement are of the samples that have a verdict in both. The interval of the difference is that of a
    paired bootstrap over groups.

    Args:
        said: (M, 2) labels before and after.
        group: (M,) int64, the same for samples that are drawn together.
        seed: of the draws.

    Returns:
        ``items``; ``before`` and ``after``, shares of harm; ``difference`` of after and before, its 95 % interval
        ``low`` to ``high``; ``agreement``, share of equal verdicts; ``kappa``, Fleiss' of both; numbers of samples that
        turned ``to_harmful`` and ``to_benign``, and of those whose verdict was ``lost`` or ``gained``.
    """
    known = (said != MISSING).all(1)
    was, now = (said[known] == HARMFUL).T
    found: dict[str, Any] = {
        "items": int(known.sum()),
        "to_harmful": int((~was & now).sum()),
        "to_benign": int((was & ~now).sum()),
        "lost": int(((said[:, 0] != MISSING) & (said[:, 1] == MISSING)).sum()),
        "gained": int(((said[:, 0] == MISSING) & (said[:, 1] != MISSING)).sum()),
    }
    if not known.any():
        return found | dict.fromkeys(("before", "after", "difference", "low", "high", "agreement", "kappa"))
    low, high = _interval(now.astype(np.int64) - was, group[known], seed)
    kappa = fleiss_kappa(torch.from_numpy(said[known]).long()).kappa
    return found | {
        "before": float(was.mean()),
        "after": float(now.mean()),
        "difference": float(now.mean() - was.mean()),
        "low": low,
        "high": high,
        "agreement": float((was == now).mean()),
        "kappa": kappa if kappa == kappa else None,
    }


def _interval(change: np.ndarray, group: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean of `change` (n,), when groups are drawn with replacement."""
    place, moved = (torch.from_numpy(a) for a in (np.unique(group, return_inverse=True)[1], change.astype(np.float64)))
    means = torch.cat([times @ moved / times.sum(1) for times in group_draws(place, _RESAMPLES, seed)])
    low, high = np.quantile(means.numpy(), (0.025, 0.975))
    return float(low), float(high)


def write_comparison(folder: Path, comparison: Comparison, summary: Mapping[str, Any]) -> Path:
    """Write ``compare.json``, ``changes.jsonl`` and ``compare.html`` into a folder; the page."""
    changes = list(comparison.changes())
    atomic_write(folder / "compare.json", json.dumps(summary, indent=2) + "\n")
    atomic_write(folder / "changes.jsonl", "".join(json.dumps(change) + "\n" for change in changes))
    # Those of the vote before those of judges, in which they are found again; what has become harmful first.
    order = sorted(changes, key=lambda one: (one["judge"] != VOTE, one["after"] != "harmful"))
    text = template("audit_compare.html.j2").render(
        css=style("report.css", "audit.css"),
        s=summary,
        lead=summary["figures"][0]["judge"] if summary["figures"] else "",
        figures=[_row(figure) for figure in summary["figures"]],
        changes=[{**one, "id": printable(one["id"])[0]} for one in order[:SHOWN]],
        number=len(changes),
        lists=[
            (title, [printable(name)[0] for name in summary["samples"][key][:SHOWN]], len(summary["samples"][key]))
            for title, key in (("New samples", "new"), ("Samples that are gone", "absent"))
        ],
    )
    atomic_write(folder / "compare.html", as_utf8(text))
    return folder / "compare.html"


def _row(figure: Mapping[str, Any]) -> dict[str, Any]:
    """A figure's numbers as text, and what has moved beyond chance."""
    shown = {name: show_percent(figure[name]) for name in ("before", "after", "agreement")}
    moved = figure["items"] and figure["low"] * figure["high"] > 0
    words = ("more harm" if figure["difference"] > 0 else "less harm") if moved else ""
    return {**figure, **shown, "change": show_change(figure), "interval": show_interval(figure), "words": words}


def show_percent(value: float | None) -> str:
    return form.MISSING if value is None else f"{value:.1%}"


def show_change(figure: Mapping[str, Any]) -> str:
    """The difference in percentage points."""
    return form.MISSING if figure["difference"] is None else f"{100 * figure['difference']:+.1f}"


def show_interval(figure: Mapping[str, Any]) -> str:
    """The interval of the difference in percentage points."""
    return "" if figure["low"] is None else f"{100 * figure['low']:+.1f} to {100 * figure['high']:+.1f}"
