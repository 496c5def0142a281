"""Images that a run makes while its student learns, beside the bank it began with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanlight.contracts import ImageBatch
from lit_modules.dda.bank import ImagePool


class GrowingPool:
    """Images of all processes: each writes files of its own and reads those of all.

    All have equally many. A process says `put`; when every process has, each says `grow`.

    Args:
        folder: of all processes' files.
        capacity: images that a process has room for.
        shape: (C, H, W) of an image.
        rank: of this process.
        world: number of processes.
    """

    def __init__(self, folder: Path, capacity: int, shape: Sequence[int], rank: int = 0, world: int = 1) -> None:
        self.folder, self.capacity, self.shape, self.rank, self.world = Path(folder), capacity, shape, rank, world
        self.own = ImagePool(self._folder(rank, capacity), capacity, shape)
        self._shards: list[ImagePool] = []

    def _folder(self, rank: int, capacity: int) -> Path:
        """Named by the room there is, so that a run that is made longer never overwrites what it has to read."""
        return self.folder / f"room_for_{capacity}" / f"process_{rank}"

    def __len__(self) -> int:
        return self.world * len(self.own)

    def put(self, first: int, images: Tensor, labels: Tensor, teacher_labels: Tensor) -> None:
        """Write images of this process from position `first` on; arguments as in `ImagePool.put`."""
        self.own.put(torch.arange(first, first + len(images)), images, labels, teacher_labels)

    def grow(self, size: int) -> None:
        """Count the first `size` images of every process in; all have put theirs."""
        for shard in self._open():
            shard.grow(size)

    def _open(self) -> list[ImagePool]:
        """The files of all processes, which are there."""
        if not self._shards:
            self._shards = [
                self.own
                if rank == self.rank
                else ImagePool(self._folder(rank, self.capacity), self.capacity, self.shape, create=False)
                for rank in range(self.world)
            ]
        return self._shards

    def read(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W) uint8 and labels (N,) at positions (N,) below `len`; processes take turns in them."""
        if self.world == 1:
            return self.own.read(index)
        images, labels = torch.empty(len(index), *self.shape, dtype=torch.uint8), torch.empty_like(index)
        for rank, shard in enumerate(self._shards):
            at = index % self.world == rank
            images[at], labels[at] = shard.read(index[at] // self.world)
        return images, labels

    def mix(self, batch: ImageBatch, items: int, seed: int) -> ImageBatch:
        """Put images of the pool in the place of some of a batch.

        Each item is replaced with probability P / (P + N) by one of the P images of the pool, drawn uniformly. So every
        item is a uniform draw from bank and pool together: an image of the pool has the share
        P / (P + N) · 1 / P = 1 / (P + N), and one of the bank, which the loader brings with share 1 / N, has
        N / (P + N) · 1 / N, the same. The loader, its order and its length stay what they were when the pool grows.

        Args:
            batch: of the bank, on the CPU.
            items: N, of the bank.
            seed: of what is drawn, which has no state.
        """
        generator, size = torch.Generator().manual_seed(seed), len(self)
        chance = torch.rand(len(batch), generator=generator, dtype=torch.float64)
        drawn = torch.randint(size, (len(batch),), generator=generator)
        picked = chance * (size + items) < size
        images, labels = self.read(drawn[picked])
        image, label, index = batch.image.clone(), batch.label.clone(), batch.index.clone()
        image[picked] = images / 255 if image.is_floating_point() else images
        label[picked], index[picked] = labels, items + drawn[picked]
        weight = None if batch.weight is None else batch.weight.masked_fill(picked, 1.0)
        return replace(batch, image=image, label=label, index=index, weight=weight)

    # ---- resume

    def state_dict(self) -> dict[str, Any]:
        """See `ImagePool.state_dict`; the same on every process but for the folder."""
        return self.own.state_dict()

    def take_over(self, state: Mapping[str, Any]) -> None:
        """Make this process's files what `state` describes, with a copy where they have another size now."""
        if state["capacity"] == self.capacity:
            self.own.load_state_dict(state)
            return
        old = ImagePool(self._folder(self.rank, state["capacity"]), state["capacity"], self.shape, create=False)
        old.load_state_dict(state)
        for index in torch.arange(len(old)).split(1024):
            self.own.put(index, *old.read(index), torch.from_numpy(old.teacher_labels[index.numpy()]))
        self.own.grow(len(old))
