"""Training on chosen items of the real training set, held in memory or streamed, beside the whole evaluation sets."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.images.formats import NO_ARRAY
from datamodules.images.stream import ImageFolderStream, StreamSplit
from datamodules.images.substitute import SubstituteDataModule, check_there, read_safetensors, with_training_set
from leanlight.contracts import ImageMeta, ImageSplit, UserError, sha256_file

EXPECTED = "what `leanlight select` wrote, or a .safetensors, .npy, .json or .csv file of positions"
_WHOLE_NUMBERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_COLUMNS = {"index": int, "label": int, "weight": float}  # of a .csv file; it may have others


class Subset:
    """Chosen items, as a file names them.

    Positions are those in the source's own training part, before anything is held out or left out of it, so that they
    mean the same items whatever `val_fraction`, `split_seed`, `train_fraction` and `image_size` are. A selection that
    knows which data it was made of is taken with the very same data and split alone; its ``selection.csv`` goes by
    position and label.

    Args:
        path: folder or file of `leanlight select`, or any file of positions: a list in ``.json``, an array in ``.npy``,
            ``index`` and, if there are, ``label`` and ``weight`` in ``.safetensors`` or as columns of a ``.csv``.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.file = self.path / "selection.safetensors" if self.path.is_dir() else self.path

    def find(self, meta: ImageMeta, labels: Tensor, origin: Tensor) -> tuple[Tensor, Tensor | None]:
        """Positions (n,) of the chosen items in the training split, in the file's order, and weights if they differ.

        Args:
            meta: of the whole data.
            labels: (N,) classes of its training split, or (N, K) attributes.
            origin: (N,) positions of its items in the source's training part.

        Raises:
            UserError: a file of something else, other data, or items that the training split does not hold.
        """
        columns, data = self._read()
        if data not in (None, meta.fingerprint):
            raise UserError(
                f"subset: {self.file} was selected from other data or another split (fingerprint {str(data)[:12]}, "
                f"here {meta.fingerprint[:12]}); positions alone are in its selection.csv"
            )
        index = self._positions(columns.get("index"))
        ordered, order = origin.sort()
        places = torch.searchsorted(ordered, index).clamp(max=len(ordered) - 1)
        if (lost := index[ordered[places] != index]).numel():
            raise UserError(
                f"subset: {len(lost):,} of {len(index):,} items of {self.file}, the first of them {int(lost[0])}, are "
                "not in the training split: held out for validation (val_fraction, split_seed), left out "
                "(train_fraction), or not in the source's training part"
            )
        found = order[places]
        label, weight = columns.get("label"), columns.get("weight")
        if label is not None and labels.ndim == 1 and not torch.equal(label.long(), labels[found]):
            raise UserError(f"subset: {self.file} was selected from other data: its labels are not those of the items")
        plain = weight is None or bool((weight == 1).all())
        return found, None if plain else weight.float()  # type: ignore[union-attr]

    def _read(self) -> tuple[dict[str, Tensor], str | None]:
        """Columns (n,) of the file, and the fingerprint of the data if it tells. Executes no pickle."""
        check_there(self.file, "subset", EXPECTED)
        kind, data = self.file.suffix, None
        columns: dict[str, Any] = {}
        try:
            if kind == ".json":
                columns = {"index": torch.as_tensor(json.loads(self.file.read_text()))}
            elif kind == ".npy":
                columns = {"index": torch.from_numpy(np.load(self.file, allow_pickle=False))}
            elif kind == ".csv":
                columns = _read_csv(self.file)
            elif kind == ".safetensors":
                columns, data = read_safetensors(self.file, "subset"), self._data()
        except (*NO_ARRAY, TypeError, RuntimeError) as error:
            raise UserError(f"subset: {self.file} is damaged, or no list of positions ({error})") from error
        return columns, data

    def _data(self) -> str | None:
        """What a selection says of its data, whose folder must be whole."""
        from safetensors import safe_open

        record = self.path / "selection.json"
        if self.path.is_dir() and (
            not record.is_file() or json.loads(record.read_text()).get("sha256") != sha256_file(self.file)
        ):
            raise UserError(f"subset: {self.path} holds no whole selection; write it again with `leanlight select`")
        with safe_open(self.file, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("selection", "{}"))
        return about.get("data")

    def _positions(self, index: Tensor | None) -> Tensor:
        """(n,) int64, each once; UserError for anything else."""
        if index is None or index.ndim != 1 or (index.numel() and index.dtype not in _WHOLE_NUMBERS):
            got = f"a {index.dtype} of shape {tuple(index.shape)}" if index is not None else "none"
            raise UserError(f"subset: expected {EXPECTED}, whole numbers (N,); {self.file} holds {got}")
        if not len(index):
            raise UserError(f"subset: expected positions, {self.file} holds none")
        if int(index.min()) < 0:
            raise UserError(f"subset: expected positions from 0, {self.file} holds {int(index.min())}")
        values, counts = index.long().unique(return_counts=True)
        if len(values) < len(index):
            repeated = int(values[counts > 1][0])
            raise UserError(f"subset: expected every position once; {self.file} holds {repeated} more than once")
        return index.long()


def _read_csv(file: Path) -> dict[str, Tensor]:
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    known = {name: read for name, read in _COLUMNS.items() if rows and name in rows[0]}
    return {name: torch.tensor([read(row[name]) for row in rows]) for name, read in known.items()}


class SubsetDataModule(SubstituteDataModule):
    """Trains on chosen items of the real training split, such as a coreset; validation and test sets stay whole.

    Args:
        subset: folder or file of `leanlight select`, or a file of positions in the source's own training part.
        kwargs: of `ImageDataModule`; they say which real images.
    """

    argument = "subset"
    expected = EXPECTED

    def __init__(self, subset: str | Path, **kwargs: Any) -> None:
        self.subset = Subset(subset)
        super().__init__(self.subset.file, **kwargs)

    def load_substitute(self) -> ImageSplit:
        """The chosen items with their weights, in the order of the file."""
        whole = self.train_split
        items, weight = self.subset.find(self.meta, whole.labels, whole.origin)
        return ImageSplit(whole.images[items], whole.labels[items], whole.origin[items], weight)


class SubsetStream(ImageFolderStream):
    """The same over a streamed folder of pictures.

    Args:
        subset: folder or file of `leanlight select`, or a file of positions among the folder's training pictures.
        kwargs: of `ImageFolderStream`; they say which folder.
    """

    def __init__(self, subset: str | Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.subset, self._chosen = Subset(subset), False

    def ensure_available(self) -> None:
        """Find the pictures and the selection; UserError for what is missing."""
        check_there(self.subset.file, "subset", EXPECTED)
        super().ensure_available()

    def setup(self, stage: str | None = None) -> None:
        """List the files, then keep the chosen ones of the training split, once."""
        if self._chosen:
            return
        super().setup(stage)
        whole = self.splits["train"]
        items, weight = self.subset.find(self.meta, whole.labels, whole.origin)
        labels = whole.labels[items]
        self.splits["train"] = StreamSplit([whole.paths[i] for i in items], labels, whole.origin[items], weight)
        self.meta, self._chosen = with_training_set(self.meta, labels, self.subset.file), True
