"""Tables of samples as files hold them: rows that know where they stand, and nothing in them is ever run.

CSV, TSV, JSON (a list of objects), JSONL and parquet are read whole; pictures inside them stay encoded.
"""

from __future__ import annotations

import base64
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.safety.pictures import BytesPicture, FilePicture
from leanlight.contracts import HARM_CATEGORIES, MissingExtraError, Picture, UserError, nearest

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv", ".tsv", ".json")
LABELS = {"harmful": True, "unsafe": True, "true": True, "1": True}
LABELS |= {"benign": False, "safe": False, "false": False, "0": False}
_CATEGORY = {name.lower(): name for name in HARM_CATEGORIES}
_NO_CATEGORY = {"", "none", "n/a", "benign"}
LONGEST_CELL = 2**24  # characters; Python's own limit is 2**17, below the length of some answers


@dataclass(frozen=True, slots=True)
class Row:
    """A record.

    Args:
        file: it stands in.
        number: its line in JSONL, else its number among the records, from 1.
        values: by column.
    """

    file: Path
    number: int
    values: Mapping[str, Any]

    def fault(self, column: str, expected: str) -> UserError:
        """An error that names row and column, and shows what stands there."""
        got = f"{self.values[column]!r}" if column in self.values else "none"
        got = got if len(got) <= 60 else f"{got[:57]}..."
        return UserError(f"{self.file} row {self.number}, column {column!r}: expected {expected}, got {got}")

    def text(self, column: str) -> str:
        """Text of a column; empty where there is none."""
        value = self.values.get(column)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self.fault(column, "text")
        try:
            value.encode()
        except UnicodeEncodeError:  # halves of surrogate pairs, which JSON can hold, cannot be written anywhere
            return value.encode("utf-8", "replace").decode()
        return value

    def label(self, column: str) -> bool | None:
        """Whether a column says harmful; None where it is empty."""
        value = self.values.get(column)
        word = "" if value is None else str(value).strip().rstrip(".").lower()
        if word and word not in LABELS:
            raise self.fault(column, f"one of {', '.join(LABELS)}")
        return LABELS.get(word)

    def categories(self, column: str) -> tuple[str, ...]:
        """Names of `HARM_CATEGORIES`, from a list of them or from text with commas between."""
        value = self.values.get(column)
        words = value if isinstance(value, list) else self.text(column).strip("[] ").split(",")
        found = []
        for word in words:
            name = str(word).strip(" \"'.")
            if name.lower() in _CATEGORY:
                found.append(_CATEGORY[name.lower()])
            elif name.lower() not in _NO_CATEGORY:
                raise self.fault(column, f"categories of harm, not {name[:40]!r}{nearest(name, HARM_CATEGORIES)}")
        return tuple(dict.fromkeys(found))

    def picture(self, column: str, images: Path) -> Picture | None:
        """The picture of a column; None where it is empty.

        A file below `images`, a data URI, bytes, or a mapping with ``bytes`` or ``path``, as the library datasets
        writes it. Files elsewhere are refused: a table of a stranger shall not choose what is read, shown and sent.
        """
        value, name = self.values.get(column), f"{self.file.name} row {self.number}"
        if isinstance(value, Mapping):
            name = str(value.get("path") or name)
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None or value == "":
            return None
        if isinstance(value, bytes):
            return BytesPicture(value, name)
        if not isinstance(value, str) or "\0" in value:
            raise self.fault(column, "a picture's path, data URI or bytes")
        if value.startswith("data:"):
            try:
                return BytesPicture(base64.b64decode(value.partition(";base64,")[2], validate=True), name)
            except ValueError as error:
                raise self.fault(column, "a data URI in base64") from error
        if "://" in value:
            raise self.fault(column, "a file (pictures are not fetched)")
        # As text: tables are long, and paths as objects take most of the time of reading one.
        root = os.path.abspath(images)
        path = os.path.normpath(os.path.join(root, value))
        if not path.startswith(os.path.join(root, "")):
            raise self.fault(column, f"a file below {images}, the folder that `images` names")
        return FilePicture(Path(path), value)


def read_table(path: Path) -> list[Row]:
    """The records of a file; UserError when it is absent, damaged or holds none."""
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"{path} is missing")
    readers = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv, ".json": _json}
    rows = [Row(path, number, values) for number, values in readers.get(path.suffix.lower(), _jsonl)(path)]
    if not rows:
        raise UserError(f"{path} holds no row")
    return rows


def columns_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of all columns, in their order; JSON's objects may have different ones."""
    return tuple(dict.fromkeys(name for row in rows for name in row.values))


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} row {number}: expected an object in JSON ({error})") from error
            yield number, _object(path, number, value)


def _json(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        values = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected a list of objects in JSON ({error})") from error
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of objects in JSON, got a {type(values).__name__}")
    for number, value in enumerate(values, 1):
        yield number, _object(path, number, value)


def _object(path: Path, number: int, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{path} row {number}: expected an object in JSON, got a {type(value).__name__}")
    return value


def _csv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    before = csv.field_size_limit(LONGEST_CELL)
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = next(lines, [])
            if len(set(header)) < len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise UserError(f"{path}: expected every column once, got {twice!r} twice")
            for number, cells in enumerate(filter(None, lines), 1):
                if len(cells) != len(header):
                    raise UserError(f"{path} row {number}: expected {len(header)} cells, got {len(cells)}")
                yield number, dict(zip(header, cells, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} after row {number}: cannot be read as CSV in UTF-8 ({error})") from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "safety") from error
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for block in file.iter_batches(batch_size=256):  # few rows: each may hold a picture
                for values in block.to_pylist():
                    number += 1
                    yield number, values
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is truncated or no parquet file ({' '.join(str(error).split())})") from error
