"""What training tells about each of its items, epoch by epoch, taken from passes that are made anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Names in `lit_modules.selection.FIELDS`, in the order of the rows.
DYNAMICS = ("train_probability", "train_margin", "train_error")
_NEVER = torch.iinfo(torch.int64).max


class TrainingDynamics:
    """Probability, margin and error of every training item in every epoch, by index.

    What is recorded are the outputs of the training passes, of augmented images where training augments. The running
    epoch stays on the device and nothing waits for it; finished epochs lie on the CPU, 12 bytes an item and epoch. Of
    several records of an item in an epoch, which processes make where they fill up a batch, the first one counts.

    It is no `nn.Module`: its state grows by the epoch, and each process has its own share of the running one.

    Args:
        items: of the training part (N).
        device: of the outputs.
    """

    def __init__(self, items: int, device: torch.device | str = "cpu") -> None:
        self.items, self.device = items, torch.device(device)
        self._epochs: list[Tensor] = []
        self._begin()

    def _begin(self) -> None:
        """An epoch in which nothing has been seen yet."""
        self._values = torch.full((len(DYNAMICS), self.items), torch.nan, device=self.device)
        self._batch = torch.full((self.items,), _NEVER, device=self.device)

    def to(self, device: torch.device | str) -> TrainingDynamics:
        """Move the running epoch to `device`, in place."""
        self.device = torch.device(device)
        self._values, self._batch = self._values.to(device), self._batch.to(device)
        return self

    @torch.no_grad()
    def record(self, index: Tensor, logits: Tensor, label: Tensor, batch: int) -> None:
        """Take in a batch.

        Args:
            index: (n,) int64 positions in the training part.
            logits: (n, K) outputs in training.
            label: (n,) int64 classes.
            batch: number of the batch in its epoch, ascending.
        """
        values = item_statistics(logits, label)
        before = self._batch[index]
        self._values[:, index] = torch.where(before <= batch, self._values[:, index], values)
        self._batch[index] = before.clamp(max=batch)

    def end_epoch(self) -> None:
        """End the epoch, on every process; one without any record does not count."""
        values, batch = self._joined()
        if (batch != _NEVER).any():
            self._epochs.append(values.cpu())
        self._begin()

    def _joined(self) -> tuple[Tensor, Tensor]:
        """Values and numbers of batches of the running epoch over all processes; of equals the lowest rank's."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self._values, self._batch
        first = self._batch.clone()
        dist.all_reduce(first, dist.ReduceOp.MIN)
        rank, none = dist.get_rank(), dist.get_world_size()
        owner = torch.where((self._batch == first) & (first != _NEVER), rank, none)
        dist.all_reduce(owner, dist.ReduceOp.MIN)
        values = self._values.masked_fill(owner != rank, 0)  # one process alone adds what is not 0
        dist.all_reduce(values, dist.ReduceOp.SUM)
        return values.masked_fill(owner == none, torch.nan), first

    def __len__(self) -> int:
        """Finished epochs (E)."""
        return len(self._epochs)

    def epoch(self, number: int) -> dict[str, Tensor]:
        """(N,) by name in `DYNAMICS`, on the CPU, of one finished epoch; NaN where it left an item out."""
        return dict(zip(DYNAMICS, self._epochs[number], strict=True))

    def by_item(self) -> dict[str, Tensor]:
        """(N, E) float32 by name in `DYNAMICS`, on the CPU, of the finished epochs.

        An item that an epoch left out (``drop_last``, an epoch cut short) keeps its value of the epoch before, so that
        nothing seems to have been learned or forgotten there; before its first record it has that of the first. Of an
        item without any record all values are NaN.
        """
        values = torch.stack(self._epochs, -1) if self._epochs else torch.empty(len(DYNAMICS), self.items, 0)
        last = len(self) - 1
        onwards, back = (
            [(epoch, epoch - 1) for epoch in range(1, last + 1)],
            [(i, i + 1) for i in range(last - 1, -1, -1)],
        )
        for epoch, near in onwards + back:
            values[..., epoch] = torch.where(values[..., epoch].isnan(), values[..., near], values[..., epoch])
        return dict(zip(DYNAMICS, values, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """All that was recorded, the running epoch included, in plain tensors; to be called on every process."""
        values, batch = self._joined()
        return {"epochs": list(self._epochs), "values": values.cpu().clone(), "batch": batch.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, on every process."""
        self._epochs = [values.cpu() for values in state["epochs"]]
        self._values, self._batch = state["values"].to(self.device), state["batch"].to(self.device)
        self.items = len(self._batch)


def item_statistics(logits: Tensor, label: Tensor) -> Tensor:
    """(3, n) float32: probability of the own class, margin, error.

    The margin is the own class's logit above the largest other one (Pleiss et al. 2020), the error the distance
    between softmax and the one-hot label (EL2N, Paul et al. 2021).

    Args:
        logits: (n, K), K at least 2.
        label: (n,) int64 classes.
    """
    logits, own = logits.float(), label.unsqueeze(1)
    probability = logits.softmax(1)
    margin = logits.gather(1, own) - logits.scatter(1, own, -torch.inf).amax(1, keepdim=True)
    right = probability.gather(1, own)
    error = probability.scatter(1, own, right - 1).norm(dim=1)
    return torch.stack([right[:, 0], margin[:, 0], error])
