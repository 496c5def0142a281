"""Turn results into Markdown, figures and one HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from leanlight.contracts.errors import UserError
from leanlight.contracts.files import atomic_write
from leanlight.results.figures import (
    DARK,
    LIGHT,
    Curve,
    Theme,
    draw_bars,
    draw_curves,
    draw_over_setting,
    draw_profile,
    read_curve,
)
from leanlight.results.format import show_metric
from leanlight.results.markdown import (
    check_markers,
    document_markdown,
    method_section,
    replace_results,
    suite_table,
)
from leanlight.results.page import FigureView, TableView, render_page
from leanlight.results.pictures import Picture, png_uri, run_folder, run_pictures
from leanlight.results.table import read_document

Draw = Callable[[Theme], bytes]  # a PNG
_CAPTIONS = {
    "": "Each metric as bars over rows",
    "_profile": "Performance profile over tasks and seeds",
    "_over_setting": "Means over a setting, with 95 % intervals",
    "_curves": "Learning curves, means over seeds",
}
_NO_TABLES = ("benchmark.json", "gpu.json")
_PICTURES_A_ROW = 6
_PAGE_BYTES = 12 * 2**20  # pictures beyond this are left out of the page


def find_documents(*folders: Path) -> list[Path]:
    """Every table's results JSON under `folders`; of one table the last folder's. UserError for none."""
    paths = {
        path.relative_to(folder): path
        for folder in folders
        for path in sorted(folder.glob("*/*.json"))
        if path.name not in _NO_TABLES
    }
    if not paths:
        where = " or ".join(map(str, folders))
        raise UserError(f"no results in {where}; `leanlight reproduce TABLE` writes them")
    return [paths[key] for key in sorted(paths)]


def write_report(paths: Sequence[Path], output: Path, runs_root: Path) -> Path:
    """Write Markdown and figures beside each results JSON, and ``output/index.html``; return the page's path.

    Learning curves need the run folders: where they are missing, those drawn before are kept.

    Args:
        paths: results JSONs, in the order of the page.
        output: folder of the page.
        runs_root: where the run folders are.
    """
    documents = {path: read_document(path) for path in paths}
    views, room = [], _PAGE_BYTES
    for path, document in documents.items():
        measured, curves = _measured(document), _learning_curves(document, runs_root)
        asked = {"_profile": _profile(document), "_over_setting": _over_setting(document)}
        bars = partial(draw_bars, document, measured, columns=2) if measured else None
        _write_markdown(path, document, {"": bars, **asked, "_curves": curves and curves[1]})
        pictures, room = _pictures(document, runs_root, room)
        views.append(TableView(document, _figures(document, measured, asked, curves), pictures))
    page = output / "index.html"
    try:
        atomic_write(page, render_page(views))
    except OSError as error:
        raise UserError(f"--output: cannot write {page} ({error.strerror})") from error
    return page


def _write_markdown(path: Path, document: Mapping[str, Any], drawings: Mapping[str, Draw | None]) -> None:
    """Write figures and the page that shows them beside the results JSON `path`. drawings: by the end of their name."""
    shown = {}
    for ending, draw in drawings.items():
        figure = path.with_name(f"{path.stem}{ending}.png")
        if draw:
            atomic_write(figure, draw(LIGHT))
        if draw or (ending == "_curves" and figure.is_file()):
            shown[figure.name] = _CAPTIONS[ending]
    atomic_write(path.with_suffix(".md"), document_markdown(document, shown))


def write_readmes(root: Path, results: Path) -> list[Path]:
    """Rewrite the results in README.md and in the README of every method that has some; return the files.

    Every file is checked for its markers before the first is written. results: folder of the published ones, since
    these files are published, too.
    """
    documents = [read_document(path) for path in find_documents(root / results)]
    contents = {root / "README.md": suite_table(documents)}
    for method in dict.fromkeys(document["method"] for document in documents):
        own = [document for document in documents if document["method"] == method]
        contents[root / "lit_modules" / method / "README.md"] = method_section(own)
    for path in contents:
        check_markers(path)
    for path, content in contents.items():
        replace_results(path, content)
    return list(contents)


def _pictures(document: Mapping[str, Any], runs_root: Path, room: int) -> tuple[dict[str, list[Picture]], int]:
    """Pictures of each row's first run, as long as there is room on the page; return them and the room that is left."""
    found: dict[str, list[Picture]] = {}
    for row in document["rows"]:
        folder = run_folder(runs_root, row["runs"][0]) if row["runs"] else None
        for picture in run_pictures(folder, _PICTURES_A_ROW) if folder else []:
            if len(picture.uri) <= room:
                room -= len(picture.uri)
                found.setdefault(row["name"], []).append(picture)
    return found, room


def _measured(document: Mapping[str, Any]) -> list[str]:
    """The table's metrics that at least one row has."""
    return [name for name in document["metrics"] if any(name in row["metrics"] for row in document["rows"])]


def _figures(
    document: Mapping[str, Any],
    measured: Sequence[str],
    asked: Mapping[str, Draw | None],
    curves: tuple[str, Draw] | None,
) -> list[FigureView]:
    drawn: dict[str, Draw] = {
        f"{document['metrics'][name]['label']} of each row": partial(_bars, document, name) for name in measured
    }
    drawn |= {_CAPTIONS[ending]: draw for ending, draw in asked.items() if draw}
    if curves:
        drawn |= [curves]
    return [FigureView(title, png_uri(draw(LIGHT)), png_uri(draw(DARK))) for title, draw in drawn.items()]


def _profile(document: Mapping[str, Any]) -> Draw | None:
    """Draws the performance profile that the table asks for, once every row of it has values."""
    if not (asked := document.get("profile")):
        return None
    metric = document["metrics"][asked["metric"]]
    rows = {row["name"]: row["metrics"].get(asked["metric"]) for row in document["rows"]}
    groups = {
        label: [[value * metric["scale"] for value in rows[name]["by_seed"].values()] for name in names]
        for label, names in asked["groups"].items()
        if all(rows.get(name) for name in names)
    }
    return cache(partial(draw_profile, groups, show_metric(metric)[:-2])) if groups else None


def _over_setting(document: Mapping[str, Any]) -> Draw | None:
    """Draws the metric over a setting that the table asks for, with the rows that have values."""
    if not (asked := document.get("curve")):
        return None
    metric = document["metrics"][asked["metric"]]
    rows = {row["name"]: row for row in document["rows"]}
    groups = {
        label: sorted(
            (
                float(rows[name]["setting"][asked["x"]]),
                [value * metric["scale"] for value in measured["by_seed"].values()],
            )
            for name in names
            if (measured := rows[name]["metrics"].get(asked["metric"]))
        )
        for label, names in asked["groups"].items()
    }
    groups = {label: points for label, points in groups.items() if points}
    return cache(partial(draw_over_setting, groups, asked["x"], show_metric(metric)[:-2])) if groups else None


def _bars(document: Mapping[str, Any], name: str, theme: Theme) -> bytes:
    return draw_bars(document, [name], theme)


def _learning_curves(document: Mapping[str, Any], runs_root: Path) -> tuple[str, Draw] | None:
    """Title and drawing of the validation curve of the table's first metric that runs logged, if they are found."""
    for name, metric in document["metrics"].items():
        validated = "val/" + name.partition("/")[2]
        curves, units = [], set()
        for position, row in enumerate(document["rows"]):
            folders = [run_folder(runs_root, run) for run in row["runs"]]
            lines = [read_curve(folder, validated) for folder in folders if folder]
            found = [line for line in lines if line]
            units |= {unit for unit, _, _ in found}
            if found:
                scaled = [(x, [value * metric["scale"] for value in y]) for _, x, y in found]
                curves.append(Curve(row["label"], scaled, position))
        if curves:
            title = f"{show_metric(metric)[:-2]} on validation data"
            return title, cache(partial(draw_curves, curves, "/".join(sorted(units)), title))
    return None
