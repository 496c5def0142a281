"""Sessions of clicks in memory: every click of a session but its first is a case, built by gathers from an index."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from datamodules.loaders import PartLoaders, TrainLoader, train_loader
from datamodules.sessions import sources
from datamodules.sessions.catalog import describe
from datamodules.sessions.clicks import Array, Items, Part, Raw, Thresholds
from datamodules.sessions.planted import Planted
from leanlight.contracts import Catalogue, SessionBatch, SessionMeta, Sessions, Split, UserError
from leanlight.contracts.ranges import OpenUnitInterval, PositiveFloat, PositiveInt, PositiveShare, Seed, Share

Sample = Literal["recent", "random"]
HeadRule = Literal["clicks", "targets"]
LongSessions = Literal["drop", "cut"]
WithoutCategory = Literal["refuse", "drop", "keep"]


class SessionSplit:
    """The cases of whole sessions: click p > 0 of a session is the target, the p clicks before it are what is known.

    Nothing is stored a case: number and place of a case follow from the sessions' offsets.

    Args:
        sessions: each of two clicks or more.
    """

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self._first = sessions.offsets - torch.arange(len(sessions.offsets))  # case with which each session begins

    def __len__(self) -> int:
        return int(self._first[-1])

    def pairs(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Session (N,) of the cases at `index`, and how many of its clicks (N,) come before the target."""
        session = torch.searchsorted(self._first, index, right=True) - 1
        return session, index - self._first[session] + 1

    def batch(self, index: Tensor) -> SessionBatch:
        """The cases at positions `index`, (N,) int64, padded to the longest of them."""
        session, length = self.pairs(index)
        start = self.sessions.offsets[session]
        ahead = torch.arange(int(length.max()))
        known = ahead < length[:, None]
        items = self.sessions.items[torch.where(known, start[:, None] + ahead, 0)].masked_fill_(~known, 0)
        return SessionBatch(items, length, self.sessions.items[start + length], index)

    def batches(self, blocks: Iterable[Tensor]) -> Iterator[SessionBatch]:
        """A batch for each block of positions."""
        return map(self.batch, blocks)


class SessionDataModule(PartLoaders[SessionBatch], pl.LightningDataModule):
    """Sessions of clicks on items with categories, split by time. Satisfies `leanlight.contracts.SessionData`.

    Batches are `SessionBatch`. The sessions of training are sampled, then some are held out for validation. Items are
    those that are clicked in what remains for training, numbered from 1 as they first come; other items leave the
    sessions of validation and test. ``planted``, ``npz`` and ``pickles``, and files ``ROOT/sessions/<name>.npz``, come
    in parts and without rare items: the thresholds are for logs.

    Args:
        dataset: name in ``leanlight data list``.
        root: folder of data sets; default the environment variable ``LEANLIGHT_DATA``, else ``data``.
        path: file of ``npz``, folder of ``pickles``, or folder of a log in place of ``ROOT/<name>``.
        batch_size: training cases a step and process.
        eval_batch_size: cases a step and process elsewhere; default four times `batch_size`.
        min_session_length: clicks of a session, at least 2; applied before and after rare items go.
        min_item_clicks: clicks of an item, in training and test together.
        max_session_length: clicks of a session, of which longer ones are treated by `long_sessions`; None: any number.
        session_gap: hours without a click after which a new session begins; None: as `leanlight data list` says.
        test_days: days before the last click whose sessions are for test.
        sample: which training sessions are taken where not all are: the most recent ones, or some by `split_seed`.
        sample_fraction: share of the training sessions that is taken, in (0, 1].
        train_cases: cases of training and validation at most, in whole sessions, after `sample_fraction`; None: all.
        test_cases: cases of test at most, in whole sessions, taken as `sample` says; None: all.
        val_fraction: share of the training sessions held out for validation, by `split_seed`, in [0, 1).
        head_share: share of the items that is the head, in (0, 1).
        head_rule: ``clicks``: most clicks in training, of equal ones those with lower numbers; ``targets`` (LOAM's):
            most often a target, and all items that are so as often as the last one.
        split_seed: makes samples and hold-out; kept apart from `seed`, so that runs of several seeds share their split.
        seed: makes the order of training cases; default the seed of ``seed_everything``, else 0.
        drop_last: leave out the last, shorter training batch of an epoch.
        download: no set of sessions can be downloaded; here for the command line, which sets it for every kind of data.
        predict_split: part that `predict` goes through: ``train``, ``val`` or ``test``, in order.
        long_sessions: ``drop`` those above `max_session_length`, or ``cut`` them into pieces.
        max_items: most frequent items of a log that are used, before sessions are made; None: all.
        first_sessions: earliest sessions of a log that are used; None: all.
        without_category: what to do where some items have a category and others none: ``refuse``, ``drop`` their
            clicks, or ``keep`` them without one.
        planted: how ``planted`` is made; default `Planted`'s own.

    Attributes (after `setup`): ``meta``; ``catalogue``; ``train_sessions``; ``train_split``, ``val_split`` (None
    without one), ``test_split``.
    """

    meta: SessionMeta
    catalogue: Catalogue
    train_split: SessionSplit
    val_split: SessionSplit | None
    test_split: SessionSplit

    def __init__(
        self,
        dataset: str = "planted",
        root: str | Path | None = None,
        path: str | Path | None = None,
        batch_size: PositiveInt = 128,
        eval_batch_size: PositiveInt | None = None,
        min_session_length: PositiveInt = 2,
        min_item_clicks: PositiveInt = 5,
        max_session_length: PositiveInt | None = None,
        session_gap: PositiveFloat | None = None,
        test_days: PositiveFloat = 7.0,
        sample: Sample = "recent",
        sample_fraction: PositiveShare = 1.0,
        train_cases: PositiveInt | None = None,
        test_cases: PositiveInt | None = None,
        val_fraction: Share = 0.1,
        head_share: OpenUnitInterval = 0.2,
        head_rule: HeadRule = "clicks",
        split_seed: Seed = 0,
        seed: Seed | None = None,
        drop_last: bool = False,
        download: bool = True,
        predict_split: Split = "test",
        long_sessions: LongSessions = "drop",
        max_items: PositiveInt | None = None,
        first_sessions: PositiveInt | None = None,
        without_category: WithoutCategory = "refuse",
        planted: Planted | None = None,
    ) -> None:
        super().__init__()
        _check(dict(locals()))
        self.dataset, self.path, self.planted = dataset, path, planted
        self.root = Path(root or os.environ.get("LEANLIGHT_DATA") or "data")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or 4 * batch_size
        self.rules = Thresholds(
            min_session_length=min_session_length,
            min_item_clicks=min_item_clicks,
            max_session_length=max_session_length,
            long_sessions=long_sessions,
            max_items=max_items,
            first_sessions=first_sessions,
            session_gap=session_gap,
            test_days=test_days,
        )
        self.sample, self.sample_fraction = sample, sample_fraction
        self.train_cases, self.test_cases, self.val_fraction = train_cases, test_cases, val_fraction
        self.head_share, self.head_rule, self.without_category = head_share, head_rule, without_category
        self.split_seed, self.seed, self.drop_last, self.predict_split = split_seed, seed, drop_last, predict_split
        self._raw: Raw | None = None

    def ensure_available(self) -> None:
        """Find and check the data; UserError with every place tried. Starts no run."""
        if self._raw is None and not hasattr(self, "meta"):
            self._raw = sources.load(self.dataset, self.root, self.path, self.rules, self.planted)

    def prepare_data(self) -> None:
        """The same; Lightning calls this on one process a node, before `setup`."""
        self.ensure_available()

    def setup(self, stage: str | None = None) -> None:
        """Build the three splits, the catalogue and `meta`, once."""
        if hasattr(self, "meta"):
            return
        self.ensure_available()
        raw, self._raw = self._raw, None  # the splits hold copies: the source's arrays may go
        assert raw is not None
        parts = self._parts(raw)
        number, names = _numbering(parts["train"], raw.items)
        renumbered = {name: _known(part, number) for name, part in parts.items()}
        for name, part in renumbered.items():
            if not len(part):
                key = "val_fraction" if name == "val" else "dataset"
                raise UserError(
                    f"{key}: no session of the {name} part is left, of {len(parts[name]):,}, without items that "
                    "are not clicked in training; use more training sessions"
                )
        splits = {name: SessionSplit(_sessions(part)) for name, part in renumbered.items()}
        self.train_split, self.test_split, self.val_split = splits["train"], splits["test"], splits.get("val")
        self.catalogue = self._catalogue(raw.items, number, names, renumbered["train"])
        self.meta = self._describe(raw.source, splits)

    # ---- what is used, and as what ----

    def _parts(self, raw: Raw) -> dict[str, Part]:
        """Sessions of each part: sampled, and held out of training."""
        train, test = (self._categorised(part, raw.items) for part in (raw.train, raw.test))
        for name, part in (("training", train), ("test", test)):
            if not len(part):
                raise UserError(f"dataset: the {name} part of {raw.source} has no session of two clicks")
        train = train.take(self._sampled(train, self.sample_fraction, self.train_cases, "train_cases"))
        test = test.take(self._sampled(test, 1.0, self.test_cases, "test_cases"))
        held_out = round(self.val_fraction * len(train))
        if self.val_fraction and not 0 < held_out < len(train):
            raise UserError(f"val_fraction: {self.val_fraction} of {len(train):,} sessions leaves none for a part")
        order = self._shuffled(len(train), "validation")
        parts = {"train": train.take(np.sort(order[held_out:])), "test": test}
        return parts | ({"val": train.take(np.sort(order[:held_out]))} if held_out else {})

    def _categorised(self, part: Part, items: Items) -> Part:
        """Sessions of two clicks or more, where items without category are treated as `without_category` says."""
        clicks = np.ones(len(part.items), bool)
        if len(items.item) and self.without_category != "keep":
            has = np.zeros(len(items.names), bool)
            has[items.item] = True
            clicks = has[part.items]
            if self.without_category == "refuse" and not clicks.all():
                bare = np.unique(part.items[~clicks])
                raise UserError(
                    f"without_category: expected a category for every item, but {len(bare):,} have none, such as "
                    f"{items.names[bare[0]]!r}; drop their clicks (drop) or keep them (keep)"
                )
        return part.keep(clicks, 2)[0]

    def _shuffled(self, count: int, purpose: str) -> Array:
        generator = np.random.Generator(np.random.PCG64([self.split_seed, *purpose.encode()]))
        return np.argsort(generator.random(count), kind="stable")

    def _sampled(self, part: Part, fraction: float, cases: int | None, key: str) -> Array:
        """Positions of the sessions that are used, in order of time; larger samples hold the smaller ones."""
        order = self._shuffled(len(part), key) if self.sample == "random" else np.arange(len(part))[::-1]
        order = order[: max(1, round(fraction * len(part)))]
        if cases is not None:
            order = order[np.cumsum(part.lengths[order] - 1) <= cases]
            if not len(order):
                raise UserError(f"{key}: expected room for a whole session, got {cases}")
        return np.sort(order)

    def _catalogue(self, items: Items, number: Array, names: tuple[str, ...], train: Part) -> Catalogue:
        clicks = np.bincount(train.items, minlength=len(names) + 1)
        of = number[items.item]
        known = np.flatnonzero(of)
        used, category = np.unique(items.category[known], return_inverse=True)
        by_item = np.lexsort((category, of[known]))
        return Catalogue(
            names=names,
            categories=tuple(items.categories[one] for one in used),
            item=torch.from_numpy(of[known][by_item]),
            category=torch.from_numpy(category[by_item]),
            clicks=torch.from_numpy(clicks),
            head=torch.from_numpy(self._head(clicks, train)),
        )

    def _head(self, clicks: Array, train: Part) -> Array:
        """(m + 1,) bool by `head_rule`; clicks: (m + 1,) of each item in training."""
        if self.head_rule == "targets":
            is_target = np.ones(len(train.items), bool)
            is_target[train.offsets[:-1]] = False
            counts = np.bincount(train.items[is_target], minlength=len(clicks))
            counted = np.sort(counts[counts > 0])[::-1]
            return (counts >= counted[int(self.head_share * len(counted))]) & (counts > 0)
        head = np.zeros(len(clicks), bool)
        items = len(clicks) - 1
        head[1 + np.argsort(-clicks[1:], kind="stable")[: max(1, round(self.head_share * items))]] = True
        return head

    def _describe(self, source: str, splits: dict[str, SessionSplit]) -> SessionMeta:
        catalogue, digest = self.catalogue, hashlib.sha256()
        for name in sorted(splits):
            sessions = splits[name].sessions
            digest.update(f"{name} {len(sessions)}".encode())
            digest.update(sessions.items.numpy().data)
            digest.update(sessions.offsets.numpy().data)
        names = hashlib.sha256("\n".join(catalogue.names).encode()).hexdigest()
        digest.update("\n".join([names, *catalogue.categories]).encode())
        for pairs in (catalogue.item, catalogue.category):
            digest.update(pairs.numpy().data)
        return SessionMeta(
            name=self.dataset,
            source=source,
            counts={name: len(splits[name]) if name in splits else 0 for name in ("train", "val", "test")},
            fingerprint=digest.hexdigest(),
            num_items=catalogue.num_items,
            num_categories=len(catalogue.categories),
            num_head=int(catalogue.head.sum()),
            max_length=max(int(split.sessions.offsets.diff().max()) - 1 for split in splits.values()),
            items_sha256=names,
        )

    # ---- loaders ----

    @property
    def train_sessions(self) -> Sessions:
        """The training sessions as a whole, each once."""
        return self.train_split.sessions

    def train_dataloader(self) -> TrainLoader[SessionBatch]:
        """Shuffled batches of train, stateful; in the order of time when Lightning overfits a few batches."""
        split = self.train_split
        return train_loader(self, len(split), split.batches, self.batch_size, self.seed, self.drop_last)


def _numbering(train: Part, items: Items) -> tuple[Array, tuple[str, ...]]:
    """Number of each item of the source, from 1 as they first come in training, 0 for the others; and their names."""
    found, first = np.unique(train.items, return_index=True)
    in_order = found[np.argsort(first)]
    number = np.zeros(len(items.names), np.int64)
    number[in_order] = np.arange(1, len(in_order) + 1)
    return number, tuple(items.names[one] for one in in_order.tolist())


def _known(part: Part, number: Array) -> Part:
    """With the numbers of the catalogue, without items that have none, and without sessions of one click then."""
    items = number[part.items]
    return Part(items, part.offsets).keep(items > 0, 2)[0]


def _sessions(part: Part) -> Sessions:
    return Sessions(torch.from_numpy(part.items), torch.from_numpy(part.offsets))


def _check(given: dict[str, Any]) -> None:
    """Raise UserError for the first argument that makes no sense."""
    info = describe(given["dataset"])
    choices = {"sample": Sample, "head_rule": HeadRule, "predict_split": Split}
    for name, kind in {**choices, "long_sessions": LongSessions, "without_category": WithoutCategory}.items():
        if given[name] not in (known := get_args(kind)):
            raise UserError(f"{name}: expected one of {', '.join(known)}, got {given[name]!r}")
    for name in ("batch_size", "eval_batch_size", "min_item_clicks", "train_cases", "test_cases", "max_items"):
        if given[name] is not None and given[name] < 1:
            raise UserError(f"{name}: expected at least 1, got {given[name]}")
    for name in ("min_session_length", "max_session_length", "first_sessions"):
        if given[name] is not None and given[name] < 2:
            raise UserError(f"{name}: expected at least 2, got {given[name]}")
    for name in ("session_gap", "test_days"):
        if given[name] is not None and not given[name] >= 0:
            raise UserError(f"{name}: expected a number from 0, got {given[name]}")
    if not 0 <= given["val_fraction"] < 1:
        raise UserError(f"val_fraction: expected a number in [0, 1), got {given['val_fraction']}")
    if not 0 < given["sample_fraction"] <= 1:
        raise UserError(f"sample_fraction: expected a number in (0, 1], got {given['sample_fraction']}")
    if not 0 < given["head_share"] < 1:
        raise UserError(f"head_share: expected a number in (0, 1), got {given['head_share']}")
    if info.by_path and given["path"] is None:
        raise UserError(f"path: expected the place of {info.name} data, got none")
    if given["planted"] is not None and info.name != "planted":
        raise UserError(f"planted: expected none with dataset {info.name!r}")
    if given["path"] is not None and info.name == "planted":
        raise UserError(f"path: expected none with dataset planted, which is made; got {given['path']!r}")
