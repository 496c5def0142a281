"""Where a round of a federation stands, and how it goes into a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from leanlight.contracts import ClientUpdate


@dataclasses.dataclass
class Round:
    """One communication round, from its candidates to its chosen clients.

    Args:
        number: from 0; -1 before the first.
        candidates: clients that were drawn.
        work: clients to train, each with the share of its local steps that it manages.
        dropped: clients that do not come back.
        failed: clients whose training diverged.
        scores: of the clients that were scored.
        reports: what clients sent, without weights.
        updates: what clients sent, as long as they may still be chosen.
        chosen: clients whose weights count.
    """

    number: int = -1
    candidates: list[int] = dataclasses.field(default_factory=list)
    work: dict[int, float] = dataclasses.field(default_factory=dict)
    dropped: list[int] = dataclasses.field(default_factory=list)
    failed: list[int] = dataclasses.field(default_factory=list)
    scores: dict[int, float] = dataclasses.field(default_factory=dict)
    reports: dict[int, ClientUpdate] = dataclasses.field(default_factory=dict)
    updates: dict[int, ClientUpdate] = dataclasses.field(default_factory=dict)
    chosen: list[int] = dataclasses.field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint that loads with ``weights_only=True``."""
        state = dict(vars(self))
        for name in ("reports", "updates"):
            # Without the measurements, which are spent once there is a score.
            plain = {client: {**vars(update), "before": None, "after": None} for client, update in state[name].items()}
            state[name] = plain
        return state

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """What `state_dict` gave, as a round again."""
        fields = dict(state)
        for name in ("reports", "updates"):
            fields[name] = {client: ClientUpdate(**update) for client, update in fields[name].items()}
        return cls(**fields)
