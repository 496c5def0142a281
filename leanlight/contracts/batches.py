"""What travels from a DataModule to a LightningModule: frozen, documented, movable to a device."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Base of all batches. Every tensor field has the batch as its first dimension.

    Lightning moves it through `to`; `len` is the number of items; `select` takes items by index.
    """

    def _map(self, function: Any) -> Self:
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, Batch)):
                changed[field.name] = function(value)
        return replace(self, **changed)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Move every tensor to `device`."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Page-lock every tensor, for asynchronous copies to a GPU."""
        return self._map(lambda value: value.pin_memory())

    def select(self, index: Tensor) -> Self:
        """Take the items at `index` (int64 positions or a boolean mask)."""
        return self._map(lambda value: value.select(index) if isinstance(value, Batch) else value[index])

    def __len__(self) -> int:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (Tensor, Batch)):
                return len(value)
        return 0


@dataclass(frozen=True)
class ImageBatch(Batch):
    """Images with labels.

    image: (N, C, H, W) float32 in [0, 1]; uint8 in [0, 255] only before the transfer to the device.
    label: (N,) int64 class, or (N, K) float32 soft labels.
    index: (N,) int64 position of each item in its split.
    """

    image: Tensor
    label: Tensor
    index: Tensor


@dataclass(frozen=True)
class ClientBatch(Batch):
    """All data of one federated client for one round.

    data: its images; empty at a batch without a client. client: its id, or -1. round_number: from 0. work: share of its
    local steps that it manages, in (0, 1]. last: whether the server's step is due; such a batch has no client.
    """

    data: ImageBatch
    client: int
    round_number: int
    work: float = 1.0
    last: bool = False


@dataclass(frozen=True)
class SessionBatch(Batch):
    """Item sequences, right-padded with 0; items count from 1.

    items: (N, L) int64. length: (N,) int64. target: (N,) int64 next item. index: (N,) int64.
    """

    items: Tensor
    length: Tensor
    target: Tensor
    index: Tensor


@dataclass(frozen=True)
class MultimodalBatch(Batch):
    """Utterance features by modality.

    text, audio, video: (N, D_m) or (N, L, D_m) float32. label: (N,) int64 or float32. present: (N, 3) bool, whether
    each modality is there, in that order. index: (N,) int64.
    """

    text: Tensor
    audio: Tensor
    video: Tensor
    label: Tensor
    present: Tensor
    index: Tensor


@dataclass(frozen=True)
class VQABatch(Batch):
    """Image and question pairs, with strings kept beside the tensors.

    image: (N, C, H, W) float32 in [0, 1]. label: (N,) int64. index: (N,) int64. question, answer: N strings each.
    """

    image: Tensor
    label: Tensor
    index: Tensor
    question: tuple[str, ...]
    answer: tuple[str, ...]


@dataclass(frozen=True)
class Transition(Batch):
    """Reinforcement-learning transitions.

    state, next_state: (N, K, H, W) uint8 stacked frames. action: (N,) int64. reward: (N,) float32.
    terminal: (N,) bool, true where no value is bootstrapped. discount: (N,) float32, gamma to the power of the steps.
    """

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    terminal: Tensor
    discount: Tensor


@dataclass(frozen=True)
class EpisodeBatch(Batch):
    """Evaluation episodes to play. seed: (N,) int64, one an episode; it decides everything random in it."""

    seed: Tensor
