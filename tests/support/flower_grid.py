"""A grid of Flower whose nodes are asked by a function call: no process, no socket."""

import itertools
from typing import Any, NamedTuple

from flwr.app import Context, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class Call(NamedTuple):
    """A message that a node answered: its type and config, the node's partition, and what the answer held."""

    kind: str
    config: dict[str, Any]
    part: int
    reply: RecordDict


class CallGrid(Grid):
    """Each node has a context of its own, as in Flower.

    Args:
        app: the ClientApp of all nodes.
        nodes: how many there are.
        lose: of (message type, config) → whether the answer gets lost.
    """

    def __init__(self, app, nodes, lose=lambda kind, config: False):
        self.app, self.lose = app, lose
        self.contexts = {
            1000 + part: Context(1, 1000 + part, {"partition-id": part, "num-partitions": nodes}, RecordDict(), {})
            for part in reversed(range(nodes))
        }
        self.seen = []
        # Who sends messages; `flwr.simulation` says it so, too.
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1
        self._numbers = itertools.count()

    def calls(self, kind):
        return [call for call in self.seen if call.kind == kind]

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self._numbers))
            kind, config = message.metadata.message_type, dict(message.content.get("config", {}))
            context = self.contexts[message.metadata.dst_node_id]
            reply = self.app(message, context)
            self.seen.append(Call(kind, config, context.node_config.get("partition-id", -1), reply.content))
            if not self.lose(kind, config):
                replies.append(reply)
        return replies[::-1]  # nobody promises an order
