"""Benchmark of the federated simulation: seconds a round against a plain loop, one client at a time and batched."""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from torch import nn
from torch.nn.functional import cross_entropy

from callbacks import FederatedRounds
from datamodules import IID, FederatedDataModule
from leanlight.benchmarks.core import QUIET, Measurement, PaperStep, Target, network_step, ratios, summarise
from leanlight.benchmarks.gpu.checks import Check
from leanlight.benchmarks.gpu.training import Runs, two_as_one
from lit_modules.federated import FederatedClassifier, LocalTraining, RandomClients
from lit_modules.federated.reference import plain_round
from lit_modules.nn import MLP, ConvNet
from lit_modules.sfedca import SpikingCNN

_LR, _BATCH, _EPOCHS, _SEED = 0.1, 16, 5, 0


def mlp() -> nn.Module:
    """An MLP with 64 hidden units on 28x28 images."""
    return MLP(in_channels=1, num_classes=10, hidden=(64,), image_size=28)


def cnn() -> nn.Module:
    """A convolutional network of two blocks and 8 channels on 28x28 images, without norm."""
    return ConvNet(in_channels=1, num_classes=10, width=8, depth=2, norm="none", image_size=28)


class Rounds(pl.Callback):
    """Seconds of each training epoch, validation left out, and of the same round by `plain_round` right after it.

    Side by side, so that a machine that slows down for a while slows both.
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs
        self.seconds: list[float] = []
        self.plain_seconds: list[float] = []
        self._begin = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, FederatedClassifier)
        self.plain = copy.deepcopy(pl_module.network)
        data: FederatedDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self.clients = [(batch.image, batch.label) for batch in map(data.client_data, range(data.clients))]

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        middle = time.perf_counter()
        plain_round(self.plain, self.clients, trainer.current_epoch, self.epochs, _LR, _BATCH, _SEED)
        self.seconds.append(middle - self._begin)
        self.plain_seconds.append(time.perf_counter() - middle)


def simulate(
    clients: int,
    rounds: int,
    clients_at_once: int = 1,
    network: Callable[[], nn.Module] = mlp,
    epochs: int = _EPOCHS,
) -> tuple[FederatedClassifier, Rounds]:
    """Train rounds of FedAvg over all `clients` on packaged Fashion-MNIST, and beside them those of the plain loop."""
    torch.manual_seed(_SEED)
    data = FederatedDataModule(
        dataset="fashion_mnist", variant="subset", clients=clients, partition=IID(), partition_seed=_SEED, seed=_SEED
    )
    model = FederatedClassifier(
        network,
        local=LocalTraining(epochs=epochs, batch_size=_BATCH),
        optimizer=functools.partial(torch.optim.SGD, lr=_LR),
        clients_at_once=clients_at_once,
        seed=_SEED,
    )
    clock = Rounds(epochs)
    server = FederatedRounds(RandomClients(), participants=clients, probe=0, every_n_epochs=0, seed=_SEED)
    with tempfile.TemporaryDirectory() as folder:
        limits: dict[str, Any] = {"max_epochs": rounds, "limit_val_batches": 0, "default_root_dir": folder}
        pl.Trainer(accelerator="cpu", callbacks=[clock, server], **limits, **QUIET).fit(model, datamodule=data)
    return model, clock


def simulate_on_flower(clients: int, rounds: int) -> tuple[FederatedClassifier, Rounds]:
    """`simulate` with an MLP whose clients are nodes of Flower's simulation, as many processes as there are cores."""
    from leanlight.flower import build
    from leanlight.flower import simulate as run_nodes

    seeds = {"seed": _SEED}
    server = {"selector": "lit_modules.federated.RandomClients", "participants": clients, "probe": 0}
    with tempfile.TemporaryDirectory() as folder:
        model = {
            "network": {"class_path": "lit_modules.nn.MLP", "init_args": {"in_channels": 1, "hidden": [64]}},
            "local": {"epochs": _EPOCHS, "batch_size": _BATCH},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": _LR}},
        }
        data = {"dataset": "fashion_mnist", "variant": "subset", "clients": clients, "partition_seed": _SEED}
        callback = {"class_path": "callbacks.FederatedRounds", "init_args": {**server, "every_n_epochs": 0, **seeds}}
        limits = {"max_epochs": rounds, "limit_val_batches": 0, "enable_progress_bar": False}
        config = {
            "model": {"class_path": "lit_modules.federated.FederatedClassifier", "init_args": {**model, **seeds}},
            "data": {"class_path": "datamodules.FederatedDataModule", "init_args": {**data, **seeds}},
            "trainer": {"accelerator": "cpu", "default_root_dir": folder, "callbacks": [callback], **limits},
            "run": {"method": "sfedca", "dataset": "fashion_mnist", "wandb": "disabled", "test": "none"},
            "export_artifact": {"enabled": False},
        }
        cli = build(yaml.safe_dump(config))
        clock = Rounds(_EPOCHS)
        cli.trainer.callbacks.insert(0, clock)  # type: ignore[attr-defined]
        run_nodes(cli)
    return cli.model, clock


def equal(model: FederatedClassifier, clock: Rounds) -> bool:
    """Whether the engine's weights are those of the plain loop."""
    plain = clock.plain.state_dict()
    return all(
        torch.allclose(value, plain[name], rtol=1e-3, atol=1e-4) for name, value in model.network.state_dict().items()
    )


def run(quick: bool = False) -> Measurement:
    """Measure on the CPU, with as many threads as PyTorch takes."""
    rounds, counts = (3, [10]) if quick else (8, [10, 50, 100])
    measured = Measurement(
        settings={"networks": "MLP 784-64-10; ConvNet 8-8", "local_epochs": _EPOCHS, "batch_size": _BATCH, "lr": _LR}
    )
    measured.settings |= {"rounds": rounds, "data": "packaged Fashion-MNIST", "threads": torch.get_num_threads()}
    for network, clients in [(make, count) for make in (mlp, cnn) for count in counts]:
        name, over = f"{network.__name__}_{clients}_clients", {}
        for kind, at_once in (("sequential", 1), ("batched", clients)):
            _, clock = simulate(clients, rounds, at_once, network)
            over[kind] = ratios(clock.seconds[1:], clock.plain_seconds[1:])
            measured.figures[f"{name}/{kind}"] = summarise([1000 * s for s in clock.seconds[1:]], "ms a round")
            # After one pass: training amplifies what the order of additions changes, wherever a ReLU switches.
            text = f"{name}, {kind}: after a round of one epoch the weights of the plain loop within 1e-4"
            measured.checks[text] = equal(*simulate(clients, 1, at_once, network, epochs=1))
        plain = summarise([1000 * s for s in clock.plain_seconds[1:]], "ms a round")
        measured.figures[f"{name}/plain_loop"] = plain
        more = [100 * (ratio - 1) for ratio in over["sequential"]]
        measured.figures[f"{name}/sequential_over_plain"] = summarise(more, "%")
        faster = ratios(over["sequential"], over["batched"])
        measured.figures[f"{name}/batched_speedup"] = summarise(faster, "x", "higher")
        over_plain = summarise([1 / ratio for ratio in over["batched"]], "x", "higher")
        measured.figures[f"{name}/batched_over_plain"] = over_plain
        measured.targets += [
            Target(f"{name}/sequential_over_plain", 5.0, f"{name}: at most 5 % slower than the plain loop"),
            Target(f"{name}/batched_speedup", 2.0, f"{name}: batched at least twice as fast as one by one"),
            Target(f"{name}/batched_over_plain", 2.0, f"{name}: batched at least twice as fast as the plain loop"),
        ]
        if (network, clients) == (mlp, 10):
            _beside_flower(measured, name, rounds, over["batched"])
    return measured


def _beside_flower(measured: Measurement, name: str, rounds: int, batched: Sequence[float]) -> None:
    """Add rounds on Flower. batched: a round's time over that of the plain loop."""
    figure = f"{name}/flower_over_batched"
    if find_spec("flwr") is None or find_spec("ray") is None:
        measured.missing[figure] = "flwr is not installed: extra flower"
        return
    model, clock = simulate_on_flower(10, rounds)
    over = ratios(clock.seconds[1:], clock.plain_seconds[1:])
    measured.figures[f"{name}/flower"] = summarise([1000 * s for s in clock.seconds[1:]], "ms a round")
    measured.figures[figure] = summarise(ratios(over, batched), "x", "higher")
    measured.checks[f"{name}, Flower: after {rounds} rounds the weights of the plain loop within 1e-4"] = equal(
        model, clock
    )
    measured.targets.append(Target(figure, 5.0, f"{name}: batched at least 5 times as fast as Flower's simulation"))


def paper_steps(where: str, quick: bool = False) -> dict[str, Callable[[], PaperStep]]:
    """A client's local step of `sfedca/cifar10`: T = 12, 128 images."""

    batch = 2 if quick else 128

    def make() -> PaperStep:
        torch.manual_seed(0)
        layers: dict[str, Any] = {"channels": (64, 192, 384, 256, 256), "strides": (2, 1, 1, 1, 1)}
        layers |= {"pools": (True, True, False, False, True), "hidden": (4096, 4096), "spiking_output": False}
        network = SpikingCNN(3, 10, **layers, time_steps=12, image_size=32).to(where)
        image, label = torch.rand(batch, 3, 32, 32, device=where), torch.arange(batch, device=where) % 10
        return network_step(network, lambda: cross_entropy(network(image), label), batch)

    return {"spiking_cnn_T12": make}


def gpu_checks(folder: Path, where: str) -> Iterator[Check]:
    """What only this method promises on a GPU."""
    made = Runs(["sfedca/digits_small"], folder, where)
    what = "two GPUs train the clients of a round as one does: weights within 1e-3"
    yield Check("sfedca", "two_as_one", what, functools.partial(two_as_one, made))
