"""From the clicks of a session to a score of every item: what trains, what is measured, what is exported."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lit_modules.hid.plugins import Plugin
from lit_modules.hid.scoring import Scoring


class SessionNetwork(nn.Module):
    """A backbone with its scoring, and what a plug-in makes of the scores; or a rule without parameters.

    Args:
        backbone: a `Backbone`, or a floor: a module that has ``scores(items, length)`` and ``trains = False``.
        scoring: of a backbone.
        plugin: what stands beside the backbone, or nothing.
    """

    def __init__(self, backbone: nn.Module, scoring: Scoring, plugin: Plugin | None = None) -> None:
        super().__init__()
        self.backbone: Any = backbone
        self.scoring, self.plugin = scoring, plugin
        #: Whether there is anything to train.
        self.trains: bool = getattr(backbone, "trains", True)

    def encode(self, items: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Sessions (N, d) and the table of items (m + 1, d)."""
        return self.backbone(items, length), self.backbone.item_embedding()

    def score(self, session: Tensor, table: Tensor, items: Tensor, length: Tensor) -> Tensor:
        """(N, m) of encoded sessions; in training a plug-in that waits for evaluation leaves them alone."""
        scores = self.scoring(session, table)
        if self.plugin is None or (self.training and not self.plugin.trains):
            return scores
        return self.plugin.rescore(scores, session, items, length, table)

    @property
    def rescores(self) -> bool:
        """Whether scores in training are not those of the scoring alone."""
        return self.plugin is not None and self.plugin.trains and type(self.plugin).rescore is not Plugin.rescore

    def forward(self, items: Tensor) -> Tensor:
        """Scores (N, m), column j of item j + 1.

        Args:
            items: (N, L) int64, the clicks in their order, from the left; 0 behind them. A session has one at least.
        """
        length = (items > 0).sum(1)
        if not self.trains:
            return self.backbone.scores(items, length)
        session, table = self.encode(items, length)
        return self.score(session, table, items, length)
