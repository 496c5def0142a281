"""Scores of all items of a catalogue for the vectors of sessions, their softmax loss, and the best of them.

Items are numbered from 1, and row i of a table is that of item i; row 0 is padding. Column j of scores is item j + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import UserError
from leanlight.contracts.ranges import PositiveFloat, PositiveInt
from lit_modules.nn.checks import require_positive

Kind = Literal["dot", "cosine"]


@dataclass(frozen=True)
class Scoring:
    """How a session is compared with items.

    Args:
        kind: ``dot`` product, or ``cosine`` times `scale`.
        scale: factor of cosines, positive.
        chunk: items of a piece of the softmax in training: scores of all sessions and items are never held at once,
            and are computed a second time for gradients. None: all at once.
    """

    kind: Kind = "dot"
    scale: PositiveFloat = 13.0
    chunk: PositiveInt | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"scoring.kind: expected one of {', '.join(get_args(Kind))}, got {self.kind}")
        if self.scale <= 0:
            raise UserError(f"scoring.scale: expected a positive number, got {self.scale}")
        if self.chunk is not None:
            require_positive(**{"scoring.chunk": self.chunk})

    def __call__(self, session: Tensor, table: Tensor) -> Tensor:
        """Scores (N, m).

        Args:
            session: (N, d) vectors of sessions.
            table: (m + 1, d) vectors of items.
        """
        session, table = self._sides(session, table)
        return session @ table[1:].T

    def loss(self, session: Tensor, table: Tensor, target: Tensor) -> Tensor:
        """Mean cross entropy of the softmax over all items.

        Args:
            session: (N, d) vectors of sessions.
            table: (m + 1, d) vectors of items.
            target: (N,) int64 items that came next, from 1.
        """
        if self.chunk is None:
            return F.cross_entropy(self(session, table), target - 1)
        session, table = self._sides(session, table)
        if torch.is_autocast_enabled(session.device.type):
            dtype = torch.get_autocast_dtype(session.device.type)
            session, table = session.to(dtype), table.to(dtype)
        return _ChunkedCrossEntropy.apply(session, table, target, self.chunk).mean()

    def _sides(self, session: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "dot":
            return session, table
        return self.scale * F.normalize(session, dim=1), F.normalize(table, dim=1)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Cross entropy (N,) over the rows 1 to m of a table, piece by piece."""

    @staticmethod
    def forward(ctx: Any, session: Tensor, table: Tensor, target: Tensor, chunk: int) -> Tensor:
        dtype = torch.promote_types(session.dtype, torch.float32)  # sums of half-precision scores are taken in float32
        total = session.new_full((len(session),), -torch.inf, dtype=dtype)
        for begin, end in _pieces(len(table), chunk):
            total = torch.logaddexp(total, (session @ table[begin:end].T).to(dtype).logsumexp(1))
        ctx.save_for_backward(session, table, target, total)
        ctx.chunk = chunk
        return total - (session.to(dtype) * table[target].to(dtype)).sum(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        session, table, target, total = ctx.saved_tensors
        of_session, of_table = torch.zeros_like(session), torch.zeros_like(table)
        for begin, end in _pieces(len(table), ctx.chunk):
            piece = table[begin:end]
            share = (session @ piece.T).to(total.dtype).sub_(total[:, None]).exp_()
            inside = ((target >= begin) & (target < end)).to(share.dtype)
            share.scatter_add_(1, (target - begin).clamp(0, end - begin - 1)[:, None], -inside[:, None])
            share = share.mul_(gradients[0][:, None]).to(session.dtype)
            of_session.addmm_(share, piece)
            torch.mm(share.T, session, out=of_table[begin:end])
        return of_session, of_table, None, None


def _pieces(rows: int, chunk: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + chunk, rows)) for begin in range(1, rows, chunk))


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best items, best first; of equal ones that of the smaller number comes first.

    Args:
        scores: (N, m), without NaN.
        k: how many, from 1 to m.

    Returns:
        items (N, k) int64 from 1, and their scores (N, k).

    Raises:
        UserError: the catalogue has fewer than k items.
    """
    items = scores.shape[1]
    if not 1 <= k <= items:
        raise UserError(f"k: expected from 1 to {items}, the items of the catalogue, got {k}")
    # Which of several equal scores `topk` takes is not said: those of the last place are found by counting them.
    found, column = scores.topk(k, 1)
    least = found[:, -1:]
    counted = (scores == least).cumsum(1, dtype=torch.int32)
    place = torch.arange(k, device=scores.device, dtype=torch.int32)
    tied = torch.searchsorted(counted, (place + 1).repeat(len(scores), 1))
    above = (found > least).sum(1, keepdim=True)
    column = torch.where(place < above, column, tied.gather(1, (place - above).clamp(min=0)))
    column = column.sort(1).values
    found, order = scores.gather(1, column).sort(dim=1, descending=True, stable=True)
    return column.gather(1, order) + 1, found
