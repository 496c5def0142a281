"""The ClientApp: a node of Flower answers for its clients.

The messages of a round, all about one client each; `config` has ``client``, ``round``, ``joined`` and ``work``:

- ``query.clients``: which share of the clients this node has.
- ``evaluate``: a score of the global weights (selectors that score before training).
- ``train``: train, and report figures and score. Without a score after training the weights come along; with one they
  wait in the context of the node.
- ``query.weights``: the weights of a client that was chosen.

SCAFFOLD's control variate of a client lies in the context of its node, and moves when its weights are sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

if TYPE_CHECKING:
    from leanlight.contracts import ClientUpdate
    from leanlight.contracts.federated import State
    from leanlight.flower.member import Member

#: What a client reports of itself: fields of ClientUpdate.
REPORTED = ("client", "items", "steps", "loss", "passes", "distance", "received_bytes", "sent_bytes", "finite")


def client_app(config: str) -> ClientApp:
    """Trains the clients of a federation, with the module of its config.

    Nodes may start a process for each message, so what is heavy is imported where it is needed.

    Args:
        config: the complete configuration, as YAML.
    """
    app = ClientApp()

    @app.query("clients")
    def clients(message: Message, context: Context) -> Message:
        names = {"partition-id", "num-partitions"} & set(context.node_config)
        return _reply(message, share=ConfigRecord({name: int(context.node_config[name]) for name in names}))

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        here, config_ = _member(config), message.content["config"]
        batch = here.batch(config_["client"], config_["round"])
        score = here.score(batch, message.content["weights"].to_torch_state_dict())
        return _reply(message, report=MetricRecord({"client": batch.client, "score": score}))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        here = _member(config)
        update, score = _train(here, message, context.state)
        metrics = {name: getattr(update, name) for name in REPORTED} | {"finite": int(update.finite)}
        report = MetricRecord(metrics if score is None else {**metrics, "score": score})
        if not update.finite:
            return _reply(message, report=report)
        records = {"weights": ArrayRecord(update.state), "change": ArrayRecord(update.extras)}
        if here.selector.scored == "after":  # the second stage asks for them
            context.state.update({_key(name, update.client): record for name, record in records.items()})
            return _reply(message, report=report)
        _commit(update.client, records["change"], context.state)
        return _reply(message, report=report, **records)

    @app.query("weights")
    def weights(message: Message, context: Context) -> Message:
        client = int(message.content["config"]["client"])
        records = {name: context.state.pop(_key(name, client)) for name in ("weights", "change")}
        _commit(client, records["change"], context.state)
        return _reply(message, report=MetricRecord({"client": client}), **records)

    return app


def _member(config: str) -> Member:
    from leanlight.flower.member import member  # loads torch and lightning

    return member(config)


def _train(here: Member, message: Message, state: RecordDict) -> tuple[ClientUpdate, float | None]:
    config, weights = message.content["config"], message.content["weights"].to_torch_state_dict()
    batch = here.batch(config["client"], config["round"], config["work"])
    controls = {
        "server": message.content["control"].to_torch_state_dict(),
        "own": _control(batch.client, state),
    }
    return here.train(batch, config["joined"], weights, controls)


def _key(name: str, client: int) -> str:
    return f"{name}-{client}"


def _control(client: int, state: RecordDict) -> State:
    return dict(state.get(_key("control", client), ArrayRecord()).to_torch_state_dict())


def _commit(client: int, change: ArrayRecord, state: RecordDict) -> None:
    """Move a client's control variate by the change that the server gets, where there is one."""
    if change:
        import torch  # noqa: F401  # records ask whether it is loaded

        from lit_modules.federated.controls import ControlVariates

        controls = ControlVariates()
        if known := _control(client, state):
            controls.clients[client] = known
        controls.commit(client, change.to_torch_state_dict())
        state[_key("control", client)] = ArrayRecord(controls.clients[client])


def _reply(message: Message, **records: ArrayRecord | ConfigRecord | MetricRecord) -> Message:
    return Message(RecordDict(records), reply_to=message)
