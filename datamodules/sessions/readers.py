"""Click logs in the columns that their publishers gave them, read in blocks by pyarrow.

Only the columns that are needed are kept, as numbers. Every reader takes the folder with the files of the catalogue's
entry and returns a `ClickLog`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.sessions.clicks import DAY, Array, ClickLog, Items, offsets_of, spans
from leanlight.contracts import MissingExtraError, UserError

BLOCK = 16 * 2**20  # bytes of text that are parsed at a time
PAIRS = 2**22  # rows whose items and categories are counted at a time
# What a column may hold, and how errors call it.
ID, DAYS, MOMENTS = "an id", "a day like 2016-05-09", "a time like 2014-04-07T10:51:09.277Z"
WHOLE, SECONDS, TEXT = "a whole number", "seconds", "text"


@dataclass(frozen=True)
class Coded:
    """Ids as numbers: that of ``names[i]`` is i, in order of appearance."""

    codes: Array
    names: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """How a file of clicks, or of facts of items, is written.

    Args:
        columns: name → kind of what it holds. Names are compared without case, ``_`` and RecBole's types (``:token``).
        delimiter: between the fields.
        header: names of all columns, where the file may lack a first line with them.
        quoted: whether a field may stand in quotation marks.
        encoding: of the text.
        only: column of ids and the value of the rows that are read.
    """

    columns: Mapping[str, str]
    delimiter: str = ","
    header: Sequence[str] = ()
    quoted: bool = True
    encoding: str = "utf8"
    only: tuple[str, str] | None = None


def read_columns(path: Path, layout: Layout) -> dict[str, Any]:
    """Columns of a file by name: `Coded` ids or text, or numbers (n,): whole, or seconds.

    Raises:
        MissingExtraError: pyarrow is not installed.
        UserError: a file that is absent, a column that is missing, or a value of another kind.
    """
    names, has_header = _header(path, layout)
    wanted = {_plain(name): name for name in [*layout.columns, *(layout.only or ())[:1]]}
    if missing := [name for plain, name in wanted.items() if plain not in map(_plain, names)]:
        raise UserError(f"{path}: expected a column {missing[0]!r}, got {', '.join(map(repr, names))}")
    names = [wanted.get(_plain(name), name) for name in names]
    kinds = {**layout.columns, **({layout.only[0]: ID} if layout.only else {})}
    pieces: dict[str, list[Any]] = {name: [] for name in layout.columns}
    for block in _blocks(path, layout, names, kinds, has_header):
        for name, kind in layout.columns.items():
            column = block[name]
            pieces[name].append(column.dictionary_encode() if kind in (ID, TEXT) else _numbers(path, name, column))
    return {
        name: _coded(path, name, kind, pieces[name]) if kind in (ID, TEXT) else _joined(pieces[name])
        for name, kind in layout.columns.items()
    }


def _plain(name: str) -> str:
    return name.split(":")[0].replace("_", "").replace(" ", "").lower()


def _header(path: Path, layout: Layout) -> tuple[list[str], bool]:
    """Names of the columns, and whether the first line holds them."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    with open(path, encoding=layout.encoding, errors="replace") as file:
        first = file.readline().rstrip("\r\n")
    if not first:
        raise UserError(f"{path} is empty")
    names = [name.strip('"\ufeff ') for name in first.split(layout.delimiter)]
    if layout.header and not any(_plain(name) in map(_plain, layout.columns) for name in names):
        return list(layout.header), False
    return names, True


def _blocks(path: Path, layout: Layout, names: list[str], kinds: Mapping[str, str], has_header: bool) -> Any:
    """Record batches of the wanted columns and rows."""
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        from pyarrow import csv
    except ModuleNotFoundError as error:
        raise MissingExtraError("pyarrow", "recsys") from error
    types = {ID: pa.string(), TEXT: pa.string(), DAYS: pa.timestamp("s"), MOMENTS: pa.timestamp("ms", tz="UTC")}
    types |= {WHOLE: pa.int64(), SECONDS: pa.float64()}
    quote: Any = '"' if layout.quoted else False
    try:
        reader = csv.open_csv(
            path,
            csv.ReadOptions(column_names=names, skip_rows=int(has_header), block_size=BLOCK, encoding=layout.encoding),
            csv.ParseOptions(delimiter=layout.delimiter, quote_char=quote),
            csv.ConvertOptions(
                column_types={name: types[kind] for name, kind in kinds.items()},
                include_columns=list(kinds),
                null_values=[],
            ),
        )
        for block in reader:
            yield block.filter(pc.equal(block[layout.only[0]], layout.only[1])) if layout.only else block
    except pa.ArrowInvalid as error:
        raise _explained(path, names, kinds, str(error)) from error


def _explained(path: Path, names: Sequence[str], kinds: Mapping[str, str], text: str) -> UserError:
    if text.startswith("Empty CSV"):
        return UserError(f"{path} holds no rows")
    found = re.search(r"In CSV column #(\d+): .*invalid value '(.*)'", text, re.DOTALL)
    if found is None:
        return UserError(f"{path} cannot be read: {' '.join(text.split())[:200]}")
    name = names[int(found[1])]
    return UserError(f"{path}: {name}: expected {kinds[name]}, got {found[2]!r:.60}")


def _numbers(path: Path, name: str, column: Any) -> Array:
    import pyarrow as pa

    if pa.types.is_timestamp(column.type):
        scale = {"s": 1, "ms": 1000}[column.type.unit]
        return column.cast(pa.int64()).to_numpy(zero_copy_only=False) // scale
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind != "f":
        return values
    if not np.isfinite(values).all():
        raise UserError(f"{path}: {name}: expected seconds, got {values[~np.isfinite(values)][0]}")
    return np.floor(values).astype(np.int64)


def _joined(pieces: list[Array]) -> Array:
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def _coded(path: Path, name: str, kind: str, pieces: list[Any]) -> Coded:
    """One numbering of ids for all blocks."""
    import pyarrow as pa

    if not pieces:
        raise UserError(f"{path} holds no row that is wanted")
    column = pa.chunked_array(pieces).unify_dictionaries()
    names = column.chunk(0).dictionary.to_pylist()
    if kind == ID and "" in names:
        raise UserError(f"{path}: {name}: expected an id in every row, got an empty field")
    return Coded(np.concatenate([chunk.indices.to_numpy() for chunk in column.chunks]), tuple(names))


def most_frequent(item: Array, category: Coded, names: tuple[str, ...], ignored: Sequence[str] = ()) -> Items:
    """Items, each with the category that its rows name most often; of equals the one that comes first in the file.

    Args:
        item: (n,) number of the item of each row; -1: none that is clicked.
        category: of each row.
        names: of the items.
        ignored: names that are no category; an empty one never is.
    """
    kinds = len(category.names)
    is_kind = ~np.isin(category.names, ["", *ignored])
    pairs, counts = [], []
    for start in range(0, len(item), PAIRS):  # sorting all rows at once would take several times their memory
        of, kind = item[start : start + PAIRS], category.codes[start : start + PAIRS]
        counted = is_kind[kind] & (of >= 0)
        pair, count = np.unique(of[counted].astype(np.int64) * kinds + kind[counted], return_counts=True)
        pairs.append(pair)
        counts.append(count)
    pair, place = np.unique(np.concatenate(pairs), return_inverse=True)
    count = np.bincount(place, np.concatenate(counts))
    by = np.lexsort((pair % kinds, -count, pair // kinds))
    best = pair[by][np.unique((pair // kinds)[by], return_index=True)[1]]
    return Items(names, best // kinds, best % kinds, category.names)


def _matched(ids: Coded, names: tuple[str, ...]) -> Array:
    """(n,) position of each id in `names`, -1 where it is not there."""
    place = {name: position for position, name in enumerate(names)}
    return np.array([place.get(name, -1) for name in ids.names], np.int64)[ids.codes]


def _log(session: Coded, item: Coded, time: Array, items: Items, path: Path, order: Array | None = None) -> ClickLog:
    return ClickLog(session.codes, item.codes, time, order, items, str(path))


def diginetica(folder: Path) -> ClickLog:
    """``train-item-views.csv``, a session's clicks by ``timeframe``, with ``product-categories.csv``."""
    path = folder / "train-item-views.csv"
    kinds = {"sessionId": ID, "itemId": ID, "timeframe": WHOLE, "eventdate": DAYS}
    clicks = read_columns(path, Layout(kinds, ";"))
    products = read_columns(folder / "product-categories.csv", Layout({"itemId": ID, "categoryId": TEXT}, ";"))
    item = clicks["itemId"]
    items = most_frequent(_matched(products["itemId"], item.names), products["categoryId"], item.names)
    return _log(clicks["sessionId"], item, clicks["eventdate"], items, path, clicks["timeframe"])


def tmall(folder: Path) -> ClickLog:
    """``user_log_format1.csv`` of IJCAI-15: clicks (action 0) of users, by month and day of 2014."""
    path = folder / "user_log_format1.csv"
    kinds = {"user_id": ID, "item_id": ID, "cat_id": TEXT, "time_stamp": WHOLE}
    clicks = read_columns(path, Layout(kinds, only=("action_type", "0")))
    days = np.arange(np.datetime64("2014-01-01"), np.datetime64("2015-01-01"))
    months = days.astype("datetime64[M]")
    number = np.full(1232, -1)  # of the day in the year, by month and day
    number[(months.astype(int) % 12 + 1) * 100 + (days - months).astype(int) + 1] = np.arange(365)
    stamps = clicks["time_stamp"]
    day = number[np.where((stamps < 0) | (stamps >= len(number)), 0, stamps)]
    if (day < 0).any():
        raise UserError(f"{path}: time_stamp: expected month and day like 1111, got {stamps[day < 0][0]}")
    start = int(days[0].astype("datetime64[s]").astype(np.int64))
    item = clicks["item_id"]
    items = most_frequent(item.codes, clicks["cat_id"], item.names)
    return _log(clicks["user_id"], item, start + DAY * day, items, path)


def retailrocket(folder: Path) -> ClickLog:
    """Views of ``events.csv``; an item's most frequent ``categoryid`` in ``item_properties_part*.csv``."""
    path = folder / "events.csv"
    kinds = {"timestamp": WHOLE, "visitorid": ID, "itemid": ID}
    clicks = read_columns(path, Layout(kinds, only=("event", "view")))
    item = clicks["itemid"]
    files = sorted(folder.glob("item_properties*.csv"))
    if not files:
        raise UserError(f"{folder / 'item_properties_part1.csv'} is missing")
    layout = Layout({"itemid": ID, "value": TEXT}, only=("property", "categoryid"))
    tables = [read_columns(file, layout) for file in files]
    of = np.concatenate([_matched(table["itemid"], item.names) for table in tables])
    items = most_frequent(of, _concatenated([table["value"] for table in tables]), item.names)
    return _log(clicks["visitorid"], item, clicks["timestamp"] // 1000, items, path)


def _concatenated(columns: Sequence[Coded]) -> Coded:
    """Ids of several files with one numbering."""
    names = tuple(dict.fromkeys(chain.from_iterable(column.names for column in columns)))
    return Coded(np.concatenate([_matched(column, names) for column in columns]), names)


def yoochoose(folder: Path) -> ClickLog:
    """``yoochoose-clicks.dat``, with or without names of columns; category 0 says that there is none."""
    path = folder / "yoochoose-clicks.dat"
    kinds = {"session_id": ID, "timestamp": MOMENTS, "item_id": ID, "category": TEXT}
    clicks = read_columns(path, Layout(kinds, header=("session_id", "timestamp", "item_id", "category")))
    item = clicks["item_id"]
    items = most_frequent(item.codes, clicks["category"], item.names, ignored=["0"])
    return _log(clicks["session_id"], item, clicks["timestamp"], items, path)


def nowplaying(folder: Path) -> ClickLog:
    """``nowplaying.csv``, between tabs: ``SessionId``, ``ItemId``, ``Time`` in seconds, and ``ArtistId``."""
    path = folder / "nowplaying.csv"
    kinds = {"SessionId": ID, "ItemId": ID, "Time": SECONDS, "ArtistId": TEXT}
    clicks = read_columns(path, Layout(kinds, "\t", quoted=False))
    item = clicks["ItemId"]
    items = most_frequent(item.codes, clicks["ArtistId"], item.names)
    return _log(clicks["SessionId"], item, clicks["Time"], items, path)


def movielens(folder: Path) -> ClickLog:
    """Ratings as clicks, genres as categories: ``u.data`` and ``u.item``, or RecBole's ``*.inter`` and ``*.item``."""
    kinds = {"user_id": ID, "item_id": ID, "timestamp": SECONDS}
    if (path := folder / "u.data").is_file() or not (found := sorted(folder.glob("*.inter"))):
        clicks = read_columns(path, Layout(kinds, "\t", ("user_id", "item_id", "rating", "timestamp"), quoted=False))
        films, names = _flags(folder / "u.item", clicks["item_id"].names)
    else:
        path = found[0]
        clicks = read_columns(path, Layout(kinds, "\t", quoted=False))
        films, names = _genres(path.with_suffix(".item"), clicks["item_id"].names)
    items = Items(clicks["item_id"].names, films[:, 0], films[:, 1], names)
    return _log(clicks["user_id"], clicks["item_id"], clicks["timestamp"], items, path)


# fmt: off
GENRES = [
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
]
# fmt: on


def _flags(path: Path, names: tuple[str, ...]) -> tuple[Array, tuple[str, ...]]:
    """(P, 2) pairs of item and genre of ``u.item``: a column of 0 or 1 a genre, between ``|``."""
    header = ["item_id", "title", "release", "video", "url", *GENRES]
    layout = Layout(dict.fromkeys(GENRES, WHOLE) | {"item_id": ID}, "|", header, quoted=False, encoding="latin1")
    table = read_columns(path, layout)
    flags = np.stack([table[genre] for genre in GENRES], axis=1)
    row, genre = flags.nonzero()
    return _pairs(_matched(table["item_id"], names)[row], genre), tuple(GENRES)


def _genres(path: Path, names: tuple[str, ...]) -> tuple[Array, tuple[str, ...]]:
    """(P, 2) pairs of item and genre of RecBole's ``.item``: names between spaces in ``class``, or ``genre``."""
    column = next((name for name in _header(path, Layout({}, "\t"))[0] if _plain(name) in ("class", "genre")), "class")
    table = read_columns(path, Layout({"item_id": ID, column: TEXT}, "\t", quoted=False))
    of, lists = _matched(table["item_id"], names), [text.split() for text in table[column].names]
    genres = {name: number for number, name in enumerate(dict.fromkeys(chain.from_iterable(lists)))}
    count = np.array([len(one) for one in lists])
    flat = np.array([genres[name] for one in lists for name in one], np.int64)
    code = table[column].codes
    each = count[code]
    return _pairs(np.repeat(of, each), flat[spans(offsets_of(count)[:-1][code], each)]), tuple(genres)


def _pairs(item: Array, category: Array) -> Array:
    """(P, 2) different pairs, of items that are clicked."""
    return np.unique(np.column_stack([item, category])[item >= 0], axis=0)


READERS: dict[str, Callable[[Path], ClickLog]] = {
    "diginetica": diginetica,
    "tmall": tmall,
    "retailrocket": retailrocket,
    "yoochoose": yoochoose,
    "nowplaying": nowplaying,
    "movielens": movielens,
}
