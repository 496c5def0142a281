"""Samples from files: tables with columns of one's own, published sets, and folders of pictures with texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from datamodules.images.formats import PICTURE_SUFFIXES
from datamodules.safety import layouts, xstest
from datamodules.safety.layouts import Found
from datamodules.safety.pictures import FilePicture
from datamodules.safety.tables import SUFFIXES, columns_of, read_table
from leanlight.contracts import SafetySample, Split, UserError, nearest

#: Formats with columns of one's own, and how their files may end.
PLAIN = {"jsonl": (".jsonl", ".ndjson", ".json"), "csv": (".csv", ".tsv"), "parquet": (".parquet",)}
FORMATS = ("auto", *PLAIN, "pictures", "xstest", "figstep", *layouts.TABLES)


def read_samples(
    path: Path | str,
    format: str = "auto",
    columns: Mapping[str, str | None] | None = None,
    images: Path | str | None = None,
) -> list[SafetySample]:
    """Samples of a file or a folder, in its order. Pictures are not decoded, and may turn out unreadable.

    Args:
        path: a table (JSONL, JSON, CSV, TSV, parquet) or a folder: with such tables, of XSTest or FigStep, or of
            pictures: NAME.png with the instruction in NAME.txt and the answer in NAME.response.txt.
        format: one of `FORMATS`; ``auto``: as names of files and columns tell.
        columns: names of the table's columns by ours (`layouts.COLUMNS`), where they differ; None: there is none.
        images: folder of the pictures that a table names; None: the folder of the table.

    Raises:
        UserError: what cannot be read; it names file, row and column. None of the pictures is there.
        MissingExtraError: pyarrow is not installed, for parquet.
    """
    samples = [sample for sample, _ in read_parts(path, format, columns, images)]
    require_pictures(samples, all_missing=True)
    return samples


def read_parts(
    path: Path | str,
    format: str = "auto",
    columns: Mapping[str, str | None] | None = None,
    images: Path | str | None = None,
) -> list[Found]:
    """The same with the part of a split that a column or a file's name puts each sample in; arguments as there.

    Pictures may all be missing.
    """
    place = Path(path).expanduser()
    root = None if images is None else Path(images).expanduser()
    if format not in FORMATS:
        raise UserError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}{nearest(format, FORMATS)}")
    if not place.exists():
        raise UserError(f"{place} is missing")
    if root is not None and not root.is_dir():
        raise UserError(f"images: expected a folder, got {root}")
    kind = _special(place) if format == "auto" else format
    if kind in ("xstest", "figstep", "pictures"):
        return _unique(place, _folder(place, kind, columns, root))
    found = []
    files = _tables(place, format)
    for file in files:
        # Ids and numbers of rows begin anew in every file.
        prefix = "" if len(files) == 1 else f"{file.relative_to(place).with_suffix('').as_posix()}:"
        named = _part(file)
        for sample, part in _table(file, format, columns, root or file.parent):
            found.append((replace(sample, id=f"{prefix}{sample.id}") if prefix else sample, part or named))
    return _unique(place, found)


def require_pictures(samples: Sequence[SafetySample], all_missing: bool = False) -> None:
    """UserError with the first names when files of pictures are missing.

    Args:
        samples: whose pictures they are.
        all_missing: only if none of them is there, which means that the folder is not the right one.
    """
    files = list(dict.fromkeys(sample.image for sample in samples if isinstance(sample.image, FilePicture)))
    absent = [file.name for file in files if not file.path.is_file()]
    if absent and (len(absent) == len(files) or not all_missing):
        shown = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
        raise UserError(
            f"images: {len(absent):,} of {len(files):,} pictures are missing: {shown}; `images` names their folder"
        )


def _unique(place: Path, found: list[Found]) -> list[Found]:
    seen: set[str] = set()
    for sample, _ in found:
        if sample.id in seen:
            raise UserError(f"{place}: expected every id once, got {sample.id!r} twice; columns: id may name another")
        seen.add(sample.id)
    return found


# ---- folders ----


def _special(place: Path) -> str:
    """Which set, or else kind of folder, a place holds as its names of files tell; empty: tables."""
    if not place.is_dir():
        return ""
    if any(place.glob(xstest.TABLES)):
        return "xstest"
    if layouts.figstep_table(place):
        return "figstep"
    has_table = any(path.suffix.lower() in SUFFIXES for path in place.rglob("*"))
    return "" if has_table else "pictures"


def _folder(place: Path, kind: str, columns: Mapping[str, str | None] | None, images: Path | None) -> list[Found]:
    if columns:
        raise UserError(f"columns: expected none with {kind}, whose files have names of their own")
    if not place.is_dir():
        raise UserError(f"{place}: expected a folder with {kind}")
    if kind == "figstep":
        return layouts.figstep(place, images)
    samples = xstest.XSTest().read(place) if kind == "xstest" else _pictures(place)
    return [(sample, None) for sample in samples]


def _pictures(folder: Path) -> list[SafetySample]:
    """A sample for each picture of a folder and the folders in it."""
    samples = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES):
        name = path.relative_to(folder).as_posix()
        texts = [path.with_suffix(suffix) for suffix in (".txt", ".response.txt")]
        instruction, response = (file.read_text("utf-8", "replace").strip() if file.is_file() else "" for file in texts)
        samples.append(SafetySample(name, instruction, response, FilePicture(path, name)))
    if not samples:
        raise UserError(f"{folder} holds neither a table ({', '.join(SUFFIXES)}) nor a picture")
    return samples


# ---- tables ----


def _tables(place: Path, format: str) -> list[Path]:
    """The files of tables at a place: all of the first suffix that there is, of those the format allows."""
    suffixes = PLAIN.get(format, SUFFIXES)
    if place.is_file():
        if place.suffix.lower() not in suffixes:
            raise UserError(f"{place}: expected a file that ends in {', '.join(suffixes)}")
        return [place]
    there = sorted(path for path in place.rglob("*") if path.suffix.lower() in suffixes)
    if not there:
        raise UserError(f"{place} holds no table ({', '.join(suffixes)})")
    first = min((path.suffix.lower() for path in there), key=suffixes.index)
    return [path for path in there if path.suffix.lower() == first]


def _part(file: Path) -> Split | None:
    """The part that the name of a file, or of its folder, tells."""
    words = [*re.split(r"[-_.]", file.stem.lower()), file.parent.name.lower()]
    return next((layouts.PART_NAMES[word] for word in words if word in layouts.PART_NAMES), None)


def _table(file: Path, format: str, columns: Mapping[str, str | None] | None, images: Path) -> list[Found]:
    rows = read_table(file)
    there = columns_of(rows)
    name = layouts.published(there) if format == "auto" and not columns else format
    if name not in layouts.TABLES:
        mapping = layouts.resolve(rows, columns)
        return [one for row in rows for one in layouts.from_columns(row, images, mapping)]
    layout = layouts.TABLES[name]
    if columns:
        raise UserError(f"columns: expected none with {name}, whose tables have names of their own")
    for row in rows:
        if not any(some <= row.values.keys() for some in layout.columns):
            lacking = min((sorted(some - row.values.keys()) for some in layout.columns), key=len)
            raise row.fault(lacking[0], f"a column, as {name} has it")
    return [one for row in rows for one in layout.samples(row, images)]
