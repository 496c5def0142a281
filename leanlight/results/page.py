"""HTML pages of results: an overview and a page a method, or one page; each holds all it shows and loads nothing."""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from leanlight.registry import MethodInfo, config_root, methods
from leanlight.results.claims import VERDICTS
from leanlight.results.dots import Panel, all_dots, draw_dots
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
from leanlight.results.groups import best_row, group_rows, parting_keys, shared_setting
from leanlight.results.markdown import data_sources, headline, warnings_of
from leanlight.results.pictures import TELLING, Picture

_HERE = Path(__file__).parent
_CARD_ROWS = 16  # of the figure on a method's card
_WIDE = 8  # more metrics stand in small print
_CHARTS = TELLING.index("attention")  # from this rank on pictures are charts, and the dots say more


@dataclass(frozen=True)
class FigureView:
    """A figure for light and for dark ground, as data URIs."""

    caption: str
    light: str
    dark: str


@dataclass(frozen=True)
class TableView:
    """A results document with what was found for it. path: of its JSON."""

    document: Mapping[str, Any]
    figures: Sequence[FigureView] = ()
    pictures: Sequence[Picture] = ()  # the most telling first
    path: Path = Path()


def template(name: str) -> Template:
    """A template of this folder, which escapes all text."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(name)


def style(*names: str) -> Markup:
    """Files of this folder, one after the other: the package's own style sheets and scripts must not be escaped."""
    return Markup("".join((_HERE / name).read_text() for name in names))


def render_site(tables: Sequence[TableView], output: Path) -> dict[str, str]:
    """Pages by file name: ``index.html`` and a page for each method with results. output: their folder."""
    views = [_table(view, position, output) for position, view in enumerate(tables)]
    found = _methods(views, output)
    dates = [str(view.document["date"]) for view in tables if view.document["date"]]
    facts = {"newest": max(dates, default=MISSING)[:10], "number": len(tables)}
    claims = {"reduced scale": _counts(views, paper=False), "scale of the papers": _counts(views, paper=True)}
    pages = {"index.html": _render("report_overview.html.j2", methods=found, claims=claims, **facts)}
    for method in found:
        if method["tables"]:
            pages[method["file"]] = _render("report_method.html.j2", method=method, methods=found)
    return pages


def render_page(tables: Sequence[TableView], output: Path) -> str:
    """One page with the tables given."""
    views = [_table(view, position, output) for position, view in enumerate(tables)]
    return _render("report_method.html.j2", method={"name": "", "tables": views}, methods=[])


def render_dots(panels: Sequence[Panel]) -> str:
    """Dot plots as one SVG file."""
    return template("dots.svg.j2").render(panels=panels, css=style("dots.css"))


def _render(name: str, **values: Any) -> str:
    css, script = style("report.css", "dots.css"), style("report.js")
    return template(name).render(css=css, script=script, policy=content_policy(css, script), **values)


def content_policy(css: str, script: str) -> str:
    """The Content-Security-Policy of a page that runs its own script and style and loads nothing."""

    def allowed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return f"default-src 'none'; img-src data:; style-src {allowed(css)}; script-src {allowed(script)}"


def _methods(views: Sequence[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """Every method of the registry, and others that results name, with their tables."""
    known = methods()
    names = [*known, *dict.fromkeys(v["document"]["method"] for v in views if v["document"]["method"] not in known)]
    return [
        _method(name, known.get(name), [view for view in views if view["document"]["method"] == name], output)
        for name in names
    ]


def _method(name: str, info: MethodInfo | None, tables: Sequence[dict[str, Any]], output: Path) -> dict[str, Any]:
    paper = info.citation if info else None
    places = {"paper": "", "what it is": f"docs/methods/{name}.md", "code": f"lit_modules/{name}"}
    if paper and (paper.arxiv or paper.doi):
        places["paper"] = f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else f"https://doi.org/{paper.doi}"
    links = {text: place if ":" in place else _link(Path(place), output) for text, place in places.items() if place}
    convincing = sorted(tables, key=lambda table: -dict(table["counts"]).get("reproduced", 0))
    pictures = sorted((p for table in convincing for p in table["pictures"]), key=lambda picture: picture.rank)
    file = re.sub(r"[^\w-]", "_", name)
    return {
        "name": name,
        "file": f"{file}.html",
        "title": info.title if info else name,
        "paper": paper.text if paper else "",
        "links": {text: link for text, link in links.items() if link},
        "tables": tables,
        "lead": pictures[0] if pictures and pictures[0].rank < _CHARTS else None,
        "counts": _verdicts([claim for table in tables for claim in table["document"]["claims"]]),
        **(_card_figure(tables[0]["document"]) if tables else {"figure": None}),
    }


def _card_figure(document: Mapping[str, Any]) -> dict[str, Any]:
    """The headline's metric of the rows comparable with its first; without one, the first metric of the most rows."""
    groups, asked = group_rows(document["rows"]), document.get("headline")
    metric = asked["metric"] if asked else next(iter(columns(document)))
    first = asked["rows"][0] if asked else None

    def rank(group: tuple[str, Sequence[Mapping[str, Any]]]) -> tuple[bool, int]:
        return any(row["name"] == first for row in group[1]), len(group[1])

    setting, rows = max(groups.items(), key=rank)
    shown = rows[:_CARD_ROWS]
    words = [setting, f"{len(shown)} of {len(rows)} rows" if len(shown) < len(rows) else ""]
    panel = draw_dots(document, metric, shown)
    return {"figure": panel, "figure_note": "; ".join(filter(None, words))}


def _link(path: Path, output: Path) -> str:
    """Link from a page to a file of the checkout that the command runs in; empty for other files."""
    here, target = Path.cwd(), path.resolve()
    inside = target.is_relative_to(here) and output.resolve().is_relative_to(here) and target.exists()
    return Path(os.path.relpath(target, output.resolve())).as_posix() if inside else ""


def _counts(views: Sequence[dict[str, Any]], *, paper: bool) -> list[tuple[str, int]]:
    """Verdicts on claims that count for a paper, or on those that do not."""
    return _verdicts([c for view in views for c in view["document"]["claims"] if c["counts_for_paper"] == paper])


def _verdicts(claims: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """How often each verdict was reached."""
    counts = [(verdict, sum(c["verdict"] == verdict for c in claims)) for verdict in VERDICTS]
    return [(verdict, count) for verdict, count in counts if count]


def _table(view: TableView, position: int, output: Path) -> dict[str, Any]:
    document = view.document
    heads = [
        {"name": name, "metric": metric, "head": show_metric(metric)} for name, metric in columns(document).items()
    ]
    groups, shared = group_rows(document["rows"]), shared_setting(document["rows"])
    keys = [*parting_keys(document["rows"]), *shared]  # of the setting, which stand above rows
    return {
        "anchor": f"table-{position}",
        "document": document,
        "headline": headline(document),
        "warnings": warnings_of(document),
        "columns": heads,
        "wide": len(heads) > _WIDE,
        "shared": show_setting(shared),
        "groups": {name: _group(rows, heads, keys, output) for name, rows in groups.items()},
        "counts": _verdicts(document["claims"]),
        "claims": [_claim(claim, document["metrics"]) for claim in document["claims"]],
        "panels": all_dots(document),
        "figures": view.figures,
        "pictures": view.pictures,
        "machine": f"{show_machine(document['machine'])}. {SEEDS_STAY}",
        "sources": data_sources(document),
        "json": _link(view.path, output),
        "spec": _config_link(document["table"], output),
    }


def _config_link(name: str, output: Path) -> str:
    return _link(config_root() / f"{name}.yaml", output)


def _group(
    rows: Sequence[Mapping[str, Any]], heads: Sequence[Mapping[str, Any]], keys: Sequence[str], output: Path
) -> list[dict[str, Any]]:
    """Rows of a group. keys: of the setting, which stand above it."""
    best = {head["name"]: best_row(rows, head["name"], head["metric"]["higher_is_better"]) for head in heads}
    return [_row(row, heads, keys, best) | {"link": _config_link(row["config"], output)} for row in rows]


def _row(
    row: Mapping[str, Any],
    heads: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    best: Mapping[str, str | None],
) -> dict[str, Any]:
    cells = []
    for column in heads:
        name, metric = column["name"], column["metric"]
        measured = row["metrics"].get(name)
        cells.append(
            {
                "measured": show_measured(measured, metric, unit=False),
                "number": "" if measured is None else repr(measured["mean"]),
                "best": row["name"] == best[name],
                "seeds": ", ".join(
                    f"{seed}: {show_number(value * metric['scale'], metric['digits'])}"
                    for seed, value in (measured or {"by_seed": {}})["by_seed"].items()
                ),
                "paper": _paper(row, name, metric),
            }
        )
    return {
        "row": row,
        "setting": show_setting({key: value for key, value in row["setting"].items() if key not in keys}),
        "cells": cells,
        "time": show_seconds(row["wall_s"]),
        "memory": MISSING if row["peak_rss_mb"] is None else f"{row['peak_rss_mb']:,.0f} MB",
        "gpu_memory": "" if row["peak_cuda_mb"] is None else f"{row['peak_cuda_mb']:,.0f} MB GPU",
        "samples": MISSING if row["samples_seen"] is None else f"{row['samples_seen']:,.0f}",
        "overrides": [f"{key} = {value}" for key, value in row["overrides"].items()],
    }


def _paper(row: Mapping[str, Any], name: str, metric: Mapping[str, Any]) -> dict[str, str] | None:
    figure = row["paper"].get(name)
    if figure is None:
        return None
    delta = paper_delta(row, name, metric)
    return {
        "value": show_number(figure["value"], metric["digits"]),
        "where": "; ".join(part for part in (figure["source"], show_setting(figure["setting"])) if part),
        "delta": "" if delta is None else f"{delta:+.{metric['digits']}f}",
    }


def _claim(claim: Mapping[str, Any], metrics: Mapping[str, Any]) -> dict[str, Any]:
    by_seed = ", ".join(f"seed {seed}: {value:.4g}" for seed, value in claim["evidence"]["by_seed"].items())
    return {
        **claim,
        "by_seed": by_seed,
        "words": claim["verdict"].replace("_", " "),
        "why": show_evidence(claim, metrics),
    }
