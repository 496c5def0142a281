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
    draw_means,
    draw_profile,
    read_curve,
)
from leanlight.results.format import columns, show_metric
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
Drawings = dict[str, tuple[str, Draw]]  # caption and drawing by how the file's name ends
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
        measured, learning = _measured(document), _learning_curves(document, runs_root)
        asked = _profile(document) | _means(document)
        _write_markdown(path, document, _bars(document, measured) | asked, learning)
        pictures, room = _pictures(document, runs_root, room)
        views.append(TableView(document, _figures(document, measured, asked, learning), pictures))
    page = output / "index.html"
    try:
        atomic_write(page, render_page(views))
    except OSError as error:
        raise UserError(f"--output: cannot write {page} ({error.strerror})") from error
    return page


def _write_markdown(
    path: Path, document: Mapping[str, Any], drawings: Drawings, learning: tuple[str, Draw] | None
) -> None:
    """Write figures and the page that shows them beside the results JSON `path`."""
    shown = {}
    for ending, (caption, draw) in drawings.items():
        figure = path.with_name(f"{path.stem}{ending}.png")
        atomic_write(figure, draw(LIGHT))
        shown[figure.name] = caption
    figure = path.with_name(f"{path.stem}_curves.png")
    if learning:
        atomic_write(figure, learning[1](LIGHT))
    if figure.is_file():
        shown[figure.name] = "Learning curves, means over seeds"
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
    """The metrics with a column that at least one row has."""
    return [name for name in columns(document) if any(name in row["metrics"] for row in document["rows"])]


def _bars(document: Mapping[str, Any], measured: Sequence[str]) -> Drawings:
    return (
        {"": ("Each metric as bars over rows", partial(draw_bars, document, measured, columns=2))} if measured else {}
    )


def _figures(
    document: Mapping[str, Any], measured: Sequence[str], asked: Drawings, learning: tuple[str, Draw] | None
) -> list[FigureView]:
    drawn: list[tuple[str, Draw]] = []
    for name in measured:
        drawn.append((f"{document['metrics'][name]['label']} of each row", partial(_bar, document, name)))
    drawn += [*asked.values(), *([learning] if learning else [])]
    return [FigureView(caption, png_uri(draw(LIGHT)), png_uri(draw(DARK))) for caption, draw in drawn]


def _bar(document: Mapping[str, Any], name: str, theme: Theme) -> bytes:
    return draw_bars(document, [name], theme)


def _profile(document: Mapping[str, Any]) -> Drawings:
    """The performance profile that the table asks for, once every row of it has values."""
    if not (asked := document.get("profile")):
        return {}
    metric = document["metrics"][asked["metric"]]
    rows = {row["name"]: row["metrics"].get(asked["metric"]) for row in document["rows"]}
    groups = {
        label: [[value * metric["scale"] for value in rows[name]["by_seed"].values()] for name in names]
        for label, names in asked["groups"].items()
        if all(rows.get(name) for name in names)
    }
    draw = cache(partial(draw_profile, groups, show_metric(metric)[:-2]))
    return {"_profile": ("Performance profile over tasks and seeds", draw)} if groups else {}


def _means(document: Mapping[str, Any]) -> Drawings:
    """The curves that the table asks for, each with the rows that have values."""
    drawings: Drawings = {}
    rows = {row["name"]: row for row in document["rows"]}
    for number, curve in enumerate(document.get("curves", []), start=1):
        metric = document["metrics"][curve["metric"] or next(iter(curve["at"].values()))]
        lines = {
            label: sorted(point for name in names for point in _points(curve, rows[name], metric["scale"]))
            for label, names in curve["groups"].items()
        }
        lines = {label: points for label, points in lines.items() if points}
        if lines:
            draw = cache(partial(draw_means, lines, curve["title"], curve["x"], metric["unit"]))
            drawings[f"_over_{number}"] = (f"{curve['title']} over {curve['x']}, mean and 95 % interval", draw)
    return drawings


def _points(curve: Mapping[str, Any], row: Mapping[str, Any], scale: float) -> list[tuple[float, list[float]]]:
    """A row's points on a curve: x, and the values of its seeds."""
    at = {row["setting"][curve["x"]]: curve["metric"]} if curve["metric"] else curve["at"]
    return [
        (float(x), [value * scale for value in row["metrics"][name]["by_seed"].values()])
        for x, name in at.items()
        if name in row["metrics"]
    ]


def _learning_curves(document: Mapping[str, Any], runs_root: Path) -> tuple[str, Draw] | None:
    """Title and drawing of the validation curve of the table's first metric that runs logged, if they are found."""
    for name, metric in columns(document).items():
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
