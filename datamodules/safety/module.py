"""Samples to be judged, in memory: batches of tokens, made by the encoder of whoever learns from them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from datamodules.catalog import place_of
from datamodules.loaders import PartLoaders, TrainLoader, train_loader
from datamodules.safety.catalog import SafetySetInfo, describe
from datamodules.safety.layouts import Found
from datamodules.safety.order import LengthOrder
from datamodules.safety.readers import read_parts, require_pictures
from datamodules.safety.shapes import Shapes
from datamodules.safety.splits import Scheme, deal
from datamodules.safety.xstest import XSTest
from leanlight.contracts import (
    IGNORED,
    SAFETY_FIELDS,
    SafetyMeta,
    SafetySample,
    SampleEncoder,
    Split,
    TokenBatch,
    UserError,
    derived_seed,
    learned_positions,
    nearest,
)
from leanlight.contracts.ranges import NonNegativeInt, OpenUnitInterval, PositiveInt, Seed, Share

PARTS: tuple[Split, ...] = get_args(Split)


class SafetySplit:
    """A part of the samples, as batches.

    Args:
        data: whose samples they are; it knows the encoder.
        samples: of the part.
        targets: whether batches hold the answers that a judge shall learn, too.
        cache_mb: keep encoded samples if all of them take no more than that; 0: never.
    """

    def __init__(
        self, data: SafetyDataModule, samples: Sequence[SafetySample], targets: bool = False, cache_mb: int = 0
    ) -> None:
        self.data, self.samples, self.targets = data, samples, targets
        self._room, self._kept = cache_mb * 2**20, dict[int, TokenBatch]()

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, index: Tensor) -> TokenBatch:
        """The samples at positions `index` of the part, (N,) int64."""
        positions = index.tolist()
        if all(position in self._kept for position in positions):
            return _joined([self._kept[position] for position in positions], index, self.data.encoder.pad_id)
        batch = self.data.encoder.encode([self.samples[position] for position in positions], index, self.targets)
        if self._room:
            rows = _rows(batch)
            # By the first batch: a cache that holds a part of the samples would hardly ever hold a whole batch.
            if self._kept or sum(map(_bytes, rows)) / len(rows) * len(self) <= self._room:
                self._kept.update(zip(positions, rows, strict=True))
            else:
                self._room = 0
        return batch

    def batches(self, blocks: Iterable[Tensor]) -> Iterator[TokenBatch]:
        """A batch for each block of positions."""
        return map(self.batch, blocks)


def _rows(batch: TokenBatch) -> list[TokenBatch]:
    """Every item as a batch of its own, without padding."""
    rows = []
    for position in range(len(batch)):
        row = batch.select(torch.tensor([position]))
        real = row.attention_mask[0] == 1
        # Copies, so that no row keeps the memory of its whole batch.
        rows.append(
            replace(
                row,
                input_ids=row.input_ids[:, real],
                attention_mask=row.attention_mask[:, real],
                labels=None if row.labels is None else row.labels[:, real],
                token_types=row.token_types[:, real],
                pixel_values=tuple(patches.clone() for patches in row.pixel_values),
            )
        )
    return rows


def _bytes(row: TokenBatch) -> int:
    return 32 * row.input_ids.numel() + sum(patches.nbytes for patches in row.pixel_values)  # four int64 a token


def _joined(rows: Sequence[TokenBatch], index: Tensor, pad_id: int) -> TokenBatch:
    """Batches of one item with targets as one batch, padded on the right."""

    def stacked(name: str, filling: int) -> Tensor:
        return pad_sequence([getattr(row, name)[0] for row in rows], batch_first=True, padding_value=filling)

    labels = stacked("labels", IGNORED)
    return TokenBatch(
        input_ids=stacked("input_ids", pad_id),
        attention_mask=stacked("attention_mask", 0),
        labels=labels,
        token_types=stacked("token_types", 0),
        pixel_values=tuple(row.pixel_values[0] for row in rows),
        grid=torch.cat([row.grid for row in rows]),
        index=index,
        learned=learned_positions(labels),
    )


class SafetyDataModule(PartLoaders[TokenBatch], pl.LightningDataModule):
    """Instructions, pictures and answers with labels of harm. Satisfies `leanlight.contracts.SafetyData`.

    Batches are `TokenBatch`, made by the encoder of the module that trains, or of one that is set by hand. Those of
    training and validation hold the answers that a judge shall learn behind the questions, those of test and
    predictions questions alone. Training takes samples of like lengths together, the others go by the samples' order.
    Samples that nobody has labelled are left out, unless none has a label: then all are in
    the test part, for `predict` alone.

    Args:
        dataset: name in ``leanlight data list``.
        root: folder of data sets; default the environment variable ``LEANLIGHT_DATA``, else ``data``.
        path: of ``jsonl``, ``csv`` and ``parquet``; or of a published set's files.
        images: folder of the pictures that a table names; None: the folder of the table.
        columns: of ``jsonl``, ``csv`` and ``parquet``: the table's columns by our names, where they differ.
        batch_size: training samples a step and process.
        eval_batch_size: samples a step and process elsewhere; default four times `batch_size`.
        split: what keeps samples together: ``file``, the publisher's parts; ``group``, those of a prompt or a picture;
            ``topic``; ``source``, the model that answered. None: ``file`` where there are parts for train and test,
            else ``group``.
        val_fraction: share of the training samples held out for validation where the split has no such part, in [0, 1).
        test_fraction: share of the samples for test where the split has no parts, in (0, 1).
        fold: which of `folds` equal parts is for test, from 0, instead of a fraction; None: no folds.
        folds: number of such parts.
        train_items: samples of training that are kept; those of a smaller number are among those of a larger one.
            None: all.
        split_seed: makes hold-outs; kept apart from `seed`, so that runs of several seeds share their split.
        seed: makes the order of training samples; default the seed of ``seed_everything``, else 0.
        drop_last: leave out the last, shorter training batch of an epoch.
        predict_split: part that `predict` goes through: ``train``, ``val`` or ``test``, in order.
        length_window: training batches that are sorted by length together; 0: batches of any lengths.
        cache_mb: keep encoded samples of training, and those of validation, in memory if all of them take no more than
            that; 0: never.
        shapes: how ``shapes`` are made; default `Shapes`' own.
        xstest: how ``xstest`` is read; default `XSTest`'s own.

    Attributes: ``encoder``, as above; after `setup`, ``meta``, ``train_split``, ``val_split``, ``test_split``, of which
    the first two may be None.
    """

    meta: SafetyMeta
    train_split: SafetySplit | None
    val_split: SafetySplit | None
    test_split: SafetySplit

    def __init__(
        self,
        dataset: str = "shapes",
        root: str | Path | None = None,
        path: str | Path | None = None,
        images: str | Path | None = None,
        columns: dict[str, str | None] | None = None,
        batch_size: PositiveInt = 16,
        eval_batch_size: PositiveInt | None = None,
        split: Scheme | None = None,
        val_fraction: Share = 0.1,
        test_fraction: OpenUnitInterval = 0.2,
        fold: NonNegativeInt | None = None,
        folds: PositiveInt = 5,
        train_items: PositiveInt | None = None,
        split_seed: Seed = 0,
        seed: Seed | None = None,
        drop_last: bool = False,
        predict_split: Split = "test",
        length_window: NonNegativeInt = 100,
        cache_mb: NonNegativeInt = 1024,
        shapes: Shapes | None = None,
        xstest: XSTest | None = None,
    ) -> None:
        super().__init__()
        self.info = _check(dict(locals()))
        self.dataset, self.path, self.images, self.columns = dataset, path, images, columns
        self.root = Path(root or os.environ.get("LEANLIGHT_DATA") or "data")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or 4 * batch_size
        self.split, self.fold, self.folds, self.train_items = split, fold, folds, train_items
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.split_seed, self.seed, self.drop_last, self.predict_split = split_seed, seed, drop_last, predict_split
        self.length_window, self.cache_mb = length_window, cache_mb
        self.shapes, self.xstest = shapes or Shapes(), xstest or XSTest()
        self._found: list[Found] | None = None
        self._encoder: SampleEncoder | None = None

    @property
    def encoder(self) -> SampleEncoder:
        """What makes batches of samples: one that is set, else that of the module in training."""
        if self._encoder is not None:
            return self._encoder
        encoder = getattr(self.trainer and self.trainer.lightning_module, "encoder", None)
        if encoder is None:
            raise UserError("data: batches need an encoder; expected a module that has one, or data.encoder = …")
        return encoder

    @encoder.setter
    def encoder(self, encoder: SampleEncoder) -> None:
        self._encoder = encoder

    # ---- parts ----

    def ensure_available(self) -> None:
        """Find and read the data; UserError with every place tried. Starts no run."""
        if self._found is not None or hasattr(self, "meta"):
            return
        self._source = "made"
        if self.dataset == "shapes":
            self._found = self.shapes.make()
            return
        place = place_of(self.info, self.root, self.path)
        self._source = str(place)
        if self.dataset == "xstest":
            self._found = [(sample, None) for sample in self.xstest.read(place)]
        else:
            self._found = read_parts(place, self.dataset, self.columns, self.images)
        require_pictures([sample for sample, _ in self._found])

    def prepare_data(self) -> None:
        """The same; Lightning calls this on one process a node, before `setup`."""
        self.ensure_available()

    def setup(self, stage: str | None = None) -> None:
        """Build the parts and `meta`, once."""
        if hasattr(self, "meta"):
            return
        self.ensure_available()
        found, self._found = self._found, None
        assert found is not None
        self._samples = self._parts(found)
        train, val, test = (self._samples[part] for part in PARTS)
        self.train_split = SafetySplit(self, train, True, self.cache_mb) if train else None
        self.val_split = SafetySplit(self, val, True, self.cache_mb) if val else None
        self.test_split = SafetySplit(self, test)
        self.meta = self._describe()

    def samples(self, split: str) -> Sequence[SafetySample]:
        """The samples of a part, by their index."""
        return self._samples[split]  # type: ignore[index]

    def texts(self) -> Iterator[str]:
        """All text of the training part, for a tokenizer of one's own."""
        for sample in self._samples["train"]:
            yield from filter(None, (sample.instruction, sample.response, sample.explanation))

    def _parts(self, found: list[Found]) -> dict[Split, list[SafetySample]]:
        labelled = [one for one in found if one[0].labels]
        if not labelled:
            return {"train": [], "val": [], "test": [sample for sample, _ in found]}
        named: dict[Split | None, list[SafetySample]] = {}
        for sample, part in labelled:
            named.setdefault(part, []).append(sample)
        published = bool(named.get("train") and named.get("test"))
        scheme = self.split or ("file" if published and self.fold is None else "group")
        if scheme == "file" and not published:
            raise UserError(f"split: file, but {self._source} tells no parts for train and test; use split: group")
        parts: dict[Split, list[SafetySample]] = {part: named.get(part, []) for part in PARTS}
        if scheme != "file":
            parts["train"], parts["test"] = self._tested([sample for sample, _ in labelled], scheme)
            parts["val"] = []
        if not parts["val"] and self.val_fraction:
            parts["train"], parts["val"] = self._held_out(parts["train"], scheme, self.val_fraction, "validation")
        for name, samples in parts.items():
            if not samples and (name != "val" or self.val_fraction):
                raise UserError(
                    f"split: {scheme} leaves no sample of {self._source} for {name}; use another, or other fractions"
                )
        if self.train_items is not None:
            parts["train"] = self._first(parts["train"], self.train_items)
        return parts

    def _tested(self, samples: list[SafetySample], scheme: str) -> tuple[list[SafetySample], list[SafetySample]]:
        """Samples that stay, and those for test."""
        if self.fold is None:
            return self._held_out(samples, scheme, self.test_fraction, "test")
        dealt = deal(samples, scheme, [1 / self.folds] * self.folds, self.split_seed, "folds")
        return _apart(samples, dealt == self.fold)

    def _held_out(
        self, samples: list[SafetySample], scheme: str, fraction: float, purpose: str
    ) -> tuple[list[SafetySample], list[SafetySample]]:
        dealt = deal(samples, scheme, [1 - fraction, fraction], self.split_seed, purpose)
        return _apart(samples, dealt == 1)

    def _first(self, samples: list[SafetySample], count: int) -> list[SafetySample]:
        """`count` of the samples, in their order."""
        if count > len(samples):
            raise UserError(f"train_items: expected at most {len(samples):,}, the training samples, got {count:,}")
        generator = torch.Generator().manual_seed(derived_seed(self.split_seed, "train_items"))
        chosen = torch.randperm(len(samples), generator=generator)[:count].sort().values
        return [samples[row] for row in chosen.tolist()]

    def _describe(self) -> SafetyMeta:
        digest = hashlib.sha256()
        for part in PARTS:
            for sample in self._samples[part]:
                texts = [part, sample.id, sample.instruction, sample.response, sample.explanation, *sample.categories]
                picture = sample.image and sample.image.sha256
                digest.update(json.dumps([texts, picture, sorted(sample.labels.items())]).encode())
        fields = [f for f in SAFETY_FIELDS if any(f in s.labels for part in self._samples.values() for s in part)]
        return SafetyMeta(
            name=self.dataset,
            source=self._source,
            counts={part: len(self._samples[part]) for part in PARTS},
            fingerprint=digest.hexdigest(),
            fields=tuple(fields),
            pictures={part: sum(s.image is not None for s in self._samples[part]) for part in PARTS},
            harmful={
                f: {part: sum(s.labels.get(f, False) for s in self._samples[part]) for part in PARTS} for f in fields
            },
        )

    # ---- loaders ----

    def train_dataloader(self) -> TrainLoader[TokenBatch]:
        """Batches of train, stateful; in the samples' order when Lightning overfits a few batches."""
        split = self.train_split
        if split is None:
            raise UserError(f"dataset: the samples of {self.meta.source} have no labels, so nothing can be trained")
        arguments: dict[str, Any] = {}
        if self.length_window:
            lengths = self.encoder.lengths(split.samples, targets=True)
            arguments["order"] = partial(LengthOrder, lengths, window=self.length_window)
        return train_loader(self, len(split), split.batches, self.batch_size, self.seed, self.drop_last, **arguments)

    def _part(self, name: Split) -> SafetySplit:
        split: SafetySplit | None = {"train": self.train_split, "val": self.val_split, "test": self.test_split}[name]
        if split is None:
            raise UserError(f"predict_split: {name}, but that part has no sample")
        # Predictions continue questions: of the training part, too, without the answers to learn.
        return SafetySplit(self, split.samples)


def _apart(samples: list[SafetySample], chosen: Any) -> tuple[list[SafetySample], list[SafetySample]]:
    """The samples that are not chosen, and those that are."""
    marked = list(zip(samples, chosen.tolist(), strict=True))
    return [sample for sample, is_chosen in marked if not is_chosen], [
        sample for sample, is_chosen in marked if is_chosen
    ]


def _check(given: Mapping[str, Any]) -> SafetySetInfo:
    """The set's entry; UserError for the first argument that makes no sense."""
    info = describe(given["dataset"])
    for name, known in (("predict_split", PARTS), ("split", (*get_args(Scheme), None))):
        if given[name] not in known:
            shown = [one for one in known if one]
            raise UserError(
                f"{name}: expected one of {', '.join(shown)}, got {given[name]!r}{nearest(str(given[name]), shown)}"
            )
    for name in ("batch_size", "eval_batch_size", "train_items"):
        if given[name] is not None and given[name] < 1:
            raise UserError(f"{name}: expected at least 1, got {given[name]}")
    for name in ("length_window", "cache_mb"):
        if given[name] < 0:
            raise UserError(f"{name}: expected at least 0, got {given[name]}")
    if not 0 <= given["val_fraction"] < 1:
        raise UserError(f"val_fraction: expected a number in [0, 1), got {given['val_fraction']}")
    if not 0 < given["test_fraction"] < 1:
        raise UserError(f"test_fraction: expected a number in (0, 1), got {given['test_fraction']}")
    if given["folds"] < 2:
        raise UserError(f"folds: expected at least 2, got {given['folds']}")
    if given["fold"] is not None and not 0 <= given["fold"] < given["folds"]:
        raise UserError(f"fold: expected 0 to {given['folds'] - 1}, got {given['fold']}")
    if given["fold"] is not None and given["split"] == "file":
        raise UserError("fold: expected none with split: file, whose parts are given")
    for name in ("shapes", "xstest"):
        if given[name] is not None and info.name != name:
            raise UserError(f"{name}: expected none with dataset {info.name!r}; it is for {name}")
    if given["columns"] and not info.by_path:
        raise UserError(f"columns: expected none with dataset {info.name!r}, whose files have names of their own")
    if info.name == "shapes" and (given["path"] or given["images"]):
        raise UserError("path: expected none with dataset shapes, which is made")
    return info
