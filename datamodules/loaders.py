"""Loaders whose order is a pure function of seed, epoch and rank, and that can go on in the middle of an epoch.

They are plain iterables: Lightning neither wraps them nor injects samplers into them, and finds `set_epoch`,
`state_dict` and `load_state_dict` where it looks for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor

from leanlight.contracts import Batch, HasReplicas, Split, UserError, derived_seed, run_seed

B = TypeVar("B", bound=Batch)
# From blocks of positions to batches: at once from memory, or through worker processes.
Fetch = Callable[[Iterable[Tensor]], Iterable[B]]


def rank_and_world() -> tuple[int, int]:
    """This process' rank and the number of processes, (0, 1) outside of distributed runs."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class TrainOrder:
    """Which items a rank takes in which batch, and how far it is.

    A global batch has ``world * batch_size`` items, and rank r takes its r-th block: all ranks together see what one
    process with the global batch would. Every rank has equally many batches, of equal size: the last, shorter global
    batch is dropped (`drop_last`) or filled up from the start of the order to a multiple of `world`.

    Args:
        size: items of the split.
        batch_size: items of a batch on each rank.
        seed: makes the order, together with the epoch.
        shuffle: whether to shuffle; else the split's own order.
        drop_last: leave out the last, shorter global batch.
        rank: of this process.
        world: number of processes.
        batches: of an epoch, on each rank; the items are gone through as often as that takes. None: once.
        replicas: orders side by side, of `seed`, `seed` + 1, …: a batch holds that of each, one after another.

    Attributes: ``epoch``, chosen by `set_epoch`; ``position``, batches handed out in this epoch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        batches: int | None = None,
        replicas: int = 1,
    ) -> None:
        self.size, self.batch_size, self.seed, self.shuffle, self.drop_last = size, batch_size, seed, shuffle, drop_last
        self.rank, self.world, self.global_batch = rank, world, batch_size * world
        self.batches, self.replicas = batches, replicas
        self.epoch = self.position = 0

    def __len__(self) -> int:
        if self.batches is not None:
            return self.batches
        return (math.floor if self.drop_last else math.ceil)(self.size / self.global_batch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; another one than the present starts at its beginning."""
        if epoch != self.epoch:
            self.position = 0
        self.epoch = epoch

    def indices(self, replica: int = 0) -> Tensor:
        """(size,) int64, the order of the present epoch over all ranks; longer where it has a number of batches."""
        passes = 1 if self.batches is None else math.ceil(self.batches * self.global_batch / self.size)
        if not self.shuffle:
            return torch.arange(self.size).repeat(passes)
        generator = torch.Generator().manual_seed(derived_seed(self.seed + replica, self.epoch))
        return torch.cat([torch.randperm(self.size, generator=generator) for _ in range(passes)])

    def blocks(self, start: int) -> Iterator[Tensor]:
        """This rank's positions, batch by batch, from batch `start` on."""
        orders = torch.stack([self.indices(replica) for replica in range(self.replicas)])
        for low in range(start * self.global_batch, len(self) * self.global_batch, self.global_batch):
            batch = orders[:, low : low + self.global_batch]
            missing = -batch.shape[1] % self.world
            filled = torch.cat([batch, orders.repeat(1, math.ceil(missing / self.size))[:, :missing]], 1)
            yield filled.view(self.replicas, self.world, -1)[:, self.rank].flatten()

    def state_dict(self) -> dict[str, int]:
        """Epoch and position, the same on every rank."""
        items_done = self.position * self.global_batch
        return {"epoch": self.epoch, "items_done": items_done, "items": self.size, "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over what `state_dict` gave; UserError when it stands inside an epoch of another order.

        With another global batch, as of another number of processes, it goes on at the batch before, whose items come
        in part again.
        """
        if state["items_done"] and (state["items"], state["seed"]) != (self.size, self.seed):
            raise UserError(
                f"the checkpoint stands inside an epoch ({state['items_done']} of {state['items']} items, seed "
                f"{state['seed']}) and cannot go on with {self.size} items, seed {self.seed}; keep dataset, fractions "
                "and seed"
            )
        self.epoch, self.position = state["epoch"], state["items_done"] // self.global_batch


class TrainLoader(Generic[B]):
    """Batches in a `TrainOrder`. After `load_state_dict` the next iteration goes on with exactly the next batch.

    Args:
        order: which items come in which batch.
        fetch: from blocks of positions to batches.
    """

    def __init__(self, order: TrainOrder, fetch: Fetch[B]) -> None:
        self.sampler, self._fetch = order, fetch  # Lightning calls `loader.sampler.set_epoch`

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[B]:
        # A generator's body starts at the first `next`: Lightning calls iter() before it sets the epoch. The position
        # counts batches handed out, not fetched, so that workers may run ahead.
        order = self.sampler
        start = order.position if order.position < len(order) else 0
        for number, batch in enumerate(self._fetch(order.blocks(start)), start + 1):
            order.position = number
            yield batch
        order.position = 0

    def state_dict(self) -> dict[str, int]:
        """See `TrainOrder.state_dict`."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """See `TrainOrder.load_state_dict`."""
        self.sampler.load_state_dict(state)


def train_loader(
    datamodule: pl.LightningDataModule,
    size: int,
    fetch: Fetch[B],
    batch_size: int,
    seed: int | None,
    drop_last: bool,
    batches: int | None = None,
    order: Callable[..., TrainOrder] = TrainOrder,
) -> TrainLoader[B]:
    """The training loader of a DataModule on this rank.

    Not shuffled while Lightning overfits a few batches, so that every epoch has the same ones.

    Args:
        datamodule: asked for its trainer alone, and that for its module's replicas.
        size: items of the split.
        fetch: from blocks of positions to batches.
        batch_size: items of a batch on each rank.
        seed: of the order; None: that of ``seed_everything``, else 0.
        drop_last: leave out the last, shorter global batch.
        batches: of an epoch, on each rank; None: as many as one pass has.
        order: makes the order from the arguments of `TrainOrder`.
    """
    rank, world = rank_and_world()
    seed = run_seed(seed)
    shuffle = not getattr(datamodule.trainer, "overfit_batches", 0)
    module = getattr(datamodule.trainer, "lightning_module", None)
    replicas = module.replicas if isinstance(module, HasReplicas) else 1
    made = order(size, batch_size, seed, shuffle, drop_last, rank, world, batches, replicas)
    if not len(made):
        raise UserError(
            f"batch_size={batch_size} on {world} process(es) with drop_last leaves no batch of {size} training items; "
            "lower batch_size"
        )
    return TrainLoader(made, fetch)


def eval_blocks(size: int, batch_size: int, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Positions of a rank's evaluation batches: a contiguous shard of ``range(size)``, cut into batches.

    Shards differ by one item at most. All ranks have equally many batches (some an item shorter), because
    DistributedDataParallel synchronises buffers at every forward pass, in evaluation too.

    Args:
        size: items of the split.
        batch_size: items of a batch on each rank.
        rank: of this process.
        world: number of processes.
    """
    if size < world:
        raise UserError(f"a split of {size} items cannot be spread over {world} processes")
    begin, end = (size * r // world for r in (rank, rank + 1))
    # With batches of one item the shorter shards set the number, and the longer ones end with a batch of two.
    batches = min(math.ceil(math.ceil(size / world) / batch_size), size // world)
    # A shard that is one item short may lack one for its last batch: the batch before it then gives one up.
    cuts = [begin + min(i * batch_size, end - begin - batches + i) for i in range(batches)]
    return [torch.arange(*bounds) for bounds in zip(cuts, [*cuts[1:], end], strict=True)]


def remaining_blocks(size: int, batch_size: int, done: Tensor, rank: int = 0, world: int = 1) -> list[Tensor]:
    """Positions of a rank's batches when the items at `done` are left out.

    Batches are those of an undisturbed pass by as many processes, because what comes out for an item may depend, in
    its last bits, on its neighbours. They are dealt out anew, in equal numbers: sharded models compute together. A rank
    that lacks one goes through a batch again whose items it, or an earlier process, has done.

    Args:
        size: items of the split.
        batch_size: items of a batch on each rank.
        done: (N,) int64 positions to leave out.
        rank: of this process.
        world: number of processes.
    """
    is_done = torch.zeros(size, dtype=torch.bool)
    is_done[done] = True
    blocks = [block for r in range(world) for block in eval_blocks(size, batch_size, r, world)]
    left = [rest for block in blocks if len(rest := block[~is_done[block]])]
    begin, end = (len(left) * r // world for r in (rank, rank + 1))
    own = left[begin:end]
    if len(own) < math.ceil(len(left) / world):
        # There are at least `world` blocks, so where a rank has none, one of them is done.
        own.append(own[0] if own else next(block for block in blocks if is_done[block].all()))
    return own


class EvalLoader(Generic[B]):
    """A split in its own order, each item exactly once over all ranks. Metrics must weight by items.

    Args:
        size: items of the split.
        batch_size: items of a batch.
        fetch: from blocks of positions to batches.
        rank: of this process.
        world: number of processes.
        done: positions (N,) int64 to leave out; none by default. See `remaining_blocks`.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        fetch: Fetch[B],
        rank: int = 0,
        world: int = 1,
        done: Tensor | None = None,
    ) -> None:
        self._fetch = fetch
        if done is None or not len(done):
            self._blocks = eval_blocks(size, batch_size, rank, world)
        else:
            self._blocks = remaining_blocks(size, batch_size, done, rank, world)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[B]:
        return iter(self._fetch(self._blocks))


class PartLoaders(Generic[B]):
    """Loaders of a DataModule whose parts lie in memory; it sets the attributes, and ``train_dataloader`` is its own.

    Attributes: ``train_split``, ``val_split``, ``test_split``, each with a length and ``batches(blocks)``;
    ``eval_batch_size``; ``predict_split``, the part that `predict` goes through.
    """

    train_split: Any
    val_split: Any
    test_split: Any
    eval_batch_size: int
    predict_split: Split
    _predicted: Tensor | None = None

    def _eval_loader(self, split: Any, done: Tensor | None = None) -> EvalLoader[B]:
        return EvalLoader(len(split), self.eval_batch_size, split.batches, *rank_and_world(), done)

    def val_dataloader(self) -> EvalLoader[B] | list[Any]:
        """Held-out items; no loader when there are none."""
        return self._eval_loader(self.val_split) if self.val_split is not None else []

    def test_dataloader(self) -> EvalLoader[B]:
        """The test part."""
        return self._eval_loader(self.test_split)

    def predict_dataloader(self) -> EvalLoader[B]:
        """The part `predict_split`, without the items of `skip_predicted`."""
        return self._eval_loader(self._part(self.predict_split), self._predicted)

    def _part(self, name: Split) -> Any:
        """The part called `name`; UserError when there is none."""
        split = {"train": self.train_split, "val": self.val_split, "test": self.test_split}[name]
        if split is None:
            raise UserError("predict_split: val, but there is no validation data; raise val_fraction")
        return split

    def skip_predicted(self, index: Tensor) -> None:
        """Leave the items at these positions of `predict_split`, (N,) int64, out of predict loaders."""
        self._predicted = index
