"""Write what `predict_step` returns, each item once, in the order of the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor


class PredictionWriter(pl.Callback):
    """Collect dictionaries of tensors and write ``artifacts/predictions.safetensors`` in the run folder.

    `predict_step` returns a mapping of names to (N, …) tensors with an ``index`` (N,) int64. Ranks hold disjoint or
    overlapping shards; rank zero writes every index once, sorted.
    """

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._parts.append({name: value.detach().cpu() for name, value in outputs.items()})

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        merged = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        self._parts.clear()
        if trainer.world_size > 1:
            shards: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(shards, merged)
            merged = {name: torch.cat([shard[name] for shard in shards]) for name in merged}
        if not trainer.is_global_zero:
            return
        _, order = np.unique(merged["index"].numpy(), return_index=True)
        target = Path(trainer.default_root_dir) / "artifacts" / "predictions.safetensors"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value[torch.from_numpy(order)] for name, value in merged.items()}, target)
