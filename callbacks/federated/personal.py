"""How well a federation's network serves each client, as it is and after some training on the client's own data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from callbacks.common import gather_objects
from callbacks.media import due, publish
from leanlight.contracts import (
    ClientBatch,
    FederatedData,
    FederatedModule,
    Histogram,
    ImageBatch,
    MediaItem,
    Table,
    UserError,
    data_of,
    derived_seed,
    isolated_rng,
    on_host,
    run_seed,
)
from leanlight.contracts.ranges import NonNegativeInt, PositiveInt, Seed

Part = Literal["val", "test"]

_BATCH = 1024  # images that a network answers at once
_WORST = 0.1  # share of the clients that are the worst


class Personal(NamedTuple):
    """Accuracies of one client, on `items` images: of the global network, and of the one that it tuned."""

    items: int
    global_accuracy: float
    tuned_accuracy: float


class PersonalisedEvaluation(Callback):
    """Measures the global network, and what each client can make of it, on images like the client's own.

    A client is measured on images of the server's, drawn with the shares of its own labels. Its *tuned* network is the
    global one after `epochs` passes over all of its data, with its local loss and an optimiser of its own, without what
    an objective adds (FedProx, SCAFFOLD); it is thrown away. All clients that have data count alike, those that never
    took part, too. Nothing is left in module, data or random states; the clients are spread over processes, and their
    number changes nothing.

    Logged by the test, of test images: ``test/personal_global_mean``, ``…_global_std`` (over clients),
    ``…_global_worst_decile`` (mean of the tenth of the clients that is worst off), the same three as ``…_tuned_…``, and
    ``…_gain``, what the tuned mean is above the global one. With `every_n_epochs` also after rounds, of validation
    images, as ``val/personal_…``. Beside them ``artifacts/media/<split>/personal_accuracy.png``, a histogram over
    clients, and ``personal_clients.csv``, a row a client.

    Args:
        epochs: passes of a client over its data; 0 leaves the global network as it is.
        every_n_epochs: also measure after every n-th round, and the last; 0 measures in the test alone.
        items: images that a client is measured on at most; fewer where a class has too few for the shares.
        seed: of the draw of images; that of ``seed_everything`` by default, else 0.
    """

    def __init__(
        self,
        epochs: NonNegativeInt = 1,
        every_n_epochs: NonNegativeInt = 0,
        items: PositiveInt = 200,
        seed: Seed | None = None,
    ) -> None:
        for name, value, least in (("epochs", epochs, 0), ("every_n_epochs", every_n_epochs, 0), ("items", items, 1)):
            if value < least:
                raise UserError(f"PersonalisedEvaluation: {name}: expected at least {least}, got {value}")
        self.epochs, self.every_n_epochs, self.items = epochs, every_n_epochs, items
        self.seed = run_seed(seed)
        self.rounds = 0  # that have been played: the learning rate and the width of a client depend on it
        self.clients: dict[int, Personal] = {}  # newest

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in ("fit", "test"):
            return
        if not isinstance(pl_module, FederatedModule):
            raise UserError(f"PersonalisedEvaluation: needs a federated module, got {type(pl_module).__name__}")
        data = data_of(pl_module, FederatedData)
        if stage == "fit" and self.every_n_epochs and data.val_split is None:
            raise UserError(
                "PersonalisedEvaluation: every_n_epochs: expected 0 without validation images, "
                f"got {self.every_n_epochs}; set the data's val_fraction"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rounds = trainer.current_epoch + 1
        if self.every_n_epochs and due(trainer, self.every_n_epochs):
            self.clients = self._measure(trainer, pl_module, "val")
            self._publish(trainer, pl_module, "val")

    # At the start, since other callbacks watch what the network does between here and the end of the test.
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clients = self._measure(trainer, pl_module, "test")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._publish(trainer, pl_module, "test")

    def _measure(self, trainer: Trainer, pl_module: LightningModule, part: Part) -> dict[int, Personal]:
        sizes = data_of(pl_module, FederatedData).client_sizes
        holders = [client for client, size in enumerate(sizes) if size > 0]
        mine, counts = holders[trainer.global_rank :: trainer.world_size], []
        with torch.inference_mode(False):
            pl_module.start_round(self.rounds, holders, [])  # type: ignore[operator]
            for client in mine:
                with isolated_rng(derived_seed(self.seed, "personal", client)):
                    counts.append(self._count(trainer, pl_module, client, part))
        own = {}
        if mine:  # all at once: each read waits for a device
            rows = torch.stack(counts).tolist()
            own = {client: Personal(n, a / n, b / n) for client, (n, a, b) in zip(mine, rows, strict=True)}
        return dict(sorted((client, row) for rank in gather_objects(own) for client, row in rank.items()))

    def _count(self, trainer: Trainer, pl_module: LightningModule, client: int, part: Part) -> Tensor:
        """(3,) images that a client is measured on, and how many of them the global and the tuned network get right."""
        data, device = data_of(pl_module, FederatedData), pl_module.device
        precision = trainer.strategy.precision_plugin
        split = data.test_split if part == "test" else data.val_split
        assert split is not None
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "personal", client))
        index = like_client(data.class_matrix[client], split.labels, self.items, generator)
        images = data.as_seen(split.batch(index), part).to(device)
        with precision.test_step_context():
            before = _right_answers(pl_module.network_of(client), images)  # type: ignore[operator]
        own = ClientBatch(data.client_data(client).to(device), client, self.rounds)
        with precision.train_step_context(), torch.enable_grad():
            tuned = pl_module.tune(own, self.epochs)  # type: ignore[operator]
        with precision.test_step_context():
            after = _right_answers(tuned, images)
        return torch.stack([torch.full_like(before, len(index)), before, after])

    def _publish(self, trainer: Trainer, pl_module: LightningModule, part: Part) -> None:
        values = {f"{part}/personal_{name}": value for name, value in summarise(self.clients).items()}
        pl_module.log_dict(on_host(values), on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        sizes = data_of(pl_module, FederatedData).client_sizes
        publish(trainer, pl_module, part, draw(self.clients, sizes))

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rounds = state_dict["rounds"]


def like_client(held: Tensor, labels: Tensor, items: int, generator: torch.Generator) -> Tensor:
    """Ascending positions of different items whose labels have the shares of a client's, up to whole numbers.

    Where a class has too few, all classes give fewer; classes without any are left out.

    Args:
        held: (K,) int64 items of each class that the client holds.
        labels: (N,) int64 class of the items to draw from.
        items: how many to draw at most.
        generator: on the CPU; which of a class are drawn.

    Raises:
        UserError: none of the items is of a class that the client holds.
    """
    there = torch.bincount(labels, minlength=len(held))
    share = torch.where(there > 0, held, 0).double()
    if not share.any():
        raise UserError("PersonalisedEvaluation: a client holds only classes of which there is no image to measure on")
    share /= share.sum()
    whole = there[share > 0] / share[share > 0]  # items of all classes, if one gave all it has
    total = min(items, math.floor(whole.min() + 1e-9))
    counts = (share * total).floor().long()
    rest = (share * total - counts).argsort(descending=True, stable=True)[: total - int(counts.sum())]
    counts[rest] += 1
    order = torch.randperm(len(labels), generator=generator)
    order = order[labels[order].argsort(stable=True)]  # by class, at random within each
    place = torch.arange(len(labels)) - (there.cumsum(0) - there)[labels[order]]
    return order[place < counts[labels[order]]].sort().values


def summarise(clients: Mapping[int, Personal]) -> dict[str, float]:
    """Mean, standard deviation and worst tenth over clients of both accuracies, and the gain of the mean."""
    values: dict[str, float] = {}
    for name, row in _accuracies(clients).items():
        worst = row.sort().values[: math.ceil(_WORST * len(row))]
        figures = {"mean": row.mean(), "std": row.std(correction=0), "worst_decile": worst.mean()}
        values |= {f"{name}_{figure}": float(value) for figure, value in figures.items()}
    return values | {"gain": values["tuned_mean"] - values["global_mean"]}


def draw(clients: Mapping[int, Personal], sizes: Sequence[int]) -> dict[str, MediaItem]:
    """Both accuracies over clients, as a histogram and as a table. sizes: items that each client holds."""
    columns = ("client", "items", "measured_on", "global_accuracy", "tuned_accuracy")
    rows = [(client, sizes[client], *row) for client, row in clients.items()]
    edges = [i / 20 for i in range(21)]
    return {
        "personal_accuracy": Histogram(_accuracies(clients), "accuracy on images like the client's own", edges),
        "personal_clients": Table(columns, rows),
    }


def _accuracies(clients: Mapping[int, Personal]) -> dict[str, Tensor]:
    return {
        "global": torch.tensor([row.global_accuracy for row in clients.values()], dtype=torch.float64),
        "tuned": torch.tensor([row.tuned_accuracy for row in clients.values()], dtype=torch.float64),
    }


@torch.no_grad()
def _right_answers(network: nn.Module, batch: ImageBatch) -> Tensor:
    was_training = network.training
    network.eval()
    pieces = zip(batch.image.split(_BATCH), batch.label.split(_BATCH), strict=True)
    right = torch.stack([(network(image).argmax(1) == label).sum() for image, label in pieces]).sum()
    network.train(was_training)
    return right
