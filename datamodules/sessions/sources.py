"""Where each set of sessions is looked for, and how it becomes arrays."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.images import formats
from datamodules.sessions.catalog import SessionSetInfo, describe
from datamodules.sessions.clicks import Array, ClickLog, Items, Part, Raw, Thresholds, offsets_of, split_log
from datamodules.sessions.planted import Planted
from datamodules.sessions.readers import READERS
from leanlight.contracts import UserError, atomic_path

_NPZ = ("train_items", "train_offsets", "test_items", "test_offsets")


def load(
    name: str,
    root: Path | str,
    path: Path | str | None = None,
    rules: Thresholds | None = None,
    planted: Planted | None = None,
    keep: bool = False,
) -> Raw:
    """Find the set `name`, check it, and return its training and test sessions.

    Raises UserError when nothing is found, naming every place, or when a file is damaged.

    Args:
        name: of the catalogue.
        root: folder of data sets.
        path: file of ``npz``, folder of ``pickles``, or folder of a log.
        rules: for logs; default `Thresholds`. Sets that come in parts are taken as they are.
        planted: how ``planted`` is made.
        keep: write the numbers of a log to ``clicks.npz`` beside it, from where they are read from then on.
    """
    info, rules = describe(name), rules or Thresholds()
    root = Path(root).expanduser()
    file = root / "sessions" / f"{name}.npz"
    given = Path(path).expanduser() if path is not None else None
    if name == "planted":
        raw = (planted or Planted()).make()
    elif name == "npz":
        raw = read_npz(_existing(given, info))
    elif name == "pickles":
        raw = read_pickles(_existing(given, info))
    elif given is None and file.is_file():
        raw = read_npz(file)
    else:
        folder = given if given is not None else root / name
        if not folder.is_dir():
            tried = [folder] if given is not None else [file, folder]
            raise UserError(f"{info.title} was not found; tried: {'; '.join(map(str, tried))}; to get it: {info.get}")
        gap = info.session_gap if rules.session_gap is None else rules.session_gap
        return split_log(_log(info, folder, keep), replace(rules, session_gap=gap))
    _only_for_logs(rules, raw.source)
    return raw


def _log(info: SessionSetInfo, folder: Path, keep: bool) -> ClickLog:
    """The log in `folder`: from ``clicks.npz``, unless its own files are newer."""
    kept = folder / "clicks.npz"
    changed = max((file.stat().st_mtime for file in folder.iterdir() if file != kept), default=0.0)
    if kept.is_file() and kept.stat().st_mtime >= changed:
        return read_log(kept)
    log = READERS[info.name](folder)
    if keep:
        write_log(kept, log)
    return log


def write_log(path: Path, log: ClickLog) -> None:
    """Write a log for `read_log`, whole or not at all."""
    texts = {"names": log.items.names, "categories": log.items.categories, "source": log.source}
    arrays = {name: np.frombuffer(json.dumps(text).encode(), np.uint8) for name, text in texts.items()}
    arrays |= {"session": log.session, "item": log.item, "time": log.time}
    arrays |= {"pair_item": log.items.item, "pair_category": log.items.category}
    if log.order is not None:
        arrays["order"] = log.order
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_log(path: Path) -> ClickLog:
    """Read what `write_log` writes."""
    arrays = formats.read_arrays(path)
    try:
        texts = {name: json.loads(arrays[name].tobytes()) for name in ("names", "categories", "source")}
        pairs = arrays["pair_item"], arrays["pair_category"]
        items = Items(tuple(texts["names"]), *pairs, tuple(texts["categories"]))
        clicks = arrays["session"], arrays["item"], arrays["time"], arrays.get("order")
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} is no log that `leanlight data prepare` wrote ({error}); delete it") from error
    return ClickLog(*clicks, items, texts["source"])


def _only_for_logs(rules: Thresholds, source: str) -> None:
    """UserError for a threshold that would do nothing."""
    for field in fields(rules):
        if (value := getattr(rules, field.name)) != field.default:
            raise UserError(
                f"{field.name}: expected its default {field.default} with sessions that come in parts (from {source}), "
                f"got {value}; thresholds are for logs"
            )


def _existing(path: Path | None, info: SessionSetInfo) -> Path:
    if path is None or not path.exists():
        raise UserError(
            f"path: expected the place of {info.name} data, got {str(path) if path else None!r}; {info.get}"
        )
    return path


def read_npz(path: Path) -> Raw:
    """Sessions in arrays: items from 1, ``item_category`` (optional) from 1 by item, both with a row 0 of padding."""
    arrays = formats.read_arrays(path)
    if missing := [name for name in _NPZ if name not in arrays]:
        raise UserError(f"{path} lacks the array {missing[0]!r}; it has {', '.join(sorted(arrays)) or 'none'}")
    parts = {name: _part(path, name, arrays) for name in ("train", "test")}
    most = max(int(part.items.max(initial=0)) for part in parts.values())
    category = arrays.get("item_category", np.zeros(0, np.int64))
    if len(category):
        if category.ndim != 1 or not np.issubdtype(category.dtype, np.integer) or len(category) <= most:
            raise UserError(
                f"{path}: item_category: expected integers for items 0 to {most:,}, "
                f"got {category.dtype} {category.shape}"
            )
        most = len(category) - 1
    item = np.flatnonzero(category[1:] > 0)
    kinds = int(category.max(initial=0))
    items = Items(_numbers(most), item, category[1:][item].astype(np.int64) - 1, _numbers(kinds))
    train, test = (Part(part.items - 1, part.offsets) for part in parts.values())
    return Raw(train, test, items, str(path))


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(1, count + 1)))


def _part(path: Path, name: str, arrays: dict[str, Array]) -> Part:
    items, offsets = arrays[f"{name}_items"], arrays[f"{name}_offsets"]
    for kind, array in (("items", items), ("offsets", offsets)):
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"{path}: {name}_{kind}: expected integers (n,), got {array.dtype} {array.shape}")
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
        raise UserError(
            f"{path}: {name}_offsets: expected an ascent from 0 to {len(items):,}, the clicks in {name}_items"
        )
    if len(items) and items.min() < 1:
        raise UserError(f"{path}: {name}_items: expected items from 1, got {items.min()}")
    return Part(items.astype(np.int64), offsets.astype(np.int64))


def read_pickles(folder: Path) -> Raw:
    """Preprocessed files of SR-GNN and GCE-GNN: all beginnings of each session, with the next item; items from 1.

    They hold no categories. The training sessions are in ``all_train_seq.txt``; without it they are found in
    ``train.txt``.
    """
    whole = folder / "all_train_seq.txt"
    train = _whole(whole) if whole.is_file() else _from_prefixes(folder / "train.txt")
    test = _from_prefixes(folder / "test.txt")
    most = max(int(part.items.max(initial=0)) for part in (train, test))
    items = Items(_numbers(most), np.zeros(0, np.int64), np.zeros(0, np.int64), ())
    return Raw(Part(train.items - 1, train.offsets), Part(test.items - 1, test.offsets), items, str(folder))


def _whole(path: Path) -> Part:
    return _joined(path, formats.unpickle(path, list))


def _from_prefixes(path: Path) -> Part:
    """Whole sessions from (beginnings, next items), where those of a session stand together, the longest first."""
    content = formats.unpickle(path, (tuple, list))
    if len(content) != 2 or not isinstance(content[1], list):
        raise UserError(f"{path}: expected two lists, of beginnings of sessions and of next items")
    prefixes, targets = _joined(path, content[0]), _joined(path, [content[1]])
    if len(prefixes) != len(targets.items):
        raise UserError(f"{path}: expected a next item a beginning, got {len(targets.items):,} for {len(prefixes):,}")
    lengths, ends = prefixes.lengths, prefixes.offsets[1:]
    first = np.ones(len(prefixes), bool)
    first[1:] = lengths[:-1] == 1
    chosen = np.flatnonzero(first)
    # The shorter beginnings say nothing new; they are compared so that a file of another make is not misread.
    within = np.flatnonzero(~first)
    same = (lengths[within] == lengths[within - 1] - 1) & (
        targets.items[within] == prefixes.items[ends[within - 1] - 1]
    )
    if not same.all() or (len(lengths) and lengths[-1] != 1):
        raise UserError(
            f"{path}: expected every beginning of a session, the longest first, as SR-GNN's preprocessing has it"
        )
    begun = prefixes.take(chosen)
    place = begun.offsets[1:]
    return Part(np.insert(begun.items, place, targets.items[chosen]), begun.offsets + np.arange(len(begun) + 1))


def _joined(path: Path, sessions: Any) -> Part:
    """Lists of items as one array."""
    if not isinstance(sessions, list) or not all(isinstance(session, list) for session in sessions):
        raise UserError(f"{path}: expected a list of sessions, each a list of items")
    flat = list(chain.from_iterable(sessions))
    if not all(type(item) is int and 0 < item < 2**31 for item in flat):
        bad = next(item for item in flat if not (type(item) is int and 0 < item < 2**31))
        raise UserError(f"{path}: expected items as numbers from 1, got {bad!r:.50}")
    return Part(np.array(flat, np.int64), offsets_of(np.array([len(session) for session in sessions], np.int64)))
