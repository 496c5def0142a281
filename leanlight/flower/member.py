"""What each process of a federation on Flower builds of the config, and what its clients do."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from callbacks import FederatedRounds
from leanlight.contracts import ClientBatch, ClientUpdate, UserError, isolated_rng
from leanlight.contracts.federated import State
from leanlight.experiment import LeanlightCLI
from leanlight.invocation import expand
from leanlight.messages import quiet_lightning
from lit_modules.federated import FederatedClassifier


def build(config: str) -> LeanlightCLI:
    """Trainer, model and data of a complete config.

    Args:
        config: as YAML. The data are in the folder ``LEANLIGHT_DATA`` of this process, where that is set.

    Raises:
        UserError: a bad config, or one that is no federation.
    """
    quiet_lightning()
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Ray shows them for every process
    root = os.environ.get("LEANLIGHT_DATA")
    with tempfile.TemporaryDirectory() as folder, isolated_rng():
        path = Path(folder) / "config.yaml"
        path.write_text(config, encoding="utf-8")
        cli = LeanlightCLI(expand(["fit", f"--config={path}", *([f"--data.root={root}"] if root else [])]))
    rounds_of(cli)
    return cli


def rounds_of(cli: LeanlightCLI) -> FederatedRounds:
    """The callback that runs the rounds of a federation; UserError where there is none that Flower can take over."""
    trainer = cli.trainer
    rounds = [callback for callback in trainer.callbacks if isinstance(callback, FederatedRounds)]  # type: ignore[attr-defined]
    if not rounds or not isinstance(cli.model, FederatedClassifier):
        raise UserError(
            "config: expected a federation, a FederatedClassifier with callbacks.FederatedRounds, such as "
            f"sfedca/digits_small; got {type(cli.model).__name__}"
        )
    if trainer.world_size > 1:
        raise UserError(f"trainer.devices: expected 1, since Flower has the other processes; got {trainer.world_size}")
    return rounds[0]


class Member:
    """Trains and scores clients as the server asks. What differs between them is passed in and returned.

    Args:
        cli: trainer, model and data; of the trainer only device and precision are used.
    """

    def __init__(self, cli: LeanlightCLI) -> None:
        assert isinstance(cli.model, FederatedClassifier)
        self.module, self.data, self.trainer = cli.model, cli.datamodule, cli.trainer
        self.selector = rounds_of(cli).selector
        self.module.trainer, self.trainer.datamodule = self.trainer, self.data  # type: ignore[attr-defined]
        self.data.ensure_available()
        self.data.setup("fit")
        self.module.setup("fit")
        self.module.to(self.trainer.strategy.root_device)
        self.module.measures_clients = self.selector.scored == "after"

    def train(
        self, batch: ClientBatch, joined: Sequence[int], weights: State, controls: Mapping[str, State]
    ) -> tuple[ClientUpdate, float | None]:
        """Train a client; return what it has then, and its score if it is chosen by one.

        Args:
            batch: its id, round and share of work; its data are put in here.
            joined: clients of the round, those who drop out included.
            weights: of the global network that it trains.
            controls: SCAFFOLD's, of the ``server`` and its ``own``; empty at first and without SCAFFOLD.
        """
        self.module.start_round(batch.round_number, joined, [batch.client])
        self.module.network_of(batch.client).load_state_dict(weights)
        self.module.controls.server = dict(controls["server"])
        self.module.controls.clients = {batch.client: dict(controls["own"])} if controls["own"] else {}
        with self.trainer.precision_plugin.train_step_context():
            update = self.module.train_one(batch)
        return update, self.selector.score_of(update)

    def score(self, batch: ClientBatch, weights: State) -> float:
        """Score of the received weights on a client's data. batch, weights: as for `train`."""
        self.module.network_of(batch.client).load_state_dict(weights)
        measured = self.module.measure(batch.data, batch.round_number, batch.client)
        return self.selector.score(measured, None, None)

    def batch(self, client: int, round_number: int, work: float = 1.0) -> ClientBatch:
        """A client's data, on this process' device."""
        return ClientBatch(self.data.client_data(client), client, round_number, work).to(self.module.device)


@lru_cache(maxsize=1)
def member(config: str) -> Member:
    """This process' only one, built when the first client is asked."""
    return Member(build(config))
