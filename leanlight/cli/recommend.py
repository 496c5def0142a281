"""`leanlight recommend`: the best items for sessions, in the ids of the data that a model was trained on."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from leanlight.cli.arguments import Parser, add_trust, number, output_file
from leanlight.contracts.errors import UserError
from leanlight.contracts.ranges import PositiveInt

_COLUMNS = ("session", "rank", "item", "score", "category", "intent", "popularity")


def main(argv: list[str]) -> int:
    """Recommend with a run's last or best model, or with one of a checkpoint file."""
    args = _arguments(argv)
    sessions = _read(args.input) if args.input else {"1": _split(args.session)}

    from leanlight.experiment import load

    model: Any = load(args.source, args.checkpoint, args.trust)
    if not hasattr(model, "recommend"):
        raise UserError(f"source: {args.source} holds a {type(model).__name__}, which recommends nothing")
    options = {"exclude_seen": args.exclude_seen, "category": args.category}
    lists = model.recommend(list(sessions.values()), args.k, **options)
    rows = [
        (session, rank, one.item, one.score, one.category, one.intent, "head" if one.head else "tail")
        for session, found in zip(sessions, lists, strict=True)
        for rank, one in enumerate(found, 1)
    ]
    if args.output is None:
        _show(rows)
    else:
        _write(args.output, rows)
        print(f"{len(rows):,} recommendations for {len(sessions):,} session(s): {args.output}")
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="leanlight recommend", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder or checkpoint file")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--session", metavar="ITEMS", help="clicked items, first to last, with commas between them")
    given.add_argument("--input", type=Path, metavar="CSV", help="sessions: columns session and item, a row a click")
    parser.add_argument("--output", type=output_file, metavar="CSV", help="file to write; needed with --input")
    parser.add_argument("-k", type=number(PositiveInt), default=10, help="items of a list (default: %(default)s)")
    parser.add_argument("--exclude-seen", action="store_true", help="leave out what the session has clicked")
    parser.add_argument("--category", metavar="NAME", help="recommend items of this category alone")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which one of a run folder")
    add_trust(parser)
    args = parser.parse_args(argv)
    if args.input and args.output is None:
        raise UserError("--output: expected a file to write, since --input has many sessions")
    return args


def _split(session: str) -> list[str]:
    items = [item.strip() for item in session.split(",")]
    if not all(items):
        raise UserError(f"--session: expected items with commas between them, got {session!r}")
    return items


def _read(path: Path) -> dict[str, list[str]]:
    """Items of each session, in the order of the rows."""
    sessions: dict[str, list[str]] = {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            for column in ("session", "item"):
                if column not in (rows.fieldnames or ()):
                    raise UserError(f"--input: {path} lacks the column {column!r}; it has {rows.fieldnames or 'none'}")
            for row in rows:
                if not (row["session"] and row["item"]):
                    raise UserError(f"--input: {path}, line {rows.line_num}: expected a session and an item")
                sessions.setdefault(row["session"], []).append(row["item"])
    except OSError as error:
        raise UserError(f"--input: cannot read {path} ({error.strerror})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--input: {path} is no CSV file in UTF-8 ({error})") from error
    if not sessions:
        raise UserError(f"--input: {path} has no session")
    return sessions


def _show(rows: Iterable[tuple[Any, ...]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in _COLUMNS[1:]:
        table.add_column(column, justify="right" if column in ("rank", "score") else "left")
    for _, rank, item, score, *facts in rows:
        table.add_row(str(rank), item, f"{score:.4f}", *facts)
    Console(highlight=False, markup=False).print(table)


def _write(path: Path, rows: Iterable[tuple[Any, ...]]) -> None:
    from leanlight.contracts.files import atomic_write

    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([_COLUMNS, *rows])
    try:
        atomic_write(path, text.getvalue())
    except OSError as error:
        raise UserError(f"--output: cannot write {path} ({error.strerror})") from error
