"""The HTML page of all results: one file, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from leanlight.registry import methods
from leanlight.results.claims import VERDICTS
from leanlight.results.format import (
    MISSING,
    SEEDS_STAY,
    columns,
    paper_delta,
    show_machine,
    show_measured,
    show_metric,
    show_number,
    show_seconds,
    show_setting,
)
from leanlight.results.markdown import data_sources, headline, warnings_of
from leanlight.results.pictures import Picture

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class FigureView:
    """A figure for light and for dark ground, as data URIs."""

    caption: str
    light: str
    dark: str


@dataclass(frozen=True)
class TableView:
    """A results document with what was found for it."""

    document: Mapping[str, Any]
    figures: Sequence[FigureView] = ()
    pictures: Mapping[str, Sequence[Picture]] = field(default_factory=dict)  # row name → pictures


def template(name: str) -> Template:
    """A template of this folder, which escapes all text."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def style(*names: str) -> Markup:
    """Style sheets of this folder, one after the other: the package's own files, which must not be escaped."""
    return Markup("".join((_HERE / name).read_text() for name in names))


def render_page(tables: Sequence[TableView]) -> str:
    """The whole page. All text is escaped."""
    views = [_table(view, f"table-{position}") for position, view in enumerate(tables)]
    dates = [str(view.document["date"]) for view in tables if view.document["date"]]
    return template("report.html.j2").render(
        css=style("report.css"),
        tables=views,
        methods=_methods(views),
        newest=max(dates, default=MISSING),
        reduced=_counts(views, paper=False),
        paper=_counts(views, paper=True),
    )


def _methods(views: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every method of the registry, and others that results name, with their tables."""
    known = methods()
    names = [*known, *dict.fromkeys(v["document"]["method"] for v in views if v["document"]["method"] not in known)]
    return [
        {
            "name": name,
            "title": known[name].title if name in known else name,
            "paper": paper.text if name in known and (paper := known[name].citation) else "",
            "tables": [view for view in views if view["document"]["method"] == name],
        }
        for name in names
    ]


def _counts(views: Sequence[dict[str, Any]], *, paper: bool) -> list[tuple[str, int]]:
    """How often each verdict was reached, for claims that count for a paper or for those that do not."""
    claims = [c for view in views for c in view["document"]["claims"] if c["counts_for_paper"] == paper]
    counts = [(verdict, sum(c["verdict"] == verdict for c in claims)) for verdict in VERDICTS]
    return [(verdict, count) for verdict, count in counts if count]


def _table(view: TableView, anchor: str) -> dict[str, Any]:
    document = view.document
    heads = [
        {
            "name": name,
            "metric": metric,
            "head": show_metric(metric),
            "paper": any(name in row["paper"] for row in document["rows"]),
        }
        for name, metric in columns(document).items()
    ]
    return {
        "anchor": anchor,
        "document": document,
        "headline": headline(document),
        "warnings": warnings_of(document),
        "columns": heads,
        "rows": [_row(row, document, heads, view.pictures.get(row["name"], ())) for row in document["rows"]],
        "claims": [_claim(claim) for claim in document["claims"]],
        "figures": view.figures,
        "machine": f"{show_machine(document['machine'])}. {SEEDS_STAY}",
        "sources": data_sources(document),
    }


def _row(
    row: Mapping[str, Any],
    document: Mapping[str, Any],
    heads: Sequence[Mapping[str, Any]],
    pictures: Sequence[Picture],
) -> dict[str, Any]:
    cells = []
    for column in heads:
        name, metric = column["name"], column["metric"]
        measured = row["metrics"].get(name)
        cells.append(
            {
                "measured": show_measured(measured, metric, unit=False),
                "best": measured is not None and row["name"] == _best_row(document, name, metric["higher_is_better"]),
                "seeds": ", ".join(
                    f"{seed}: {show_number(value * metric['scale'], metric['digits'])}"
                    for seed, value in (measured or {"by_seed": {}})["by_seed"].items()
                ),
                "paper": _paper(row, name, metric) if column["paper"] else None,
            }
        )
    return {
        "row": row,
        "setting": show_setting(row["setting"]),
        "cells": cells,
        "time": show_seconds(row["wall_s"]),
        "memory": MISSING if row["peak_rss_mb"] is None else f"{row['peak_rss_mb']:,.0f} MB",
        "gpu_memory": "" if row["peak_cuda_mb"] is None else f"{row['peak_cuda_mb']:,.0f} MB GPU",
        "samples": MISSING if row["samples_seen"] is None else f"{row['samples_seen']:,.0f}",
        "overrides": [f"{key} = {value}" for key, value in row["overrides"].items()],
        "pictures": pictures,
    }


def _best_row(document: Mapping[str, Any], metric: str, higher: bool) -> str:
    measured = [row for row in document["rows"] if metric in row["metrics"]]
    if len(measured) < 2:
        return ""
    pick = max if higher else min
    return str(pick(measured, key=lambda row: row["metrics"][metric]["mean"])["name"])


def _paper(row: Mapping[str, Any], name: str, metric: Mapping[str, Any]) -> dict[str, str]:
    figure = row["paper"].get(name)
    if figure is None:
        return {"value": MISSING, "where": "", "delta": ""}
    delta = paper_delta(row, name, metric)
    return {
        "value": show_number(figure["value"], metric["digits"]),
        "where": "; ".join(part for part in (figure["source"], show_setting(figure["setting"])) if part),
        "delta": "" if delta is None else f"{delta:+.{metric['digits']}f}",
    }


def _claim(claim: Mapping[str, Any]) -> dict[str, Any]:
    evidence = claim["evidence"]
    by_seed = ", ".join(f"seed {seed}: {value:.4g}" for seed, value in evidence["by_seed"].items())
    return {**claim, "by_seed": by_seed, "words": claim["verdict"].replace("_", " ")}
