"""Benchmark of the federated simulation: seconds a round against a plain loop, one client at a time and batched."""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from callbacks import FederatedRounds
from datamodules import IID, FederatedDataModule
from leanlight.benchmarks.core import Measurement, Target, ratios, summarise
from leanlight.contracts import derived_seed
from lit_modules.federated import FederatedClassifier, LocalTraining, RandomClients
from lit_modules.nn import MLP, ConvNet

_LR, _BATCH, _EPOCHS, _SEED = 0.1, 16, 5, 0
Client = tuple[Tensor, Tensor]


def plain_round(network: nn.Module, clients: Sequence[Client], number: int, epochs: int = _EPOCHS) -> None:
    """A round of FedAvg over all clients as a plain loop has it: load the state, train, save the state; then the mean.

    network: trained in place. clients: images (n, C, H, W) in [0, 1] and labels of each. The order of a client's data
    is that of `FederatedClassifier`, so that both can be compared.
    """
    worker = copy.deepcopy(network)
    states = []
    for client, (image, label) in enumerate(clients):
        worker.load_state_dict(network.state_dict())
        optimizer = torch.optim.SGD(worker.parameters(), lr=_LR)
        order = torch.Generator().manual_seed(derived_seed(_SEED, "order", number, client))
        worker.train()
        for _ in range(epochs):
            for index in torch.randperm(len(label), generator=order).split(_BATCH):
                loss = F.cross_entropy(worker(image[index]), label[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        states.append({name: value.clone() for name, value in worker.state_dict().items()})
    network.load_state_dict(
        {
            name: torch.stack([state[name] for state in states]).mean(0)
            if value.is_floating_point()
            else torch.stack([state[name] for state in states]).amax(0)
            for name, value in states[0].items()
        }
    )


def mlp() -> nn.Module:
    """An MLP with 64 hidden units on 28x28 images."""
    return MLP(in_channels=1, num_classes=10, hidden=(64,), image_size=28)


def cnn() -> nn.Module:
    """A convolutional network of two blocks and 8 channels on 28x28 images, without norm."""
    return ConvNet(in_channels=1, num_classes=10, width=8, depth=2, norm="none", image_size=28)


class RoundClock(pl.Callback):
    """Seconds of each training epoch, validation left out."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._begin)


def simulate(
    clients: int, rounds: int, clients_at_once: int = 1, network: Callable[[], nn.Module] = mlp, **local: Any
) -> tuple[FederatedClassifier, FederatedDataModule, list[float]]:
    """Train rounds of FedAvg over all `clients` on packaged Fashion-MNIST; return also the seconds of each round."""
    torch.manual_seed(_SEED)
    data = FederatedDataModule(
        dataset="fashion_mnist", variant="subset", clients=clients, partition=IID(), partition_seed=_SEED, seed=_SEED
    )
    model = FederatedClassifier(
        network,
        local=LocalTraining(**{"epochs": _EPOCHS, "batch_size": _BATCH, **local}),
        optimizer=functools.partial(torch.optim.SGD, lr=_LR),
        clients_at_once=clients_at_once,
        seed=_SEED,
    )
    clock = RoundClock()
    server = FederatedRounds(RandomClients(), participants=clients, probe=0, every_n_epochs=0, seed=_SEED)
    with tempfile.TemporaryDirectory() as folder:
        quiet: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        limits: dict[str, Any] = {"max_epochs": rounds, "limit_val_batches": 0, "default_root_dir": folder}
        pl.Trainer(accelerator="cpu", callbacks=[clock, server], **limits, **quiet).fit(model, datamodule=data)
    return model, data, clock.seconds


def simulate_plainly(
    data: FederatedDataModule, rounds: int, network: Callable[[], nn.Module] = mlp
) -> tuple[nn.Module, list[float]]:
    """The same rounds by `plain_round`, from the same first weights."""
    torch.manual_seed(_SEED)
    model, seconds = network(), []
    clients = [(batch.image, batch.label) for batch in map(data.client_data, range(data.clients))]
    for number in range(rounds):
        begin = time.perf_counter()
        plain_round(model, clients, number)
        seconds.append(time.perf_counter() - begin)
    return model, seconds


def run(quick: bool = False) -> Measurement:
    """Measure on the CPU, with as many threads as PyTorch takes."""
    rounds, counts = (3, [10]) if quick else (8, [10, 50, 100])
    measured = Measurement(
        settings={"networks": "MLP 784-64-10; ConvNet 8-8", "local_epochs": _EPOCHS, "batch_size": _BATCH, "lr": _LR}
    )
    measured.settings |= {"rounds": rounds, "data": "packaged Fashion-MNIST", "threads": torch.get_num_threads()}
    for network, clients in [(make, count) for make in (mlp, cnn) for count in counts]:
        sequential, data, one_by_one = simulate(clients, rounds, network=network)
        batched, _, together = simulate(clients, rounds, clients_at_once=clients, network=network)
        plain, loop = simulate_plainly(data, rounds, network)
        name = f"{network.__name__}_{clients}_clients"
        for part, seconds in (("plain", loop), ("sequential", one_by_one), ("batched", together)):
            measured.figures[f"{name}/{part}"] = summarise([1000 * s for s in seconds[1:]], "ms a round")
        more = [100 * (ratio - 1) for ratio in ratios(one_by_one[1:], loop[1:])]
        measured.figures[f"{name}/sequential_over_plain"] = summarise(more, "%")
        measured.figures[f"{name}/batched_speedup"] = summarise(ratios(one_by_one[1:], together[1:]), "x", "higher")
        for text, model in (("sequential", sequential), ("batched", batched)):
            measured.checks[f"{name}, {text}: the weights of the plain loop within 1e-4"] = all(
                torch.allclose(value, plain.state_dict()[key], rtol=1e-3, atol=1e-4)
                for key, value in model.network.state_dict().items()
            )
        measured.targets += [
            Target(f"{name}/sequential_over_plain", 5.0, f"{name}: at most 5 % slower than the plain loop"),
            Target(f"{name}/batched_speedup", 2.0, f"{name}: batched at least twice as fast as one by one"),
        ]
    return measured
