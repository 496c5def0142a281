"""HID's constraint of intents (ICLoss): sessions go to the intent of what comes next, and away from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import UserError
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat
from leanlight.contracts.sessions import SessionBatch
from lit_modules.hid.intents import Intents
from lit_modules.nn.processes import everyone

Form = Literal["paper", "released"]
Constraint = Literal["both", "longtail", "accuracy"]
Against = Literal["intents", "last_items"]

_DEFAULTS = {"paper": (0.5, 1.0, 0.01), "released": (0.14, 0.3, 0.2)}  # sigma, penalty, threshold
_LAST = 3  # clicks whose mean is a session's own intent


@dataclass(frozen=True)
class ICLoss:
    """Settings of the loss. Of a session s with the target's intent c and the noise intents v, over a batch's sessions:

    mean of ``-cos(s, c)/σ + log(1 + λp) + log Σ_v exp(cos(s, v)/σ)``.

    Args:
        form: ``paper`` is Eq. 14: v are the other intents that hold a target of the batch, each once. p is the excess
            of the variance of cos(s, v) over η, brought to [0, 1) by p/(1+p). ``released`` is the authors' code: the
            sessions and the centroids of their intents are anchors alike, each the other's positive; v are all
            anchors of other intents, however often. p is the excess over η of the variance of an anchor's cosines with
            all anchors, once these variances are scaled to [0, 1] over the batch.
        sigma: σ, positive; null: 0.5 (``paper``), 0.14 (``released``). 1 is the ablation without it.
        penalty: λ, at least 0; null: 1, 0.3.
        threshold: η, at least 0; null: 0.01, 0.2.
        positive_in_denominator: add exp(cos(s, c)/σ) to the sum over v, as InfoNCE has it, so that the loss is at
            least 0; false is the formula as printed in the paper.
        detach_intents: no gradient through centroids, so that the loss moves sessions alone.
        constraint: ``both``; ``longtail`` has only the first summand, ``accuracy`` only the others, without the
            positive.
        against: ``intents``, or ``last_items``: a session's own intent is the mean of its last three items, and v are
            those of the other sessions (the ablation without hybrid intents).
        gather: under several processes compare with the sessions and targets of all of them, as one process with the
            whole batch does; their batches must be of one size. Otherwise each process sees its own batch.
    """

    form: Form = "paper"
    sigma: PositiveFloat | None = None
    penalty: NonNegativeFloat | None = None
    threshold: NonNegativeFloat | None = None
    positive_in_denominator: bool = True
    detach_intents: bool = False
    constraint: Constraint = "both"
    against: Against = "intents"
    gather: bool = False

    def __post_init__(self) -> None:
        for name, known in (("form", Form), ("constraint", Constraint), ("against", Against)):
            if getattr(self, name) not in get_args(known):
                choice = ", ".join(get_args(known))
                raise UserError(f"icloss.{name}: expected one of {choice}, got {getattr(self, name)!r}")
        sigma, penalty, threshold = self._numbers()
        if sigma <= 0:
            raise UserError(f"icloss.sigma: expected a positive number, got {sigma}")
        for name, value in (("penalty", penalty), ("threshold", threshold)):
            if value < 0:
                raise UserError(f"icloss.{name}: expected a number of at least 0, got {value}")

    def _numbers(self) -> tuple[float, float, float]:
        given = (self.sigma, self.penalty, self.threshold)
        sigma, penalty, threshold = (
            default if value is None else value for value, default in zip(given, _DEFAULTS[self.form], strict=True)
        )
        return sigma, penalty, threshold

    def __call__(self, session: Tensor, batch: SessionBatch, table: Tensor, intents: Intents | None) -> Tensor:
        """The loss, a number in float32, also under autocast; 0 where the batch has a single intent (``paper``).

        Args:
            session: (N, d) vectors of the sessions.
            batch: their clicks and targets.
            table: (m + 1, d) embeddings of the items.
            intents: which items belong together; not needed against ``last_items``.
        """
        with torch.autocast(session.device.type, enabled=False):
            compared = self._compared(session.float(), batch, table.float(), intents)
            return self._paper(compared) if self.form == "paper" else self._released(compared)

    def _compared(self, session: Tensor, batch: SessionBatch, table: Tensor, intents: Intents | None) -> _Compared:
        if self.against == "last_items":
            own = _mean_of_last(batch, table)
            session, own = (self._everyone(each) for each in (session, own))
            row = torch.arange(len(session), device=session.device)
            return self._ready(session, own, row[:, None], len(row))
        if intents is None:
            raise UserError("intents: expected the items' intents for icloss.against intents, got none")
        session, target = self._everyone(session), self._everyone(batch.target)
        return self._ready(session, intents.centroids(table), intents.ids(target), intents.num_intents)

    def _ready(self, session: Tensor, centroids: Tensor, member: Tensor, count: int) -> _Compared:
        centroids = centroids.detach() if self.detach_intents else centroids
        return _Compared(F.normalize(session, dim=1), F.normalize(centroids, dim=1), member, member < count)

    def _everyone(self, rows: Tensor) -> Tensor:
        """`rows` of all processes where that is asked for."""
        return everyone(rows) if self.gather else rows

    def _paper(self, compared: _Compared) -> Tensor:
        session, centroids, member, real = compared
        sigma, penalty, threshold = self._numbers()
        logits = (session / sigma) @ centroids.T
        target = _one_hot(member, len(centroids))
        noise = target.any(0) & ~target
        positive = (logits * target).sum(1) / target.sum(1).clamp(min=1)
        excess = (sigma**2 * _masked_variance(logits, noise) - threshold).relu()
        factor = torch.log1p(penalty * excess / (1 + excess))
        known = real.any(1)
        return self._total(logits, noise, positive, factor, known, known & noise.any(1))

    def _released(self, compared: _Compared) -> Tensor:
        session, centroids, member, real = compared
        sigma, penalty, threshold = self._numbers()
        own = _mean_centroid(centroids, member, real)
        anchors, known = torch.cat([session, own]), real.any(1)
        # An item may have several intents: sessions are apart when they share none.
        equal = (member[:, None, :, None] == member[None, :, None, :]) & real[:, None, :, None]
        noise = (~equal.flatten(2).any(2) & known & known[:, None]).repeat(2, 2)
        positive = (session * own).sum(1).repeat(2) / sigma
        known = known.repeat(2)
        variance = _variance_of_cosines(anchors, known)
        # A variance of cosines lies in [0, 1]: so filled up, anchors without an intent have neither end.
        least, greatest = variance.masked_fill(~known, 1).amin(), variance.masked_fill(~known, 0).amax()
        excess = ((variance - least) / (greatest - least + 1e-7) - threshold).relu()
        factor = torch.log1p(penalty * excess)
        return self._total((anchors / sigma) @ anchors.T, noise, positive, factor, known, known)

    def _total(
        self, logits: Tensor, noise: Tensor, positive: Tensor, factor: Tensor, known: Tensor, counted: Tensor
    ) -> Tensor:
        """Put the summands together, and take the mean over the rows that have them.

        Args:
            logits: (R, C) cosines over σ.
            noise: (R, C) bool, which of them are of noise.
            positive: (R,) that of the target over σ.
            factor: (R,) log(1 + λp).
            known: (R,) bool, whether the target has an intent at all.
            counted: (R,) bool, which rows count beside the positive.
        """
        if self.constraint == "longtail":
            return _mean_of(-positive, known)
        some = noise.any(1)
        # A row without noise keeps all its logits: minus infinities alone would make its gradient NaN, counted or not.
        total = logits.masked_fill(~noise & some[:, None], -torch.inf).logsumexp(1)
        if self.constraint == "accuracy":
            return _mean_of(factor + total, counted & some)
        if not self.positive_in_denominator:
            return _mean_of(factor - positive + total, counted & some)
        total = torch.where(some, torch.logaddexp(total, positive), positive)
        return _mean_of(factor - positive + total, counted)


class _Compared(NamedTuple):
    """Unit sessions (N, d), unit centroids (n, d), intents of the targets (N, A) and which of these are no filling."""

    session: Tensor
    centroids: Tensor
    member: Tensor
    real: Tensor


def _one_hot(member: Tensor, count: int) -> Tensor:
    """(N, A) positions, filled up with `count` → (N, count) bool."""
    return member.new_zeros(len(member), count + 1, dtype=torch.bool).scatter_(1, member, True)[:, :-1]


def _mean_of(values: Tensor, rows: Tensor) -> Tensor:
    """Mean over some rows; over none it is 0, with a gradient of 0."""
    return torch.where(rows, values, 0).sum() / rows.sum().clamp(min=1)


def _mean_centroid(centroids: Tensor, member: Tensor, real: Tensor) -> Tensor:
    """Direction (N, d) of each session's own intents together."""
    rows = centroids[member.clamp(max=len(centroids) - 1)] * real[..., None]
    return F.normalize(rows.sum(1), dim=1)


def _masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Biased variance along the rows of what is in the mask, 0 where there is nothing."""
    count = mask.sum(1).clamp(min=1)
    mean = (values * mask).sum(1) / count
    return ((values - mean[:, None]) * mask).square().sum(1) / count


def _variance_of_cosines(anchors: Tensor, known: Tensor) -> Tensor:
    """Biased variance (R,) of each unit row's products with all known rows: aᵀ Cov a, without a matrix of R columns."""
    weight = known[:, None] / known.sum().clamp(min=1)
    centred = anchors - (weight * anchors).sum(0)
    return ((anchors @ ((weight * centred).T @ centred)) * anchors).sum(1)


def _mean_of_last(batch: SessionBatch, table: Tensor) -> Tensor:
    """Mean (N, d) of the last three clicks, or of all where there are fewer."""
    place = batch.length[:, None] - 1 - torch.arange(_LAST, device=batch.length.device)
    rows = table[batch.items.gather(1, place.clamp(min=0))] * (place >= 0)[..., None]
    return rows.sum(1) / batch.length.clamp(max=_LAST)[:, None]
