"""Result tables as Markdown, and the places in README files that hold them."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leanlight.contracts.errors import UserError
from leanlight.contracts.files import atomic_write
from leanlight.registry import methods
from leanlight.results.claims import VERDICTS
from leanlight.results.format import (
    MISSING,
    SEEDS_STAY,
    columns,
    paper_delta,
    show_evidence,
    show_machine,
    show_measured,
    show_metric,
    show_number,
    show_seconds,
    show_setting,
)
from leanlight.results.groups import shared_setting

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
_SOURCES_SHOWN = 5
Document = Mapping[str, Any]


def escape(text: object) -> str:
    """Text that stays text in a Markdown table's cell."""
    flat = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", flat)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], right: int = 1) -> str:
    """A Markdown table of escaped cells; columns from `right` on are aligned right."""
    rule = ["---" if position < right else "---:" for position in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def result_table(document: Document) -> str:
    """Rows with mean ± standard deviation, the paper's figures beside them, seeds, time and memory."""
    header, body = ["Row"], []
    shown = columns(document)
    for name, metric in shown.items():
        header.append(escape(show_metric(metric)))
        if _has_paper(document, name):
            header.append(escape(f"{metric['label']} (paper)"))
    header += ["n", "time a run", "peak memory"]
    shared = shared_setting(document["rows"])
    for row in document["rows"]:
        own = {key: value for key, value in row["setting"].items() if key not in shared}
        setting = f" ({escape(show_setting(own))})" if own else ""
        cells = [escape(row["label"]) + setting + (" *stale*" if row["stale"] else "")]
        for name, metric in shown.items():
            cells.append(escape(show_measured(row["metrics"].get(name), metric, unit=False)))
            if _has_paper(document, name):
                cells.append(_paper_cell(row, name, metric))
        memory = MISSING if row["peak_rss_mb"] is None else f"{row['peak_rss_mb']:,.0f} MB"
        body.append([*cells, str(len(row["seeds"])), show_seconds(row["wall_s"]), memory])
    above = f"All rows: {escape(show_setting(shared))}.\n\n" if shared else ""
    return above + markdown_table(header, body)


def _has_paper(document: Document, metric: str) -> bool:
    return any(metric in row["paper"] for row in document["rows"])


def _paper_cell(row: Mapping[str, Any], name: str, metric: Mapping[str, Any]) -> str:
    figure = row["paper"].get(name)
    if figure is None:
        return MISSING
    delta = paper_delta(row, name, metric)
    text = show_number(figure["value"], metric["digits"])
    setting = show_setting(figure["setting"])
    where = ", ".join(part for part in (figure["source"], setting) if part)
    return escape(f"{text} ({where})" + ("" if delta is None else f", difference {delta:+.{metric['digits']}f}"))


def claims_table(document: Document) -> str:
    """Claims with their verdicts and the reason for each."""
    rows = [
        [
            escape(c["text"]),
            escape(c["scope"]),
            f"**{escape(c['verdict'].replace('_', ' '))}**",
            escape(show_evidence(c, document["metrics"])),
        ]
        for c in document["claims"]
    ]
    return markdown_table(["Claim", "Scope", "Verdict", "Evidence (paired over seeds)"], rows, right=4)


def warnings_of(document: Document) -> list[str]:
    """What a reader must know before trusting the figures."""
    found = []
    if document["scale"] == "small":
        found.append("Reduced scale: nothing here confirms or refutes a figure of a paper.")
    if not document["complete"]:
        found.append("Incomplete: some rows lack seeds; n says how many each has.")
    if document["stale"]:
        found.append("Stale: the code has changed since some of these runs.")
    if document["dirty"]:
        found.append("Some runs used a working tree with uncommitted changes.")
    if len(document["commits"]) > 1:
        found.append("The runs come from more than one commit.")
    for row in document["rows"]:
        for why, seeds in itertools.groupby(row["failed"].items(), key=lambda pair: pair[1]):
            numbers = [seed for seed, _ in seeds]
            found.append(f"{row['label']}, seed{'s' * (len(numbers) > 1)} {', '.join(numbers)}: {why}.")
    return found


def data_sources(document: Document) -> list[str]:
    """Data sets that the rows used, with source and the start of its fingerprint; of many the first."""
    found = (data for row in document["rows"] for data in row["data"])
    lines = (f"{d.get('name')}, {d.get('source')} (fingerprint {str(d.get('fingerprint'))[:12]})" for d in found)
    different = list(dict.fromkeys(lines))
    more = len(different) - _SOURCES_SHOWN  # rows whose data were themselves made by a run each have their own
    return [*different[:_SOURCES_SHOWN], *([f"and {more} more, which the JSON names"] if more > 0 else [])]


def document_markdown(document: Document, figures: Mapping[str, str], pictures: Mapping[str, str]) -> str:
    """The page of one table. figures, pictures: files beside it and below it, with what they show."""
    parts = [f"# {escape(document['title'])}", escape(document["note"])]
    parts += [f"> {escape(line)}" for line in warnings_of(document)]
    parts.append(result_table(document))
    parts.append(
        f"Mean ± sample standard deviation over n seeds; checkpoint: {document['checkpoint_rule']}. "
        "↑ higher is better, ↓ lower is better."
    )
    parts += [f"![{escape(text)}]({name})" for name, text in figures.items()]
    if document["claims"]:
        parts += ["## Claims", claims_table(document)]
    if pictures:
        parts += ["## Pictures", *(f"![{escape(text)}]({name})\n\n{escape(text)}" for name, text in pictures.items())]
    commit = f"`{str(document['commit'] or 'unknown')[:12]}`" + (" (dirty)" if document["dirty"] else "")
    facts = [f"Machine: {escape(show_machine(document['machine']))}. {SEEDS_STAY}"]
    facts.append(f"Commit: {commit}, {escape(document['date'])}")
    facts += [f"Data: {escape(source)}" for source in data_sources(document)]
    facts.append(f"Made by: `{document['command']}`".replace("\n", " "))
    parts += ["## Where it comes from", "\n".join(f"- {fact}" for fact in facts)]
    return "\n\n".join(part for part in parts if part) + "\n"


def verdict_counts(claims: Iterable[Mapping[str, Any]]) -> str:
    """``3 reproduced, 1 inconclusive``."""
    verdicts = [claim["verdict"] for claim in claims]
    counts = [f"{verdicts.count(v)} {v.replace('_', ' ')}" for v in VERDICTS if v in verdicts]
    return ", ".join(counts) or MISSING


def headline(document: Document) -> str:
    """``Accuracy: ConvNet 88.2 ± 0.7 %; ResNet …``: the metric and the rows that the table names as its headline.

    Where it names none, the first row by the first metric, and the best of the others.
    """
    if asked := document.get("headline"):
        metric, rows = document["metrics"][asked["metric"]], {row["name"]: row for row in document["rows"]}
        shown = [(rows[name]["label"], rows[name]["metrics"].get(asked["metric"])) for name in asked["rows"]]
    else:
        name, metric = next(iter(columns(document).items()))
        first, *others = document["rows"]
        shown = [(first["label"], first["metrics"].get(name))]
        if measured := [row for row in others if name in row["metrics"]]:
            sign = 1 if metric["higher_is_better"] else -1
            best = max(measured, key=lambda row: sign * row["metrics"][name]["mean"])
            shown.append((f"best of the others: {best['label']}", best["metrics"][name]))
    return f"{metric['label']}: " + "; ".join(f"{label} {show_measured(value, metric)}" for label, value in shown)


def suite_table(documents: Sequence[Document], link: str = "docs/results") -> str:
    """One line for each table of the suite, in the registry's order."""
    order = list(methods())
    ranked = sorted(
        documents, key=lambda d: (order.index(d["method"]) if d["method"] in order else len(order), d["stem"])
    )
    rows = []
    for document in ranked:
        target = f"{link}/{document['method']}/{document['stem']}.md"
        scale = "reduced" if document["scale"] == "small" else "paper"
        rows.append(
            [
                escape(document["method"]),
                f"[{escape(document['title'])}]({target})",
                scale,
                escape(headline(document)),
                verdict_counts(document["claims"]),
            ]
        )
    return markdown_table(["Method", "Table", "Scale", "Measured", "Claims"], rows, right=5)


def method_section(documents: Sequence[Document], link: str = "../../docs/results") -> str:
    """A method's tables for its README."""
    parts = []
    for document in documents:
        target = f"{link}/{document['method']}/{document['stem']}.md"
        parts += [f"### [{escape(document['title'])}]({target})", escape(document["note"]), result_table(document)]
        if document["claims"]:
            parts.append(claims_table(document))
    return "\n\n".join(part for part in parts if part)


def check_markers(path: Path) -> None:
    """Raise UserError unless `path` has one place for results."""
    text = path.read_text() if path.is_file() else None
    if text is None:
        raise UserError(f"--readme: no file {path}")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"--readme: {path} needs one line {BEGIN!r} and after it one line {END!r}")


def replace_results(path: Path, content: str) -> None:
    """Put `content` between the markers of `path`."""
    check_markers(path)
    text = path.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    atomic_write(path, f"{before}\n{content}\n{after}")
