"""Fusion in three stages: early perception, correlation integration, advanced cognition (docs/methods/tical.md).

`ThreeStages` follows what is published of TiCAL, `SoftStages` is a design of this suite with gates. What the stages are
made of is ours in both: heads on vectors side by side, attention whose queries are modalities, a branch a modality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.emotion import Modality
from leanlight.contracts.ranges import PositiveInt
from lit_modules.nn.checks import require_positive
from lit_modules.tical.assessment import Assessment
from lit_modules.tical.encoders import Answer, Attention, Encoded, Encoders, Encoding, Head, presence


@dataclass(frozen=True, kw_only=True)
class StagedAnswer(Answer):
    """An answer of several stages. `output` mixes them as if κ were ½, which says nothing; `mix` does so with κ.

    Args:
        early: (N, C) of early perception, ŷ_EP.
        middle: (N, C) of correlation integration, ŷ_CI; None where the network ends before it.
        late: (N, C) of advanced cognition, ŷ_AC: the mean of its branches for modalities that are there; None likewise.
        advanced: by modality, (N, C) of its branch; empty likewise.
    """

    early: Tensor
    middle: Tensor | None = None
    late: Tensor | None = None
    advanced: Mapping[str, Tensor] = field(default_factory=dict)


def mix(answer: StagedAnswer, consistency: Tensor) -> Tensor:
    """(N, C): κ ŷ_EP + ŷ_CI + (1 − κ) ŷ_AC, by the sum of the weights: a score stays a score, a logit a logit.

    Args:
        answer: of N clips; stages that it lacks have no weight.
        consistency: κ (N,), in [0, 1].
    """
    return _mixed(answer.early, answer.middle, answer.late, consistency[:, None])


def _mixed(early: Tensor, middle: Tensor | None, late: Tensor | None, kappa: Tensor | float) -> Tensor:
    if middle is None:
        return early
    if late is None:
        return (kappa * early + middle) / (kappa + 1)
    return (kappa * early + middle + (1 - kappa) * late) / 2


def _check_stages(stages: int) -> None:
    if stages not in (1, 2, 3):
        raise UserError(f"stages: expected 1, 2 or 3, got {stages}")


class Branches(nn.Module):
    """A linear layer for each of several branches, computed at once.

    Args:
        branches: M.
        width: numbers of an input.
        num_outputs: of an output.
    """

    def __init__(self, branches: int, width: int, num_outputs: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)  # as `nn.Linear` begins
        self.weight = nn.Parameter(torch.empty(branches, width, num_outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(branches, 1, num_outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """(M, N, outputs) of (M, N, width)."""
        return torch.baddbmm(self.bias, x, self.weight)


class Integration(nn.Module):
    """Cross-attention: each modality, as one token, looks at the steps of the others, and what it sees is added.

    No hidden layer follows: the heads behind it have theirs, and it would cost as much as all the attention.

    Args:
        modalities: M.
        encoding: d, heads and dropout.
        layers: of attention, one after another.
    """

    def __init__(self, modalities: int, encoding: Encoding, layers: int) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.empty(modalities, encoding.dim).normal_(std=0.02))
        dim, heads, dropout = encoding.dim, encoding.heads, encoding.dropout
        self.attention = nn.ModuleList(Attention(dim, heads, dropout) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(layers))
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(dim)
        self.register_buffer("others", ~torch.eye(modalities, dtype=torch.bool), persistent=False)

    def forward(self, encoded: Encoded) -> Tensor:
        """(N, M, d) the modalities, each with what it found in the others."""
        others: Tensor = self.others  # type: ignore[assignment]
        source = torch.cat([steps + place for steps, place in zip(encoded.steps.values(), self.place, strict=True)], 1)
        mask = torch.cat([m[:, None] & o[:, None] for m, o in zip(encoded.mask.values(), others, strict=True)], 2)
        # Where no other is there, the vectors that stand for them are looked at, each once however long the padding.
        stand = torch.cat([_first(m) & o[:, None] for m, o in zip(encoded.mask.values(), others, strict=True)], 1)
        mask = mask | (~mask.any(2, keepdim=True) & stand)
        x = encoded.stacked() + self.place
        for attention, norm in zip(self.attention, self.norms, strict=True):
            x = x + self.dropout(attention(norm(x), norm(source), mask))
        return self.norm(x)


def _first(mask: Tensor) -> Tensor:
    """(L,) bool, the first of the steps of (N, L)."""
    return torch.arange(mask.shape[1], device=mask.device) == 0


class ThreeStages(nn.Module):
    """TiCAL's fusion: an answer before modalities have met, one once they have, and one of a branch a modality.

    Args:
        modalities: by name.
        num_outputs: C, classes; 1 for scores.
        encoding: of the modalities, also d, heads and dropout behind them.
        stages: 1 early perception alone, 2 with correlation integration, 3 with advanced cognition.
        layers: of the cross-attention.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        num_outputs: int,
        encoding: Encoding | None = None,
        stages: PositiveInt = 3,
        layers: PositiveInt = 1,
    ) -> None:
        super().__init__()
        _check_stages(stages)
        require_positive(num_outputs=num_outputs, layers=layers)
        encoding = encoding or Encoding()
        count, dim, dropout = len(modalities), encoding.dim, encoding.dropout
        self.stages = stages
        self.encoders = Encoders(modalities, encoding)
        self.early = Head(count * dim, dim, num_outputs, dropout)
        if stages > 1:
            self.integration = Integration(count, encoding, layers)
            self.middle = Head(count * dim, dim, num_outputs, dropout)
        if stages > 2:
            self.deepen, self.context = Branches(count, dim, dim), nn.Linear(dim, dim, bias=False)
            self.late = Branches(count, dim, num_outputs)

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> StagedAnswer:
        """Answer a batch; arguments as in `MultimodalBatch`."""
        encoded = self.encoders(features, length, present)
        early, fused = self.early(encoded.joined())
        middle = late = None
        advanced: dict[str, Tensor] = {}
        if self.stages > 1:
            together = self.integration(encoded)
            middle, fused = self.middle(together.flatten(1))
        if self.stages > 2:
            branches = self._branches(fused, together)
            advanced = dict(zip(self.encoders.modalities, branches.unbind(), strict=True))
            late = _mean_of_present(branches.transpose(0, 1), presence(present, self.encoders.modalities))
        return StagedAnswer(
            output=_mixed(early, middle, late, 0.5),
            hidden=encoded.hidden,
            fused=fused,
            early=early,
            middle=middle,
            late=late,
            advanced=advanced,
        )

    def _branches(self, fused: Tensor, together: Tensor) -> Tensor:
        """(M, N, C): a hidden layer of each modality (N, M, d) and of what was fused (N, d), and an output."""
        return self.late((self.deepen(together.transpose(0, 1)) + self.context(fused)).relu())


def _mean_of_present(values: Tensor, there: Tensor) -> Tensor:
    """(N, C) of values (N, M, C), the mean over those that are there, (N, M) bool; over all where none is."""
    weight = (there | ~there.any(1, keepdim=True)).to(values.dtype)[..., None]
    return (values * weight).sum(1) / weight.sum(1)


class SoftStages(nn.Module):
    """Fusion with two gates: modalities weigh as much as they are reliable, and conflicts are judged apart.

    Reliable is a modality that is typical and agrees with the others: its weight is
    softmax_m(φ([h_1 … h_M])_m + log(τ_m r_m + 0.001)), r_m the mean over the others of Σ_k q_mk q_nk. With consistency
    κ the output is read from κ f + (1 − κ) f_c, f the weighted sum and f_c a hidden layer that sees everything, κ too.

    Args:
        modalities: by name.
        num_outputs: C, classes; 1 for scores.
        encoding: of the modalities, also d, heads and dropout behind them.
        stages: 1 a weighted sum of the encoders' vectors, 2 after cross-attention, 3 with conflicts judged apart.
        layers: of the cross-attention.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        num_outputs: int,
        encoding: Encoding | None = None,
        stages: PositiveInt = 3,
        layers: PositiveInt = 1,
    ) -> None:
        super().__init__()
        _check_stages(stages)
        require_positive(num_outputs=num_outputs, layers=layers)
        encoding = encoding or Encoding()
        count, dim = len(modalities), encoding.dim
        self.stages = stages
        self.encoders = Encoders(modalities, encoding)
        self.unimodal = Branches(count, dim, num_outputs)
        self.weigh = nn.Linear(count * dim, count)
        if stages > 1:
            self.integration = Integration(count, encoding, layers)
        if stages > 2:
            self.judge = Head((count + 1) * dim + 1, dim, dim, encoding.dropout)
        self.output = nn.Linear(dim, num_outputs)

    def forward(
        self,
        features: Mapping[str, Tensor],
        length: Mapping[str, Tensor],
        present: Mapping[str, Tensor],
        assessment: Assessment | None = None,
    ) -> Answer:
        """Answer a batch; arguments as in `MultimodalBatch`. Without assessment all is typical and agrees."""
        return self.conclude(self.encoders(features, length, present), present, assessment)

    def conclude(self, encoded: Encoded, present: Mapping[str, Tensor], assessment: Assessment | None) -> Answer:
        """Answer clips whose encoded vectors, ``encoders(...).hidden``, have been assessed.

        Args:
            encoded: of N clips.
            present: by modality, (N,) bool.
            assessment: of them; None: all is typical and agrees.
        """
        tokens = encoded.stacked()
        unimodal = self.unimodal(tokens.transpose(0, 1))
        there = presence(present, self.encoders.modalities)
        together = self.integration(encoded) if self.stages > 1 else tokens
        logits = self.weigh(tokens.flatten(1))
        if assessment is not None:
            logits = logits + self._reliability(assessment, there).log()
        weight = logits.masked_fill(~(there | ~there.any(1, keepdim=True)), -torch.inf).softmax(1)
        fused = (weight[..., None] * together).sum(1)
        if self.stages > 2:
            kappa = torch.ones_like(fused[:, :1]) if assessment is None else assessment.consistency[:, None].to(fused)
            judged, _ = self.judge(torch.cat((fused, together.flatten(1), kappa), 1))
            fused = kappa * fused + (1 - kappa) * judged
        names = self.encoders.modalities
        return Answer(self.output(fused), encoded.hidden, dict(zip(names, unimodal.unbind(), strict=True)), fused)

    def _reliability(self, assessment: Assessment, there: Tensor) -> Tensor:
        """(N, M) positive: τ_m r_m + 0.001, r_m over the other modalities that are there; 1 where there is none."""
        names = self.encoders.modalities
        q = torch.stack([assessment.probabilities[name] for name in names], 1)
        typicality = torch.stack([assessment.typicality[name] for name in names], 1)
        others = there[:, None] & ~torch.eye(len(names), dtype=torch.bool, device=there.device)
        count = others.sum(2)
        agreement = (q @ q.transpose(1, 2)).masked_fill(~others, 0).sum(2) / count.clamp(min=1)
        return typicality * torch.where(count > 0, agreement, 1) + 1e-3
