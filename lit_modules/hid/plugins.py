"""Other methods for the long tail that stand beside any backbone: LOAM, TailNet, LAP-SR."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.ranges import NonNegativeFloat, PositiveInt, Seed, UnitInterval
from leanlight.contracts.sessions import Catalogue, SessionBatch, Sessions
from lit_modules.hid.counts import neighbouring_clicks, place_within
from lit_modules.hid.intents import Intents
from lit_modules.hid.scoring import Scoring
from lit_modules.nn.checks import require_positive


class Plugin(nn.Module):
    """What a method may add to a backbone; each hook does nothing by itself."""

    #: Whether `rescore` is part of training, too, or of evaluation alone.
    trains = True
    #: (m + 1,) bool, items of the tail; padding is none.
    tail: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tail", torch.zeros(0, dtype=torch.bool))

    def prepare(self, catalogue: Catalogue, sessions: Sessions) -> None:
        """Count what the method goes by, once, before training."""
        self.tail = ~catalogue.head.to(self.tail.device)
        self.tail[0] = False

    def augment(self, batch: SessionBatch, generator: torch.Generator) -> SessionBatch:
        """A batch of training with cases of the method's own behind it: their `index` is -1.

        Args:
            batch: N cases.
            generator: of the batch's device.
        """
        return batch

    def loss(
        self, session: Tensor, batch: SessionBatch, table: Tensor, scoring: Scoring, intents: Intents | None = None
    ) -> dict[str, Tensor]:
        """Terms by name that are added to the cross entropy.

        Args:
            session: (N, d) vectors of the sessions of `batch`.
            batch: as `augment` made it.
            table: (m + 1, d) vectors of the items.
            scoring: of the backbone.
            intents: which items belong together, if that is known.
        """
        return {}

    def rescore(self, scores: Tensor, session: Tensor, items: Tensor, length: Tensor, table: Tensor) -> Tensor:
        """Scores (N, m) instead of those of the backbone.

        Args:
            scores: (N, m), column j of item j + 1.
            session: (N, d) vectors of the sessions.
            items: (N, L) int64 clicks, 0 behind them.
            length: (N,) int64.
            table: (m + 1, d) vectors of the items.
        """
        return scores


class LOAM(Plugin):
    """LOAM (SIGIR 2023): made-up sessions from walks to rare items, and mixtures of tail sessions.

    Niche walks go against the direction of clicks, among the items of the batch, from some of its targets: to the least
    clicked predecessor, or to any. A walk read backwards is a session, and what it began with is its target. Tail
    mixup: a session with a target in the tail is mixed with the session of the batch whose vector is most similar.

    Args:
        share: of a batch's targets that are starts, and at most as many sessions as the batch has cases that are added.
        walks: from each start.
        steps: of a walk, at most.
        alpha: probability of a step to any predecessor instead of the least clicked one.
        head_edges: transitions that items of the head keep, drawn at random: 11 (Diginetica), 12 (#nowplaying).
        own: weight of the session itself in a mixture.
        seed: of the choice of `head_edges`.
    """

    def __init__(
        self,
        share: UnitInterval = 0.1,
        walks: PositiveInt = 5,
        steps: PositiveInt = 10,
        alpha: UnitInterval = 0.5,
        head_edges: PositiveInt = 11,
        own: UnitInterval = 0.8,
        seed: Seed = 0,
    ) -> None:
        super().__init__()
        for name, value in (("share", share), ("alpha", alpha), ("own", own)):
            if not 0 <= value <= 1:
                raise UserError(f"plugin.{name}: expected a number in [0, 1], got {value}")
        require_positive(**{"plugin.walks": walks, "plugin.steps": steps, "plugin.head_edges": head_edges})
        self.share, self.walks, self.steps, self.alpha = share, walks, steps, alpha
        self.head_edges, self.own, self.seed = head_edges, own, seed
        self._most = 0  # predecessors of an item
        # Needed in training alone, and counted again by `prepare`: (edges,) predecessors by item, the least clicked
        # first, and (m + 2,) where those of each item begin.
        self.register_buffer("predecessor", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("begin", torch.zeros(0, dtype=torch.int64), persistent=False)

    predecessor: Tensor
    begin: Tensor

    def prepare(self, catalogue: Catalogue, sessions: Sessions) -> None:
        super().prepare(catalogue, sessions)
        head, clicks = catalogue.head.cpu().numpy(), catalogue.clicks.cpu().numpy()
        source, target = np.unique(np.stack(neighbouring_clicks(sessions)), axis=1)
        # An edge of an item of the head is one that leaves it; of these a sample stays.
        rng = np.random.default_rng(self.seed)
        kept = ~head[source] | (place_within(source, rng.random(len(source))) < self.head_edges)
        source, target = source[kept], target[kept]
        order = np.lexsort((source, clicks[source], target))
        count = np.bincount(target, minlength=len(head))
        device = self.begin.device
        self.predecessor = torch.from_numpy(source[order]).to(device)
        self.begin = torch.from_numpy(np.concatenate([[0], count.cumsum()])).to(device)
        self._most = int(count.max())

    def augment(self, batch: SessionBatch, generator: torch.Generator) -> SessionBatch:
        limit = int(len(batch) * self.share)
        if limit == 0 or self._most == 0:
            return batch
        path, steps = self.walk(batch, limit, generator)
        # As many sessions as walks are long enough: the one place where the host waits for the device.
        long_enough = (steps >= 2).nonzero()[:, 0]
        chosen = torch.randperm(len(long_enough), generator=generator, device=path.device)[:limit]
        path, steps = path[long_enough[chosen]], steps[long_enough[chosen]]
        return _joined(batch, *_backwards(path, steps))

    def walk(self, batch: SessionBatch, starts: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Walks of a batch.

        Args:
            batch: whose items alone are gone to.
            starts: targets that are drawn, with replacement.
            generator: of the batch's device.

        Returns:
            (W, steps + 1) items from the start on, 0 behind the end, and (W,) steps that were made.
        """
        device = batch.items.device
        inside = torch.zeros(len(self.tail), dtype=torch.bool, device=device)
        inside[batch.items.flatten()] = True
        inside[batch.target] = True
        inside[0] = False
        start = batch.target[torch.randint(len(batch), (starts,), generator=generator, device=device)]
        path = [start.repeat_interleave(self.walks)]
        coin, pick = torch.rand(2, self.steps, len(path[0]), generator=generator, device=device)
        for step in range(self.steps):
            path.append(self._step(path[-1], inside, coin[step] < self.alpha, pick[step]))
        walked = torch.stack(path, 1)
        return walked, (walked[:, 1:] > 0).sum(1)

    def _step(self, now: Tensor, inside: Tensor, anywhere: Tensor, pick: Tensor) -> Tensor:
        """A predecessor (W,) of each item, 0 where there is none; an item 0 has none.

        Args:
            now: (W,) items.
            inside: (m + 1,) bool, items that may be gone to.
            anywhere: (W,) bool, take any instead of the least clicked one.
            pick: (W,) uniform in [0, 1), which one.
        """
        place = self.begin[now][:, None] + torch.arange(self._most, device=now.device)
        there = place < self.begin[now + 1][:, None]
        found = self.predecessor[place.clamp(max=len(self.predecessor) - 1)]
        number = (there & inside[found]).cumsum(1)  # the how manyth of those that may be gone to
        count = number[:, -1]
        wanted = torch.where(anywhere, (pick * count).long().clamp(max=count - 1) + 1, 1)
        at = (number < wanted[:, None]).sum(1).clamp(max=self._most - 1)
        return found.gather(1, at[:, None])[:, 0] * (count > 0)

    def loss(
        self, session: Tensor, batch: SessionBatch, table: Tensor, scoring: Scoring, intents: Intents | None = None
    ) -> dict[str, Tensor]:
        """``mixup``: cross entropy of the mixtures with the session's own target; 0 without a target in the tail."""
        given = batch.index >= 0
        rows = (given & self.tail[batch.target]).nonzero()[:, 0]
        if len(rows) == 0 or len(batch) < 2:
            return {"mixup": 0.0 * session.sum()}
        similar = session[rows].detach() @ session.detach().T
        others = given & (rows[:, None] != torch.arange(len(batch), device=rows.device))
        partner = similar.masked_fill(~others, -torch.inf).argmax(1)
        mixed = self.own * session[rows] + (1 - self.own) * session[partner]
        return {"mixup": scoring.loss(mixed, table, batch.target[rows])}


Multiply = Literal["probabilities", "scores"]


class TailNet(Plugin):
    """TailNet's preference mechanism (RecSys 2020, arXiv:2007.12329): how much a session asks for the head or the tail.

    Types of the clicked items (1 head, 0 tail) are added to their vectors; attention against the session's vector sums
    them up, and a sigmoid of both is R_head, of which R_tail is the rest. The backbone keeps its own session vector.

    Args:
        dim: d, length of the backbone's vectors.
        multiply: R with ``probabilities`` of head and tail items, which adds log R to scores before the softmax; or
            with ``scores``, as published, where a factor below 1 raises a negative score.
    """

    def __init__(self, dim: PositiveInt = 100, multiply: Multiply = "probabilities") -> None:
        super().__init__()
        require_positive(**{"plugin.dim": dim})
        if multiply not in get_args(Multiply):
            raise UserError(f"plugin.multiply: expected one of {', '.join(get_args(Multiply))}, got {multiply!r}")
        self.multiply = multiply
        self.key, self.query = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.weight = nn.Linear(dim, 1, bias=False)
        self.preference = nn.Linear(2 * dim, 1)

    def rescore(self, scores: Tensor, session: Tensor, items: Tensor, length: Tensor, table: Tensor) -> Tensor:
        asks = self.asks_for_head(session, items, table)
        tail = self.tail[1:]
        if self.multiply == "scores":
            return scores * torch.where(tail, torch.sigmoid(-asks), torch.sigmoid(asks))
        return scores + torch.where(tail, F.logsigmoid(-asks), F.logsigmoid(asks))

    def asks_for_head(self, session: Tensor, items: Tensor, table: Tensor) -> Tensor:
        """Logit (N, 1) of R_head; arguments as of `rescore`."""
        states = table[items] + (~self.tail[items])[..., None]
        attention = self.weight(torch.tanh(self.key(states) + self.query(session)[:, None])) * (items > 0)[..., None]
        return self.preference(torch.cat([(attention * states).sum(1), session], 1))


class LAPSR(Plugin):
    """LAP-SR (Expert Systems with Applications 249, 2024): a trained backbone's lists, ranked anew; nothing trains.

    The best candidates get the score ``z + w g [in the tail] + u (mean cosine with the session's items)``, where z is
    the score less its mean over the catalogue and divided by its standard deviation, and g, 1 less the mean cosine
    between the session's items, says how diverse the session is. Built from the abstract; the weights are ours.

    Args:
        tail_weight: w, at least 0.
        similarity_weight: u, at least 0.
        candidates: best items of the backbone that are ranked anew; five times the longest list.
    """

    trains = False

    def __init__(
        self,
        tail_weight: NonNegativeFloat = 0.3,
        similarity_weight: NonNegativeFloat = 0.3,
        candidates: PositiveInt = 100,
    ) -> None:
        super().__init__()
        for name, value in (("tail_weight", tail_weight), ("similarity_weight", similarity_weight)):
            if value < 0:
                raise UserError(f"plugin.{name}: expected a number of at least 0, got {value}")
        require_positive(**{"plugin.candidates": candidates})
        self.tail_weight, self.similarity_weight, self.candidates = tail_weight, similarity_weight, candidates

    def rescore(self, scores: Tensor, session: Tensor, items: Tensor, length: Tensor, table: Tensor) -> Tensor:
        z = (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True).clamp(min=1e-12)
        best, column = z.topk(min(self.candidates, z.shape[1]), 1)
        clicked = F.normalize(table[items], dim=2) * (items > 0)[..., None]
        total = clicked.sum(1)
        pairs = length * (length - 1)
        # |Σ x|² of unit vectors counts each pair twice and each vector once; one click shows no diversity.
        diversity = torch.where(pairs > 0, 1 - (total.square().sum(1) - length) / pairs.clamp(min=1), 0)
        near = torch.einsum("nd,ncd->nc", total / length[:, None], F.normalize(table[column + 1], dim=2))
        lift = self.tail_weight * diversity[:, None] * self.tail[column + 1]
        # All others stay behind: a candidate loses at most u, and diversity is never negative.
        behind = z - self.similarity_weight - 1
        return behind.scatter(1, column, best + lift + self.similarity_weight * near)


def _backwards(path: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Walks (W, S + 1) of so many steps (W,) as sessions (W, S), their lengths and their targets."""
    place = steps[:, None] - torch.arange(path.shape[1] - 1, device=path.device)
    return path.gather(1, place.clamp(min=0)) * (place > 0), steps, path[:, 0]


def _joined(batch: SessionBatch, items: Tensor, length: Tensor, target: Tensor) -> SessionBatch:
    width = max(batch.items.shape[1], items.shape[1])
    both = [F.pad(each, (0, width - each.shape[1])) for each in (batch.items, items)]
    return replace(
        batch,
        items=torch.cat(both),
        length=torch.cat([batch.length, length]),
        target=torch.cat([batch.target, target]),
        index=torch.cat([batch.index, torch.full_like(target, -1)]),
    )
