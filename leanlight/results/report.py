"""Turn results into Markdown, figures and HTML pages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from leanlight.contracts.errors import UserError
from leanlight.contracts.files import atomic_write
from leanlight.results.dots import all_dots
from leanlight.results.figures import DARK, LIGHT, Curve, Theme, draw_curves, draw_means, draw_profile, read_curve
from leanlight.results.format import columns, show_metric
from leanlight.results.markdown import (
    check_markers,
    document_markdown,
    method_section,
    replace_results,
    suite_table,
)
from leanlight.results.page import FigureView, TableView, render_dots, render_page, render_site
from leanlight.results.pictures import Picture, load_picture, png_uri, read_media, run_folder, store_media
from leanlight.results.table import read_document

Draw = Callable[[Theme], bytes]  # a PNG
Drawings = dict[str, tuple[str, Draw]]  # caption and drawing by how the file's name ends
_NO_TABLES = ("benchmark.json", "gpu.json")
_PAGE_BYTES = 12 * 2**20  # pictures beyond this are left out of the pages
_CURVES = "Learning curves, means over seeds"


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


def write_report(paths: Sequence[Path], output: Path, runs_root: Path, *, site: bool = False) -> Path:
    """Write Markdown and figures beside each results JSON, and pages into `output`; return the first page's path.

    Learning curves and pictures need the run folders: where they are missing, those drawn and kept before stay.

    Args:
        paths: results JSONs, in the order of the page.
        output: folder of the pages.
        runs_root: where the run folders are.
        site: an overview and a page a method, instead of one page with all tables.
    """
    documents = {path: read_document(path) for path in paths}
    views, room = [], _PAGE_BYTES
    for path, document in documents.items():
        store_media(path, document, runs_root)
        learning, asked = _learning_curves(document, runs_root), _profile(document) | _means(document)
        _write_markdown(path, document, asked, learning)
        pictures, room = _pictures(path, document, room)
        views.append(TableView(document, _figures(asked, learning, path), pictures, path))
    pages = render_site(views, output) if site else {"index.html": render_page(views, output)}
    try:
        for name, page in pages.items():
            atomic_write(output / name, page)
    except OSError as error:
        raise UserError(f"--output: cannot write {output / name} ({error.strerror})") from error
    return output / "index.html"


def _write_markdown(
    path: Path, document: Mapping[str, Any], drawings: Drawings, learning: tuple[str, Draw] | None
) -> None:
    """Write figures and the page that shows them beside the results JSON `path`."""
    shown = {}
    if panels := all_dots(document):
        figure = path.with_suffix(".svg")
        atomic_write(figure, render_dots(panels))
        shown[figure.name] = "A dot a seed, the mean and its 95 % interval"
    for ending, (caption, draw) in drawings.items():
        figure = path.with_name(f"{path.stem}{ending}.png")
        atomic_write(figure, draw(LIGHT))
        shown[figure.name] = caption
    figure = _curves_file(path)
    if learning:
        atomic_write(figure, learning[1](LIGHT))
    if figure.is_file():
        shown[figure.name] = _CURVES
    pictures = {
        f"{file.parent.name}/{file.name}": caption
        for files in read_media(path, document).values()
        for file, caption in files.items()
    }
    atomic_write(path.with_suffix(".md"), document_markdown(document, shown, pictures))


def _curves_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}_curves.png")


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


def _pictures(path: Path, document: Mapping[str, Any], room: int) -> tuple[list[Picture], int]:
    """The pictures kept with a table, as long as there is room on the pages; return them and the room that is left."""
    found = []
    for files in read_media(path, document).values():
        for file, caption in files.items():
            picture = load_picture(file, caption)
            if picture and len(picture.uri) <= room:
                room -= len(picture.uri)
                found.append(picture)
    return sorted(found, key=lambda picture: picture.rank), room


def _figures(asked: Drawings, learning: tuple[str, Draw] | None, path: Path) -> list[FigureView]:
    """Figures for light and dark ground; learning curves whose runs are gone as they were drawn, for light ground."""
    drawn = [*asked.values(), *([learning] if learning else [])]
    views = [FigureView(caption, png_uri(draw(LIGHT)), png_uri(draw(DARK))) for caption, draw in drawn]
    if not learning and (kept := load_picture(_curves_file(path), _CURVES)):
        views.append(FigureView(_CURVES, kept.uri, kept.uri))
    return views


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
            name = show_metric(metric)[:-2].removeprefix("Test ")
            title = f"{name[0].upper()}{name[1:]} on validation data"
            return title, cache(partial(draw_curves, curves, "/".join(sorted(units)), title))
    return None
