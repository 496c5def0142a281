"""How good recommendations are, and what a picture of them needs; without Lightning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from leanlight.contracts import Catalogue, MediaItem, Split
from lit_modules.hid import pictures
from lit_modules.hid.metrics import ranking_metrics

SHOWN_K = 20  # length of the lists whose pictures are drawn


class SessionEvaluation(nn.Module):
    """Metrics and pictures of recommended lists, by split (``val``, ``test``).

    A LightningModule keeps one as a submodule, so that it moves to the module's device: `prepare` in ``setup``, then in
    every epoch `start`, `update` a batch, `finish`. It has no parameters and leaves nothing in a state dict.

    Args:
        topk: lengths K of the lists that are measured.
    """

    def __init__(self, topk: Sequence[int]) -> None:
        super().__init__()
        self.topk = tuple(topk)
        self.metrics, self.statistics = nn.ModuleDict(), nn.ModuleDict()
        self._shown: dict[str, dict[str, Tensor]] = {}
        self._clicks = torch.zeros(0)

    def prepare(self, catalogue: Catalogue) -> None:
        """Make the metrics for the items of a catalogue."""
        self._clicks = catalogue.clicks
        for split in ("val", "test"):
            if split not in self.metrics:
                self.metrics[split] = ranking_metrics(catalogue, self.topk)
                self.statistics[split] = ListStatistics(catalogue.clicks, min(SHOWN_K, max(self.topk)))

    def start(self, split: Split) -> None:
        """Forget the split's last epoch."""
        for metric in self._of(split):
            metric.reset()

    def update(self, split: Split, recommended: Tensor, length: Tensor, target: Tensor) -> None:
        """Take in a batch.

        Args:
            split: ``val`` or ``test``.
            recommended: (N, K) items from 1, best first, K the longest of `topk`.
            length: (N,) clicks of each session.
            target: (N,) items that were clicked next.
        """
        metrics, statistics = self._of(split)
        metrics.update(recommended, target)
        statistics.update(recommended, length, target)

    def finish(self, split: Split) -> dict[str, Tensor]:
        """End the split's epoch; its metrics by name. Every process must call it, since it gathers."""
        metrics, statistics = self._of(split)
        self._shown[split] = {name: value.cpu() for name, value in statistics.compute().items()}
        return {f"{split}/{name}": value.float() for name, value in metrics.compute().items()}

    def media(self, split: Split) -> dict[str, MediaItem]:
        """Rank and frequency of clicks and recommendations; hit rate by popularity and by length."""
        return pictures.of_lists(self._clicks, self._shown[split]) if split in self._shown else {}

    def _of(self, split: Split) -> tuple[Metric, Metric]:
        return cast(Metric, self.metrics[split]), cast(Metric, self.statistics[split])


class ListStatistics(Metric):
    """Sums behind the pictures: how often each item is recommended; cases and hits by popularity and by length.

    Args:
        clicks: (m + 1,) of the items in training.
        k: length of the lists that count.
    """

    full_state_update = False
    #: (m + 1,) lists that each item is in.
    recommended: Tensor
    tenth: Tensor
    edges: Tensor

    def __init__(self, clicks: Tensor, k: int) -> None:
        super().__init__()
        self.k = k
        self.register_buffer("tenth", pictures.tenths(clicks), persistent=False)
        self.register_buffer("edges", torch.tensor(pictures.LENGTHS), persistent=False)
        sizes = {"recommended": len(clicks)}
        sizes |= {f"tenth_{what}": 10 for what in ("cases", "hits")}
        sizes |= {f"length_{what}": len(pictures.LENGTHS) for what in ("cases", "hits")}
        for name, size in sizes.items():
            self.add_state(name, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, recommended: Tensor, length: Tensor, target: Tensor) -> None:
        """Arguments as of `SessionEvaluation.update`."""
        top = recommended[:, : self.k]
        hit = (top == target[:, None]).any(1).long()
        one = torch.ones_like(hit)
        self.recommended.index_add_(0, top.flatten(), torch.ones_like(top).flatten())
        tenth = self.tenth[target]
        bucket = torch.bucketize(length, self.edges, right=True) - 1
        for name, where in (("tenth", tenth), ("length", bucket)):
            getattr(self, f"{name}_cases").index_add_(0, where, one)
            getattr(self, f"{name}_hits").index_add_(0, where, hit)

    def compute(self) -> Mapping[str, Tensor]:
        """The sums by name."""
        return {name: getattr(self, name) for name in self._defaults}
