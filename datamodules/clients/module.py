"""An image set spread over the clients of a federation."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from datamodules.clients.partition import IID, Partition, class_matrix
from datamodules.images.module import ImageDataModule
from datamodules.loaders import rank_and_world
from leanlight.contracts import ClientBatch, ImageBatch, UserError, run_seed
from leanlight.contracts.ranges import PositiveInt, Seed


class FederatedDataModule(ImageDataModule):
    """Training data spread over clients; validation and test data stay with the server.

    A training epoch is a communication round: one `ClientBatch` for each client of this process' share of the round,
    then a last one, without a client, for the server's step. All processes have equally many. Which clients take part
    is said by `schedule`, which `callbacks.FederatedRounds` calls. Satisfies `leanlight.contracts.FederatedData`.

    Args:
        clients: number of clients N.
        partition: how the training part is spread over them.
        partition_seed: makes the partition; default the seed of ``seed_everything``, else 0.
        kwargs: of `ImageDataModule`; local batch sizes and augmentation belong to the module.

    Attributes (after `setup`): ``parts``, one array of positions in ``train_split`` a client; ``class_matrix``
    (clients, classes) int64; ``client_sizes``.
    """

    def __init__(
        self,
        clients: PositiveInt = 100,
        partition: Partition | None = None,
        partition_seed: Seed | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if clients < 1:
            raise UserError(f"clients: expected at least 1, got {clients}")
        if self.augment is not None:
            raise UserError("augment: expected none, since local training augments; set local.augment of the module")
        self.clients, self.partition = clients, partition or IID()
        self.partition_seed = run_seed(partition_seed)
        self.parts: list[np.ndarray] = []
        self.client_sizes: list[int] = []
        self._reserved = 0
        self._round, self._work = -1, {}  # type: int, dict[int, float]

    def setup(self, stage: str | None = None) -> None:
        """Load the set, spread its training part, and say so in `meta`."""
        if self.parts:
            return
        super().setup(stage)
        labels = self.train_split.labels.numpy()
        if labels.ndim > 1:
            raise UserError(f"dataset: expected one label an image, {self.dataset} has attributes")
        self.parts = self.partition.split(labels, self.clients, self.partition_seed)
        self.class_matrix = torch.from_numpy(class_matrix(labels, self.parts, self.meta.num_classes))
        self.client_sizes = [len(part) for part in self.parts]
        digest = hashlib.sha256(self.meta.fingerprint.encode())
        for part in self.parts:
            digest.update(part.astype(np.int64).tobytes() + b"|")
        self.meta = dataclasses.replace(
            self.meta,
            fingerprint=digest.hexdigest(),
            counts={**self.meta.counts, "train": sum(self.client_sizes)},
            class_counts=tuple(self.class_matrix.sum(0).tolist()),
        )

    # ---- what the server asks ----

    def reserve(self, clients: int) -> None:
        """Say how many clients a round trains at most."""
        self._reserved = clients

    def schedule(self, round_number: int, work: Mapping[int, float]) -> None:
        """Say which clients the coming round trains.

        Args:
            round_number: of the round, from 0.
            work: client → share of its local steps that it manages, in (0, 1].
        """
        if len(work) > self._reserved:
            raise UserError(f"a round of {len(work)} clients is longer than the {self._reserved} that were reserved")
        self._round, self._work = round_number, dict(work)

    def client_data(self, client: int) -> ImageBatch:
        """All data of a client, images float32 in [0, 1], noisy where `train_corruption` says so."""
        return self.as_seen(self._raw_data(client), "train")

    def _raw_data(self, client: int) -> ImageBatch:
        part = self.parts[client] if client >= 0 else np.zeros(0, np.int64)
        return self.train_split.batch(torch.from_numpy(part))

    # ---- loader ----

    def train_dataloader(self) -> ClientLoader:  # type: ignore[override]
        """One batch a client, then one for the server."""
        if not self._reserved:
            raise UserError(
                "trainer.callbacks: FederatedDataModule needs callbacks.FederatedRounds, which says who trains"
            )
        return ClientLoader(self)

    def round_batches(self, length: int) -> Iterator[ClientBatch]:
        """This process' batches of the scheduled round: `length` of them, the last one for the server."""
        rank, world = rank_and_world()
        mine = list(self._work.items())[rank::world]
        for client, work in mine:
            yield ClientBatch(self._raw_data(client), client, self._round, work)
        for number in range(len(mine), length):
            yield ClientBatch(self._raw_data(-1), -1, self._round, last=number == length - 1)

    def batches_a_round(self) -> int:
        """The same on every process."""
        return math.ceil(self._reserved / rank_and_world()[1]) + 1

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Scale to [0, 1] on the device, with the noise of `train_corruption`."""
        if isinstance(batch, ClientBatch):
            return dataclasses.replace(batch, data=self.as_seen(batch.data, "train"))
        return super().on_after_batch_transfer(batch, dataloader_idx)


class ClientLoader:
    """The batches of the scheduled round. After `load_state_dict` the next iteration goes on with the next batch.

    Args:
        data: asked for its round when iteration begins.
    """

    def __init__(self, data: FederatedDataModule) -> None:
        self._data = data
        self._position = 0

    def __len__(self) -> int:
        return self._data.batches_a_round()

    def __iter__(self) -> Iterator[ClientBatch]:
        # A generator's body starts at the first `next`: Lightning calls iter() before the round is scheduled.
        start, length = self._position % len(self), len(self)
        for number, batch in enumerate(self._data.round_batches(length), 1):
            if number > start:
                self._position = number
                yield batch
        self._position = 0

    def state_dict(self) -> dict[str, int]:
        """Batches handed out in this round."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over what `state_dict` gave."""
        self._position = state["position"]
