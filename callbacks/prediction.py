"""Write what `predict_step` returns while it comes, so that memory stays small and a kill costs little."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from leanlight.contracts import ResumablePrediction, SeenItems, UserError, atomic_write, sha256_file
from leanlight.contracts.ranges import NonNegativeFloat, PositiveInt

_PIECE_BYTES = 2**26
Outputs = dict[str, Tensor | Sequence[str]]


class PredictionWriter(pl.Callback):
    """Writes predictions piece by piece into ``artifacts/predictions/`` of the run folder; each item once.

    `predict_step` returns a mapping of names to (N, …) tensors and to tuples or lists of N strings; its ``index`` (N,)
    int64 says where the items stand in the predicted part. Every process writes pieces of its own: tensors into
    ``PIECE.safetensors``, text into ``PIECE.jsonl``, and last ``PIECE.json``, which makes the piece count. At the end
    rank zero lists them in ``predictions.json``; `leanlight.predictions` reads them. `trainer.predict` returns nothing.

    A resumed prediction leaves out what whole pieces hold, where the DataModule is a `ResumablePrediction`; any other
    goes through all items again, and those already written are dropped.

    Args:
        piece_items: items after which a piece is written, with its whole last batch; it is also written at 64 MiB.
        seconds: longest time that results wait in memory, hence the work that a kill costs at most.
        resume: go on with the pieces that an earlier prediction left in the folder, instead of replacing them.
        checkpoint: file of the weights, whose digest pieces carry: those of other weights are not gone on with.
    """

    def __init__(
        self,
        piece_items: PositiveInt = 10_000,
        seconds: NonNegativeFloat = 60.0,
        resume: bool = False,
        checkpoint: Path | str | None = None,
    ) -> None:
        if piece_items < 1 or seconds < 0:
            raise UserError(f"piece_items: expected at least 1 and seconds at least 0, got {piece_items}, {seconds}")
        self.piece_items, self.seconds, self.resume, self.checkpoint = piece_items, seconds, resume, checkpoint
        self._parts: list[Outputs] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find whole pieces, before the loaders are made, and let the DataModule leave their items out."""
        if stage != "predict":
            return
        if type(pl_module).predict_step is pl.LightningModule.predict_step:  # forward of a whole batch
            raise UserError(f"predict: {type(pl_module).__name__} has nothing to predict of items")
        trainer.predict_loop.return_predictions = False  # Lightning would keep all of them in memory
        self.folder = Path(trainer.default_root_dir) / "artifacts" / "predictions"
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.part = {
            "split": getattr(data, "predict_split", None),
            "data": getattr(getattr(data, "meta", None), "fingerprint", None),
            "weights": sha256_file(self.checkpoint) if self.checkpoint else None,
        }
        whole = _whole_pieces(self.folder) if self.resume else {}
        trainer.strategy.barrier("pieces found")  # every process has looked before anything is removed
        for name, piece in whole.items():
            if {key: piece.get(key) for key in self.part} != self.part:
                raise UserError(
                    f"predict_split: {self.folder / name}.json holds items of another part, of other data or of other "
                    "weights; predict in a run of its own"
                )
        if trainer.is_global_zero:
            _sweep(self.folder, whole)
        self._seen, self._parts = SeenItems(), []
        indices = [_index(self.folder, name) for name in whole]
        for index in indices:
            self._seen.add(index)
        if isinstance(data, ResumablePrediction):
            data.skip_predicted(torch.cat([*indices, torch.zeros(0, dtype=torch.int64)]))
        elif whole:
            rank_zero_warn(f"{type(data).__name__} has no skip_predicted: items are predicted again, but written once")
        if whole:
            rank_zero_info(f"prediction goes on: {len(self._seen):,} items are there already")
        self._written = time.monotonic()

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the outputs of a batch; write the piece when it is full or old."""
        name = f"{type(pl_module).__name__}.predict_step"
        if dataloader_idx:
            raise UserError(f"{name}: one predict loader can be written, since `index` counts items of one part")
        part = _checked(outputs, name)
        new = self._seen.add(part["index"])  # type: ignore[arg-type]
        if not new.all():
            part = {field: _take(value, new.nonzero()[:, 0]) for field, value in part.items()}
        if self._parts and set(part) != set(self._parts[0]):
            raise UserError(f"{name}: expected the fields {sorted(self._parts[0])} of every batch, got {sorted(part)}")
        self._parts += [part] if new.any() else []
        tensors = [value for part in self._parts for value in part.values() if isinstance(value, Tensor)]
        full = sum(len(part["index"]) for part in self._parts) >= self.piece_items
        if full or sum(x.nbytes for x in tensors) >= _PIECE_BYTES or time.monotonic() - self._written > self.seconds:
            self._write(trainer.global_rank, name)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Ctrl-C loses nothing."""
        if isinstance(exception, KeyboardInterrupt) and self._parts:
            self._write(trainer.global_rank, type(pl_module).__name__)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write the last piece and the list of all. Here, because nothing else is called when no item was left."""
        if stage != "predict":
            return
        self._write(trainer.global_rank, type(pl_module).__name__)
        trainer.strategy.barrier("pieces written")
        if trainer.is_global_zero:
            self._list(trainer)

    def _write(self, rank: int, module: str) -> None:
        """Write what is kept as a piece, sorted by index."""
        parts, self._parts, self._written = self._parts, [], time.monotonic()
        if not parts:
            return
        joined = {field: _join([part[field] for part in parts], f"{module}: {field}") for field in parts[0]}
        order = joined["index"].argsort()  # type: ignore[union-attr]
        outputs = {field: _take(value, order) for field, value in joined.items()}
        tensors = {field: value for field, value in outputs.items() if isinstance(value, Tensor)}
        text = {field: value for field, value in outputs.items() if field not in tensors}
        positions = tensors["index"].tolist()
        contents = {"safetensors": save(tensors)}
        if text:
            rows = zip(positions, *text.values(), strict=True)
            lines = (json.dumps(dict(zip(["index", *text], row, strict=True)), ensure_ascii=False) for row in rows)
            contents["jsonl"] = "".join(f"{line}\n" for line in lines).encode()
        piece = {
            "items": len(positions),
            "fields": {field: _describe(value) for field, value in outputs.items()},
            "sha256": {suffix: hashlib.sha256(content).hexdigest() for suffix, content in contents.items()},
            **self.part,
        }
        # An item is in one piece at most, so its first one names it; the rank, in case processes share items after all.
        contents["json"] = json.dumps(piece).encode()
        for suffix, content in contents.items():
            atomic_write(self.folder / f"{positions[0]:09}_{rank}.{suffix}", content)

    def _list(self, trainer: pl.Trainer) -> None:
        """Write ``predictions.json``: part, number of items, fields, and the pieces in order of their first item."""
        names = sorted(path.stem for path in self.folder.glob("*_*.json"))
        seen = SeenItems()
        for name in names:
            seen.add(_index(self.folder, name))
        pieces = [{"name": name, **json.loads((self.folder / f"{name}.json").read_text())} for name in names]
        fields = pieces[0]["fields"] if pieces else {}
        kept = [{key: piece[key] for key in ("name", "items", "sha256")} for piece in pieces]
        listed = {**self.part, "items": len(seen), "fields": fields, "pieces": kept}
        atomic_write(self.folder / "predictions.json", json.dumps(listed, indent=2) + "\n")
        meta = getattr(trainer.datamodule, "meta", None)  # type: ignore[attr-defined]
        expected = getattr(meta, "counts", {}).get(self.part["split"], 0)
        if trainer.limit_predict_batches == 1.0 and len(seen) < expected:
            rank_zero_warn(f"{len(seen):,} of {expected:,} items were written: is `index` their position in the part?")


def _whole_pieces(folder: Path) -> dict[str, dict[str, Any]]:
    """Name → description of every piece whose files are what they were when it was written."""
    whole = {}
    for path in sorted(folder.glob("*_*.json")):
        try:
            piece = json.loads(path.read_text())
            same = [sha256_file(path.with_suffix(f".{suffix}")) == sha for suffix, sha in piece["sha256"].items()]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # cut, lost or not ours: its items are predicted again
        if "safetensors" in piece["sha256"] and all(same):
            whole[path.stem] = piece
    return whole


def _sweep(folder: Path, kept: Mapping[str, Any]) -> None:
    """Remove every file but those of the pieces `kept`, also the temporary ones of a killed process."""
    for path in folder.glob("*") if folder.is_dir() else ():
        if path.is_file() and path.stem not in kept:
            path.unlink()


def _index(folder: Path, name: str) -> Tensor:
    with safe_open(folder / f"{name}.safetensors", framework="pt") as file:
        return file.get_tensor("index")


def _checked(outputs: Any, name: str) -> Outputs:
    """Outputs of a batch on the CPU; UserError unless all are tensors or strings, one an item."""
    index = outputs.get("index") if isinstance(outputs, Mapping) else None
    if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype != torch.int64 or (index < 0).any():
        got = f"the fields {sorted(outputs)}" if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}"
        raise UserError(
            f"{name}: expected a mapping of names to tensors and tuples of strings, with `index` (N,) int64, the "
            f"positions of the items; got {got}"
        )
    for field, value in outputs.items():
        text = isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value)
        if not (text or (isinstance(value, Tensor) and value.ndim)) or len(value) != len(index):
            got = f"{tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise UserError(f"{name}: {field}: expected a tensor or strings with {len(index)} items, got {got}")
    return {k: v.detach().cpu() if isinstance(v, Tensor) else tuple(v) for k, v in outputs.items()}


def _take(value: Tensor | Sequence[str], positions: Tensor) -> Tensor | Sequence[str]:
    return value[positions] if isinstance(value, Tensor) else [value[position] for position in positions.tolist()]


def _join(values: Sequence[Any], name: str) -> Tensor | Sequence[str]:
    if not isinstance(values[0], Tensor):
        return [item for value in values for item in value]
    try:
        return torch.cat(list(values))
    except (RuntimeError, TypeError) as error:
        shapes = sorted({tuple(value.shape[1:]) for value in values})
        raise UserError(f"{name}: items of a piece need one shape, got {shapes}; pad them to one length") from error


def _describe(value: Tensor | Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, Tensor):
        return {"dtype": "text", "shape": []}
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape[1:])}
