"""Clips in several modalities, in memory: batches are gathers by position."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from datamodules.emotion import sources
from datamodules.emotion.catalog import EmotionSetInfo, describe
from datamodules.emotion.clips import Array, Clips, checked, graded, with_conflicts
from datamodules.emotion.planted import PlantedConflicts
from datamodules.images.splits import stratified_split
from datamodules.loaders import PartLoaders, TrainLoader, train_loader
from leanlight.contracts import EmotionMeta, Modality, MultimodalBatch, Split, UserError, nearest
from leanlight.contracts.ranges import FiniteFloat, PositiveInt, Seed, Share

PARTS: tuple[Split, ...] = get_args(Split)
Moments = tuple[Tensor, Tensor]


class EmotionSplit:
    """A part of the clips, as batches.

    Args:
        data: whose clips they are.
        rows: (n,) int64 positions among all clips.
    """

    def __init__(self, data: EmotionDataModule, rows: Tensor) -> None:
        self.data, self.rows = data, rows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> MultimodalBatch:
        """The clips at positions `index` of the part, (N,) int64; sequences as long as the longest of them."""
        data, rows = self.data, self.rows[index]
        length = {name: steps[rows] for name, steps in data.length.items()}
        present = {name: has[rows] for name, has in data.present.items()}
        return MultimodalBatch(
            features={name: data.features_of(name, rows, length.get(name), present[name]) for name in data.features},
            length=length,
            present=present,
            label=data.label[rows],
            score=None if data.score is None else data.score[rows],
            unimodal={name: shown[rows] for name, shown in data.unimodal.items()},
            conflict=None if data.conflict is None else data.conflict[rows],
            index=index,
        )

    def batches(self, blocks: Iterable[Tensor]) -> Iterator[MultimodalBatch]:
        """A batch for each block of positions."""
        return map(self.batch, blocks)


class EmotionDataModule(PartLoaders[MultimodalBatch], pl.LightningDataModule):
    """Clips with features in several modalities. Satisfies `leanlight.contracts.EmotionData`.

    Batches are `MultimodalBatch`. Scores become classes too. Clips that nobody has labelled are all in the test part,
    with the label -1: for `predict` alone. A checkpoint holds mean and deviation of the features, and what made them:
    other clips, when a model is used on them, are scaled as its own were, and features of other extractors are refused.

    Args:
        dataset: name in ``leanlight data list``.
        root: folder of data sets; default the environment variable ``LEANLIGHT_DATA``, else ``data``.
        path: of ``pickle``, ``mertools``, ``npz``, ``safetensors``, ``emotion_folder``; or of a published set's file.
        batch_size: training clips a step and process.
        eval_batch_size: clips a step and process elsewhere; default four times `batch_size`.
        modalities: which ones are used, in this order; None: all.
        split: ``official``: the publisher's parts; ``speaker``: no speaker is in two parts; ``random``: by class; or a
            scheme of the set's own. None: ``speaker`` for ``mosi``, elsewhere the first of these that there is.
        val_fraction: share of the training clips held out for validation where the split has no such part, in [0, 1).
        test_fraction: share of the clips for test where the split has no parts, in (0, 1).
        split_seed: makes hold-outs; kept apart from `seed`, so that runs of several seeds share their split.
        seed: makes the order of training clips; default the seed of ``seed_everything``, else 0.
        drop_last: leave out the last, shorter training batch of an epoch.
        download: whether MNIST, for ``planted``, may be downloaded; nothing else can be.
        predict_split: part that `predict` goes through: ``train``, ``val`` or ``test``, in order.
        standardise: scale every feature by its mean and deviation over the training part, over steps in sequences.
        clean: set NaN and infinite features to 0 and leave clips without any modality out, instead of an error.
        text: npz or safetensors of text vectors by ``id``, in place of the set's own.
        score_range: least and greatest score; None: as the catalogue says.
        levels: scores at which a class ends and the next begins; None: as the catalogue says, else whole numbers.
        folders: of ``mertools``: name of the features' folder by modality.
        planted: how ``planted`` is made; default `PlantedConflicts`' own.

    Attributes (after `setup`): ``meta``; ``statistics``, mean and deviation (D,) by modality, empty without
    `standardise`; ``train_split``, ``val_split``, ``test_split``, of which the first two may be None.
    """

    meta: EmotionMeta
    statistics: dict[str, Moments]
    train_split: EmotionSplit | None
    val_split: EmotionSplit | None
    test_split: EmotionSplit
    features: dict[str, Tensor]
    length: dict[str, Tensor]
    present: dict[str, Tensor]
    label: Tensor
    score: Tensor | None
    unimodal: dict[str, Tensor]
    conflict: Tensor | None

    def __init__(
        self,
        dataset: str = "planted",
        root: str | Path | None = None,
        path: str | Path | None = None,
        batch_size: PositiveInt = 64,
        eval_batch_size: PositiveInt | None = None,
        modalities: Sequence[str] | None = None,
        split: str | None = None,
        val_fraction: Share = 0.15,
        test_fraction: Share = 0.2,
        split_seed: Seed = 0,
        seed: Seed | None = None,
        drop_last: bool = False,
        download: bool = True,
        predict_split: Split = "test",
        standardise: bool = True,
        clean: bool = False,
        text: str | Path | None = None,
        score_range: tuple[FiniteFloat, FiniteFloat] | None = None,
        levels: Sequence[FiniteFloat] | None = None,
        folders: dict[str, str] | None = None,
        planted: PlantedConflicts | None = None,
    ) -> None:
        super().__init__()
        info = _check(dict(locals()))
        self.dataset, self.path, self.planted, self.text, self.folders = dataset, path, planted, text, folders
        self.root = Path(root or os.environ.get("LEANLIGHT_DATA") or "data")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or 4 * batch_size
        self.modalities, self.split = modalities, split
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.split_seed, self.seed, self.drop_last, self.download = split_seed, seed, drop_last, download
        self.predict_split, self.standardise, self.clean = predict_split, standardise, clean
        self.score_range = tuple(score_range or info.score_range)
        self.levels = tuple(info.levels if levels is None else levels)
        self.level_names = info.level_names if levels is None else ()
        self._clips: Clips | None = None

    def ensure_available(self) -> None:
        """Find and check the data; UserError with every place tried. Starts no run."""
        if self._clips is None and not hasattr(self, "meta"):
            clips = sources.load(
                self.dataset, self.root, self.path, self.planted, self.download, self.folders, self.text
            )
            wanted = list(clips.features) if self.modalities is None else list(self.modalities)
            if stray := [name for name in wanted if name not in clips.features]:
                raise UserError(
                    f"modalities: expected some of {', '.join(clips.features)}, got {stray[0]!r}"
                    f"{nearest(stray[0], clips.features)}"
                )
            clips = checked(clips.only(wanted), self.clean)
            clips = with_conflicts(graded(clips, self.score_range, self.levels, self.level_names))  # type: ignore[arg-type]
            if not len(clips):
                raise UserError(f"dataset: {clips.source} has no clip")
            self._clips = clips

    def prepare_data(self) -> None:
        """The same; Lightning calls this on one process a node, before `setup`."""
        self.ensure_available()

    def setup(self, stage: str | None = None) -> None:
        """Build the parts, the statistics of training and `meta`, once."""
        if hasattr(self, "meta"):
            return
        self.ensure_available()
        clips, self._clips = self._clips, None
        assert clips is not None
        parts = self._parts(clips)
        self._take(clips)
        splits = {name: EmotionSplit(self, torch.from_numpy(rows)) for name, rows in parts.items() if len(rows)}
        self.train_split, self.val_split = splits.get("train"), splits.get("val")
        self.test_split = splits["test"]
        self._names = {name: tuple(clips.names[row] for row in rows) for name, rows in parts.items()}
        self.statistics = {}
        if self.standardise and self.train_split is not None:
            self.statistics = {name: self._moments(name, self.train_split.rows) for name in self.features}
        self.meta = self._describe(clips, parts)

    # ---- parts ----

    def _parts(self, clips: Clips) -> dict[Split, Array]:
        """Positions of the clips of each part."""
        if clips.label is None:
            none = np.zeros(0, np.int64)
            return {"train": none, "val": none, "test": np.arange(len(clips))}
        scheme = self._scheme(clips)
        if scheme in clips.splits:
            marks = clips.splits[scheme]
            parts = {name: np.flatnonzero(marks == name) for name in PARTS}
        else:
            train, test = self._held_out(clips, np.arange(len(clips)), self.test_fraction, scheme, "test")
            parts = {"train": train, "val": test[:0], "test": test}
        if not len(parts["val"]) and self.val_fraction:
            parts["train"], parts["val"] = self._held_out(
                clips, parts["train"], self.val_fraction, scheme, "validation"
            )
        for name in ("train", "test"):
            if not len(parts[name]):
                raise UserError(f"split: the {name} part of {clips.source} by {scheme!r} has no clip")
        return parts

    def _scheme(self, clips: Clips) -> str:
        schemes = [*clips.splits, *(["speaker"] if clips.speaker is not None else []), "random"]
        scheme = schemes[0] if self.split is None else self.split
        if scheme not in schemes:
            known = list(dict.fromkeys(schemes))
            raise UserError(
                f"split: expected one of {', '.join(known)} with {self.dataset}, got {scheme!r}{nearest(scheme, known)}"
            )
        if bad := {name: why for name, why in clips.refused.get(scheme, {}).items() if name in clips.features}:
            name, why = next(iter(bad.items()))
            raise UserError(f"split: {scheme} is refused with the {name} of {self.dataset}: {why}; use split: speaker")
        return scheme

    def _held_out(self, clips: Clips, rows: Array, fraction: float, scheme: str, purpose: str) -> tuple[Array, Array]:
        """Positions that stay and that are held out, both sorted: whole speakers, or a share of every class."""
        assert clips.label is not None
        if scheme != "speaker" or clips.speaker is None:
            stays, held = stratified_split(clips.label[rows], fraction, 1.0, self.split_seed)
            return rows[stays], rows[held]
        speakers, of = np.unique(clips.speaker[rows], return_inverse=True)
        generator = np.random.Generator(np.random.PCG64([self.split_seed, *purpose.encode()]))
        order = np.argsort(generator.random(len(speakers)), kind="stable")
        before = np.cumsum(np.bincount(of)[order]) - np.bincount(of)[order]
        chosen = order[before < round(fraction * len(rows))]
        if not 0 < len(chosen) < len(speakers):
            raise UserError(
                f"split: speaker cannot hold {fraction:g} of {len(rows):,} clips of {len(speakers)} speakers out for "
                f"{purpose}; use split: random"
            )
        held_out = np.isin(of, chosen)
        return rows[~held_out], rows[held_out]

    # ---- tensors ----

    def _take(self, clips: Clips) -> None:
        """The arrays as tensors; features share their memory."""

        def tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}

        self.features, self.length, self.present = map(tensors, (clips.features, clips.length, clips.present))
        label = np.full(len(clips), -1) if clips.label is None else clips.label
        self.label, self.unimodal = torch.from_numpy(label), tensors(clips.unimodal)
        self.score = None if clips.score is None else torch.from_numpy(clips.score).float()
        self.conflict = None if clips.conflict is None else torch.from_numpy(clips.conflict)
        self._complete = {name: bool(has.all()) for name, has in self.present.items()}

    def features_of(self, name: str, rows: Tensor, length: Tensor | None, present: Tensor) -> Tensor:
        """(n, D) or (n, L, D) features of a modality, scaled where they are not padding.

        Args:
            name: of the modality.
            rows: (n,) int64 among all clips.
            length: (n,) steps of a sequence.
            present: (n,) bool.
        """
        x = self.features[name]
        if length is not None:
            x = x[:, : max(1, int(length.max()))]
        x = x[rows]
        if name not in self.statistics:
            return x
        mean, deviation = self.statistics[name]
        x = (x - mean) / deviation
        if length is not None:
            return x.masked_fill_((torch.arange(x.shape[1]) >= length[:, None])[..., None], 0)
        return x if self._complete[name] else x.masked_fill_(~present[:, None], 0)

    def _moments(self, name: str, rows: Tensor) -> Moments:
        """Mean and deviation (D,) float32 over the clips, or the steps, at `rows`; deviation 1 of a constant."""
        x, chosen = self.features[name], rows[self.present[name][rows]]
        blocks = chosen.split(1024)  # so that only some of a large set is in float64 at a time
        count = self.length[name][chosen].sum() if name in self.length else torch.tensor(len(chosen))
        mean = sum((x[b].double().flatten(0, -2).sum(0) for b in blocks), torch.zeros(x.shape[-1])) / count.clamp(1)
        square = torch.zeros(x.shape[-1], dtype=torch.float64)
        for block in blocks:
            apart = x[block].double() - mean
            if name in self.length:
                apart *= (torch.arange(x.shape[1]) < self.length[name][block, None])[..., None]
            square += apart.flatten(0, -2).square().sum(0)
        deviation = (square / count.clamp(1)).sqrt()
        constant = deviation <= 1e-6 * (1 + mean.abs())
        return mean.float(), deviation.masked_fill(constant, 1.0).float()

    def _describe(self, clips: Clips, parts: Mapping[Split, Array]) -> EmotionMeta:
        digest = hashlib.sha256("\n".join([*clips.names, *clips.classes]).encode())
        arrays: dict[str, Array | None] = {
            f"{kind} {name}": array
            for kind in ("features", "length", "present", "unimodal")
            for name, array in getattr(clips, kind).items()
        }
        arrays |= {"label": clips.label, "score": clips.score, "conflict": clips.conflict}
        for name, array in [*arrays.items(), *parts.items()]:
            if array is None:
                continue
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        longest = {name: int(steps.max()) for name, steps in self.length.items()}
        train = self.label[torch.from_numpy(parts["train"])]
        return EmotionMeta(
            name=self.dataset,
            source=clips.source,
            counts={name: len(parts[name]) for name in PARTS},
            fingerprint=digest.hexdigest(),
            modalities={name: Modality(x.shape[-1], longest.get(name, 0)) for name, x in self.features.items()},
            classes=clips.classes,
            score_range=None if clips.score is None else self.score_range,  # type: ignore[arg-type]
            class_counts=tuple(torch.bincount(train, minlength=len(clips.classes)).tolist()),
            extractors=dict(clips.extractors),
        )

    def names(self, split: str) -> tuple[str, ...]:
        """Names of the clips of a part, by their index."""
        return self._names[split]  # type: ignore[index]

    # ---- what a checkpoint knows of the features ----

    def state_dict(self) -> dict[str, Any]:
        """Statistics and extractors of the features, by modality."""
        statistics = {name: {"mean": mean, "std": std} for name, (mean, std) in self.statistics.items()}
        return {"statistics": statistics, "extractors": dict(self.meta.extractors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Scale these clips as those of the checkpoint were; UserError when other extractors made their features."""
        for name, theirs in state["extractors"].items():
            ours = self.meta.extractors.get(name, "unknown")
            if name in self.features and ours != theirs:
                raise UserError(
                    f"path: the {name} features of {self.meta.source} come from another extractor ({ours[:12]}) than "
                    f"those the model was trained on ({theirs[:12]}); prepare the clips with that one"
                )
        if not self.standardise:
            return
        for name, moments in state["statistics"].items():
            if name in self.features and len(moments["mean"]) == self.features[name].shape[-1]:
                self.statistics[name] = moments["mean"], moments["std"]

    # ---- loaders ----

    def train_dataloader(self) -> TrainLoader[MultimodalBatch]:
        """Shuffled batches of train, stateful; in the clips' order when Lightning overfits a few batches."""
        split = self.train_split
        if split is None:
            raise UserError(f"path: the clips of {self.meta.source} have no labels, so that nothing can be trained")
        return train_loader(self, len(split), split.batches, self.batch_size, self.seed, self.drop_last)

    def _part(self, name: Split) -> EmotionSplit:
        split: EmotionSplit | None = {"train": self.train_split, "val": self.val_split, "test": self.test_split}[name]
        if split is None:
            raise UserError(f"predict_split: {name}, but that part has no clip")
        return split


def _check(given: dict[str, Any]) -> EmotionSetInfo:
    """The set's entry; UserError for the first argument that makes no sense."""
    info = describe(given["dataset"])
    if given["predict_split"] not in PARTS:
        raise UserError(f"predict_split: expected one of {', '.join(PARTS)}, got {given['predict_split']!r}")
    for name in ("batch_size", "eval_batch_size"):
        if given[name] is not None and given[name] < 1:
            raise UserError(f"{name}: expected at least 1, got {given[name]}")
    modalities = given["modalities"]
    if modalities is not None and (not modalities or len(set(modalities)) < len(modalities)):
        raise UserError(f"modalities: expected at least one, and each once; got {list(modalities)}")
    if not 0 <= given["val_fraction"] < 1:
        raise UserError(f"val_fraction: expected a number in [0, 1), got {given['val_fraction']}")
    if not 0 < given["test_fraction"] < 1:
        raise UserError(f"test_fraction: expected a number in (0, 1), got {given['test_fraction']}")
    low, high = given["score_range"] or info.score_range
    if not low < high:
        raise UserError(f"score_range: expected the least and the greatest score, got {low:g} and {high:g}")
    levels = list(given["levels"] or ())
    if levels != sorted(set(levels)) or not all(low < level < high for level in levels):
        raise UserError(f"levels: expected ascending scores between {low:g} and {high:g}, got {levels}")
    if info.by_path and given["path"] is None:
        raise UserError(f"path: expected the place of {info.name} data, got none")
    if given["path"] is not None and info.name == "planted":
        raise UserError(f"path: expected none with dataset planted, which is made; got {given['path']!r}")
    for name in ("planted", "folders"):
        of = {"folders": "mertools"}.get(name, name)
        if given[name] is not None and info.name != of:
            raise UserError(f"{name}: expected none with dataset {info.name!r}; it is for {of}")
    return info
