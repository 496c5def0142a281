"""The ServerApp and its strategy: the rounds of `callbacks.FederatedRounds`, with the nodes of Flower as clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result, Strategy

from callbacks import FederatedRounds
from leanlight.contracts import ClientUpdate, UserError
from leanlight.experiment import LeanlightCLI, Session
from leanlight.flower.client import REPORTED
from leanlight.flower.member import rounds_of
from lit_modules.federated import FederatedClassifier

_BROKEN = (1, 2)  # codes of an error reply: the ClientApp did not load, or raised; others are of nodes that went away
_POLL = 1.0  # seconds between looks for nodes
_PATIENCE = 60.0  # seconds until a node that does not say its share is asked again


def server_app(make: Callable[[], LeanlightCLI], timeout: float) -> ServerApp:
    """Runs a federation as ``leanlight fit`` does, in a run folder of this process; its clients are nodes of Flower.

    Args:
        make: makes trainer, model and data.
        timeout: seconds to wait for nodes, and for the answers to each message.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        cli = make()
        strategy = FederationStrategy(cli.model, rounds_of(cli), Session(cli).run)
        strategy.start(grid, ArrayRecord(), timeout=timeout)

    return app


class FederationStrategy(Strategy):
    """A strategy of Flower around a selector and a server's step of the suite; a `leanlight.contracts.ClientEngine`.

    The trainer has the loop: a round is an epoch, in which the callback chooses clients and asks this strategy for what
    they do, and the module makes the server's step of it. Hence aggregated weights are the module's, and clients are
    evaluated only where their selector scores them before they train.

    Args:
        module: has the global weights and the server's step.
        rounds: chooses the clients.
        run: trains and tests the module.
    """

    def __init__(self, module: FederatedClassifier, rounds: FederatedRounds, run: Callable[[], None]) -> None:
        self.module, self.rounds, self.run = module, rounds, run
        self.grid: Grid | None = None
        self.nodes: list[int] = []
        self.timeout = 0.0
        self._received: list[tuple[ClientUpdate, float | None]] = []

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 0,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds and the test; return the final weights. Of the others only `grid` and `timeout` count."""
        self.grid, self.timeout = grid, timeout
        self.nodes = find_nodes(grid, timeout)
        self.rounds.engine = self
        self.run()
        return Result(arrays=ArrayRecord(self.module.network.state_dict()))

    def summary(self) -> None:
        """Nothing: the run says what it runs."""

    # ---- what the callback asks ----

    def score(self, round_number: int, clients: Sequence[int]) -> dict[int, float]:
        """Ask clients for their scores before training; see `ClientEngine`, as for the two below."""
        config = ConfigRecord({"round": round_number, "clients": list(clients)})
        messages = self.configure_evaluate(round_number + 1, ArrayRecord(), config, self._grid)
        reports = [reply.content["report"] for reply in self._answers(messages)]
        return {report["client"]: report["score"] for report in reports}

    def train(
        self, round_number: int, joined: Sequence[int], work: Mapping[int, float]
    ) -> list[tuple[ClientUpdate, float | None]]:
        """The first stage: clients train, and send their weights only where they need no score for it."""
        clients = {"clients": list(work), "work": list(work.values()), "joined": list(joined)}
        messages = self.configure_train(
            round_number + 1, ArrayRecord(), ConfigRecord({"round": round_number, **clients}), self._grid
        )
        self.aggregate_train(round_number + 1, self._answers(messages))
        received, self._received = self._received, []
        return sorted(received, key=lambda pair: pair[0].client)

    def fetch(self, round_number: int, chosen: Mapping[int, ClientUpdate]) -> dict[int, ClientUpdate]:
        """The second stage: the chosen send their weights, if they have not yet."""
        complete = {client: update for client, update in chosen.items() if update.state}
        messages = [
            self._message(client, "query.weights", round_number, config=ConfigRecord({"client": client}))
            for client in chosen
            if client not in complete
        ]
        for reply in self._answers(messages):
            client = reply.content["report"]["client"]
            complete[client] = _with_weights(chosen[client], reply)
        return complete

    # ---- what Flower asks of a strategy ----

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each client, with the weights that the module has for it; `arrays` is not used."""
        control = ArrayRecord(self.module.controls.server)
        for client, work, weights in zip(
            config["clients"], config["work"], self._weights(config["clients"]), strict=True
        ):
            own = ConfigRecord({"client": client, "round": config["round"], "joined": config["joined"], "work": work})
            yield self._message(client, "train", server_round, config=own, weights=weights, control=control)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take in what clients report; return no weights, which the module makes, and their scores."""
        for reply in replies:
            report = dict(reply.content["report"])
            update = ClientUpdate(**{name: report[name] for name in REPORTED}, state={})
            update = replace(update, finite=bool(update.finite))
            self._received.append((_with_weights(update, reply), report.get("score")))
        scores = {f"score-{update.client}": score for update, score in self._received if score is not None}
        return None, MetricRecord(scores)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """A message for each client to be scored before it trains."""
        for client, weights in zip(config["clients"], self._weights(config["clients"]), strict=True):
            own = ConfigRecord({"client": client, "round": config["round"]})
            yield self._message(client, "evaluate", server_round, config=own, weights=weights)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing: validation data lie with the server."""
        return None

    # ---- messages ----

    @property
    def _grid(self) -> Grid:
        assert self.grid is not None
        return self.grid

    def _weights(self, clients: Sequence[int]) -> Iterator[ArrayRecord]:
        """Global weights for each client, one record for all that train the same network."""
        records: dict[int, ArrayRecord] = {}
        for client in clients:
            network = self.module.network_of(client)
            if id(network) not in records:
                records[id(network)] = ArrayRecord(network.state_dict())
            yield records[id(network)]

    def _message(self, client: int, kind: str, number: int, **records: Any) -> Message:
        node = self.nodes[client % len(self.nodes)]
        return Message(RecordDict(records), node, kind, group_id=str(number))

    def _answers(self, messages: Iterable[Message]) -> Iterator[Message]:
        yield from _answers(self._grid, messages, self.timeout)


def find_nodes(grid: Grid, timeout: float) -> list[int]:
    """Ids of the nodes by their partition: client c is with node c mod their number.

    Args:
        grid: of the run.
        timeout: seconds to wait until all are there.

    Raises:
        UserError: nodes do not say their partition, or disagree about the number, or too few have come.
    """
    end = time.monotonic() + timeout
    places: dict[int, int] = {}
    parts: set[int] = set()
    while not parts or len(places) < max(parts):
        if time.monotonic() > end:
            raise UserError(f"flower: {len(places)} of {max(parts, default='?')} nodes came within {timeout:g} s")
        new = set(grid.get_node_ids()) - set(places.values())
        if not new:
            time.sleep(_POLL)
            continue
        questions = [Message(RecordDict(), node, "query.clients", group_id="0") for node in sorted(new)]
        for reply in _answers(grid, questions, min(timeout, _PATIENCE)):
            share, node = reply.content["share"], reply.metadata.src_node_id
            if not {"partition-id", "num-partitions"} <= set(share):
                raise UserError(
                    f"flower: node {node} has no partition; start it with "
                    "--node-config 'partition-id=0 num-partitions=2'"
                )
            places[int(share["partition-id"])] = node
            parts.add(int(share["num-partitions"]))
    if len(parts) > 1 or set(places) != set(range(max(parts))):
        raise UserError(
            f"flower: expected nodes with partition-id 0 to {max(parts) - 1} of one num-partitions; got "
            f"{sorted(places)} of {sorted(parts)}"
        )
    return [places[number] for number in range(len(places))]


def _answers(grid: Grid, messages: Iterable[Message], timeout: float) -> Iterator[Message]:
    """Replies in time, in any order; RuntimeError for a client whose code fails, none from a node that is gone."""
    for reply in grid.send_and_receive(list(messages), timeout=timeout):
        if not reply.has_error():
            yield reply
        elif reply.error.code in _BROKEN:
            raise RuntimeError(f"node {reply.metadata.src_node_id}: {reply.error.reason}")


def _with_weights(update: ClientUpdate, reply: Message) -> ClientUpdate:
    if "weights" not in reply.content:
        return update
    state, extras = (reply.content[name].to_torch_state_dict() for name in ("weights", "change"))
    return replace(update, state=dict(state), extras=dict(extras))
