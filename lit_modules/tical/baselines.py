"""Networks of the field that stand beside TiCAL: each modality alone, and the usual ways to fuse several.

All have the encoders of `lit_modules.tical.encoders`, so that rows of a table differ in the fusion alone; where the
published network has others (BERT, stacked LSTMs), docs/methods/tical.md says so. Where a clip lacks a modality a
learned vector stands for it, and attention passes it over. N: clips, C: outputs, M: modalities, d: hidden width.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.emotion import Modality
from leanlight.contracts.ranges import NonNegativeFloat, PositiveFloat, PositiveInt, Share
from lit_modules.nn.checks import require_positive, require_share
from lit_modules.tical.encoders import (
    Answer,
    Block,
    Encoders,
    Encoding,
    Head,
    last_of,
    positioned,
    presence,
    require_heads,
    steps_of,
)


def _require_factors(**factors: float) -> None:
    for name, value in factors.items():
        if not value >= 0:
            raise UserError(f"{name}: expected a number of at least 0, got {value}")


class Unimodal(nn.Module):
    """One modality alone: its encoder and a linear output.

    Args:
        modalities: by name.
        num_outputs: C, classes; 1 for scores.
        modality: which of them.
        encoding: of it.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        num_outputs: int,
        modality: str,
        encoding: Encoding | None = None,
    ) -> None:
        super().__init__()
        if modality not in modalities:
            raise UserError(f"modality: expected one of {', '.join(modalities)}, got {modality}")
        require_positive(num_outputs=num_outputs)
        encoding = encoding or Encoding()
        self.encoders = Encoders({modality: modalities[modality]}, encoding)
        self.output = nn.Linear(encoding.dim, num_outputs)

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Answer:
        """Answer a batch; arguments as in `MultimodalBatch`."""
        hidden = self.encoders(features, length, present).hidden
        ((name, fused),) = hidden.items()
        output = self.output(fused)
        return Answer(output, hidden, {name: output}, fused)


class LateFusion(nn.Module):
    """LF-DNN: the vectors of all modalities side by side, and two hidden layers.

    Args:
        modalities: by name.
        num_outputs: C, classes; 1 for scores.
        encoding: of the modalities; its d and dropout also hold behind them.
    """

    def __init__(self, modalities: Mapping[str, Modality], num_outputs: int, encoding: Encoding | None = None) -> None:
        super().__init__()
        require_positive(num_outputs=num_outputs)
        encoding = encoding or Encoding()
        self.encoders = Encoders(modalities, encoding)
        self.head = Head(len(modalities) * encoding.dim, encoding.dim, num_outputs, encoding.dropout, 2)

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Answer:
        """Answer a batch; arguments as in `MultimodalBatch`."""
        encoded = self.encoders(features, length, present)
        output, fused = self.head(encoded.joined())
        return Answer(output, encoded.hidden, fused=fused)


class AttentionFusion(nn.Module):
    """MERTools' baseline: a sum of the vectors with weights from all of them; weights are not normalised.

    Args:
        modalities: by name.
        num_outputs: C, classes; 1 for scores.
        encoding: of the modalities; its d and dropout also hold for what weighs them.
    """

    def __init__(self, modalities: Mapping[str, Modality], num_outputs: int, encoding: Encoding | None = None) -> None:
        super().__init__()
        require_positive(num_outputs=num_outputs)
        encoding = encoding or Encoding()
        count, dim = len(modalities), encoding.dim
        self.encoders = Encoders(modalities, encoding)
        self.weigh = nn.Sequential(
            nn.Dropout(encoding.dropout), nn.Linear(count * dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(),
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, count),
        )  # fmt: skip
        self.output = nn.Linear(dim, num_outputs)

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Answer:
        """Answer a batch; arguments as in `MultimodalBatch`. What a clip lacks has weight 0."""
        encoded = self.encoders(features, length, present)
        weight = self.weigh(encoded.joined())
        weight = torch.where(presence(present, self.encoders.modalities), weight, 0)
        fused = (weight[:, None] @ encoded.stacked()).squeeze(1)
        return Answer(self.output(fused), encoded.hidden, fused=fused)


def _with_one(vectors: Mapping[str, Tensor]) -> list[Tensor]:
    """[1; f_m] (N, d + 1) of each modality."""
    return [F.pad(vector, (1, 0), value=1.0) for vector in vectors.values()]


class TensorFusion(nn.Module):
    """TFN (Zadeh et al. 2017): the outer product of [1; f_m] over all modalities, and two hidden layers.

    The product has (d + 1)^M numbers a clip.

    Args:
        modalities: by name.
        num_outputs: C, classes; 1 for scores.
        encoding: of the modalities; its d and dropout also hold behind them.
        factor: width to which a linear layer brings each f_m before the product.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        num_outputs: int,
        encoding: Encoding | None = None,
        factor: PositiveInt = 16,
    ) -> None:
        super().__init__()
        require_positive(num_outputs=num_outputs, factor=factor)
        encoding = encoding or Encoding()
        self.encoders = Encoders(modalities, encoding)
        self.narrow = nn.ModuleList(nn.Linear(encoding.dim, factor) for _ in modalities)
        self.head = Head((factor + 1) ** len(modalities), encoding.dim, num_outputs, encoding.dropout, 2)

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Answer:
        """Answer a batch; arguments as in `MultimodalBatch`."""
        hidden = self.encoders(features, length, present).hidden
        narrow = {name: layer(x) for (name, x), layer in zip(hidden.items(), self.narrow, strict=True)}
        product, *others = _with_one(narrow)
        for vector in others:
            product = (product[:, :, None] * vector[:, None]).flatten(1)
        output, fused = self.head(product)
        return Answer(output, hidden, fused=fused)


class LowRankFusion(nn.Module):
    """LMF (Liu et al. 2018): TFN's product under a linear map whose tensor is a sum of `rank` outer products.

    Args:
        modalities: by name.
        num_outputs: C, classes; 1 for scores.
        encoding: of the modalities.
        rank: 3 for MOSI, 4 for MOSEI as published.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        num_outputs: int,
        encoding: Encoding | None = None,
        rank: PositiveInt = 4,
    ) -> None:
        super().__init__()
        require_positive(num_outputs=num_outputs, rank=rank)
        encoding = encoding or Encoding()
        self.encoders = Encoders(modalities, encoding)
        shape = (rank, encoding.dim + 1, num_outputs)
        self.factors = nn.ParameterList(nn.init.xavier_normal_(torch.empty(shape)) for _ in modalities)
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, rank)))
        self.bias = nn.Parameter(torch.zeros(num_outputs))

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Answer:
        """Answer a batch; arguments as in `MultimodalBatch`."""
        hidden = self.encoders(features, length, present).hidden
        product: Tensor | float = 1.0
        for vector, factor in zip(_with_one(hidden), self.factors, strict=True):
            rank, width, outputs = factor.shape
            # One product of matrices for all ranks: (N, d + 1) by (d + 1, rank C).
            mapped = vector @ factor.transpose(0, 1).reshape(width, rank * outputs)
            product = product * mapped.unflatten(1, (rank, outputs))
        return Answer((self.weight @ product).squeeze(1) + self.bias, hidden)


class MulT(nn.Module):
    """MulT (Tsai et al. 2019): a transformer for each ordered pair of modalities, one for each modality behind them.

    Args:
        modalities: by name.
        num_outputs: C, classes; 1 for scores.
        dim: d of a convolution over the steps of a modality; 50 for MOSI, 30 for MOSEI, as published.
        heads: of attention; they divide d. Published: 10 and 6.
        levels: layers of a transformer of a pair.
        memory_levels: layers of a modality's transformer.
        kernel: steps that the convolution sees, odd.
        dropout: within the transformers and of the output's hidden layer, in [0, 1).
        embedding_dropout: of the steps after the convolution, in [0, 1).
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        num_outputs: int,
        dim: PositiveInt = 50,
        heads: PositiveInt = 10,
        levels: PositiveInt = 4,
        memory_levels: PositiveInt = 4,
        kernel: PositiveInt = 1,
        dropout: Share = 0.1,
        embedding_dropout: Share = 0.25,
    ) -> None:
        super().__init__()
        require_positive(
            num_outputs=num_outputs, dim=dim, heads=heads, levels=levels, memory_levels=memory_levels, kernel=kernel
        )
        require_share(dropout=dropout, embedding_dropout=embedding_dropout)
        require_heads(dim, heads)
        if len(modalities) < 2:
            raise UserError(f"modalities: expected two at least, got {', '.join(modalities)}")
        if kernel % 2 == 0:
            raise UserError(f"kernel: expected an odd number of steps, got {kernel}")
        self.modalities = tuple(modalities)
        self.dim, count = dim, len(modalities)
        self.embed = nn.ModuleList(
            nn.Conv1d(modality.width, dim, kernel, padding=kernel // 2, bias=False) for modality in modalities.values()
        )
        self.missing = nn.Parameter(torch.zeros(count, dim))
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.pairs = nn.ModuleList(_Transformer(dim, heads, levels, dropout) for _ in range(count * (count - 1)))
        width = (count - 1) * dim
        self.memories = nn.ModuleList(_Transformer(width, heads, memory_levels, dropout) for _ in modalities)
        self.residual = nn.Sequential(
            nn.Linear(count * width, count * width), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(count * width, count * width),
        )  # fmt: skip
        self.output = nn.Linear(count * width, num_outputs)

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Answer:
        """Answer a batch; arguments as in `MultimodalBatch`. `hidden` is what a modality found in the others."""
        steps, mask = self._embedded(features, length, present)
        pairs = iter(self.pairs)
        hidden = {}
        for target, memory in zip(self.modalities, self.memories, strict=True):
            found = [next(pairs)(steps[target], mask[o], steps[o]) for o in self.modalities if o != target]
            # Its own padding is passed over from here on; of a modality that is missing the first step counts.
            hidden[target] = last_of(memory(torch.cat(found, 2), mask[target]), mask[target])
        joined = torch.cat(tuple(hidden.values()), 1)
        fused = joined + self.residual(joined)
        return Answer(self.output(fused), hidden, fused=fused)

    def _embedded(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By modality, steps (N, L, d) with their positions, and which of them are there (N, L)."""
        steps, mask = {}, {}
        for name, convolution, missing in zip(self.modalities, self.embed, self.missing, strict=True):
            x, mask[name] = steps_of(features[name], length.get(name), present[name])
            x = convolution(x.transpose(1, 2)).transpose(1, 2)
            x = torch.where(present[name][:, None, None], x, missing.to(x.dtype))
            steps[name] = self.embedding_dropout(positioned(x))
        return steps, mask


class _Transformer(nn.Module):
    """Layers of attention to the same steps, or of self-attention, and a norm behind them."""

    def __init__(self, dim: int, heads: int, levels: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(levels))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, mask: Tensor, source: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask, source)
        return self.norm(x)


class MISA(nn.Module):
    """MISA (Hazarika et al. 2020): what modalities share and what each has of its own, apart, then fused by attention.

    Further losses: central moments of shared vectors shall agree (``similarity``), shared and own vectors, and own ones
    of different modalities, be orthogonal (``difference``), and both together give the modality back
    (``reconstruction``). Clips that lack a modality have no part in its terms.

    Args:
        modalities: by name.
        num_outputs: C, classes; 1 for scores.
        encoding: of the modalities, also d, heads and dropout behind them.
        similarity: factor of the moments' term; published: 0.3 and 0.8.
        difference: factor of orthogonality; published: 0.1 and 0.3.
        reconstruction: its factor.
        moments: how many are compared.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        num_outputs: int,
        encoding: Encoding | None = None,
        similarity: NonNegativeFloat = 0.3,
        difference: NonNegativeFloat = 0.1,
        reconstruction: NonNegativeFloat = 1.0,
        moments: PositiveInt = 5,
    ) -> None:
        super().__init__()
        require_positive(num_outputs=num_outputs, moments=moments)
        if len(modalities) < 2:
            raise UserError(f"modalities: expected two at least, got {', '.join(modalities)}")
        for name, value in {
            "similarity": similarity,
            "difference": difference,
            "reconstruction": reconstruction,
        }.items():
            if value < 0:
                raise UserError(f"{name}: expected a number of at least 0, got {value}")
        encoding = encoding or Encoding()
        dim, count = encoding.dim, len(modalities)
        self.factors = (similarity, difference, reconstruction)
        self.moments = moments
        self.encoders = Encoders(modalities, encoding)
        self.project = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.LayerNorm(dim)) for _ in modalities
        )
        self.own = nn.ModuleList(nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid()) for _ in modalities)
        self.shared = nn.Sequential(nn.Linear(dim, dim), nn.Sigmoid())
        self.restore = nn.ModuleList(nn.Linear(dim, dim) for _ in modalities)
        self.fuse = Block(dim, encoding.heads, encoding.dropout)
        self.head = Head(2 * count * dim, dim, num_outputs, encoding.dropout)

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Answer:
        """Answer a batch; arguments as in `MultimodalBatch`."""
        encoded = self.encoders(features, length, present)
        there = presence(present, self.encoders.modalities)
        x = [layer(vector) for layer, vector in zip(self.project, encoded.hidden.values(), strict=True)]
        own = [layer(vector) for layer, vector in zip(self.own, x, strict=True)]
        shared = list(self.shared(torch.stack(x)).unbind())
        tokens = self.fuse(torch.stack([*own, *shared], 1), torch.cat((there, there), 1))
        output, fused = self.head(tokens.flatten(1))
        terms: dict[str, Tensor] = {}
        if self.training:
            # Fifth powers of small differences do not live in half precision.
            with torch.autocast(output.device.type, enabled=False):
                terms = self._terms(_full(x), _full(own), _full(shared), there)
        return Answer(output, encoded.hidden, fused=fused, terms=terms)

    def _terms(self, x: list[Tensor], own: list[Tensor], shared: list[Tensor], there: Tensor) -> dict[str, Tensor]:
        weight = there.to(x[0].dtype).unbind(1)
        pairs = list(itertools.combinations(range(len(x)), 2))
        similarity = sum(
            (moment_discrepancy(shared[m], shared[n], weight[m], weight[n], self.moments) for m, n in pairs),
            x[0].new_zeros(()),
        )
        opposed = [(own[m], shared[m], weight[m]) for m in range(len(x))]
        opposed += [(own[m], own[n], weight[m] * weight[n]) for m, n in pairs]
        difference = sum((overlap(*each) for each in opposed), x[0].new_zeros(()))
        restored = [layer(o + s) for layer, o, s in zip(self.restore, own, shared, strict=True)]
        errors = [_mean((r - a).square().mean(1, keepdim=True), w) for r, a, w in zip(restored, x, weight, strict=True)]
        values = (similarity / len(pairs), difference, torch.cat(errors).mean())
        names = ("similarity", "difference", "reconstruction")
        return {name: f * value for name, f, value in zip(names, self.factors, values, strict=True) if f}


def _full(parts: list[Tensor]) -> list[Tensor]:
    """In single precision at least."""
    return [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in parts]


def _mean(x: Tensor, weight: Tensor) -> Tensor:
    """(d,) the mean of x (N, d) with weights (N,); 0 where they all are."""
    return weight @ x / weight.sum().clamp(min=1)


def moment_discrepancy(a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor, moments: int = 5) -> Tensor:
    """CMD (Zellinger et al. 2017): distance of the means plus those of the central moments 2 to `moments`; a scalar.

    Args:
        a: (N, d) within [0, 1].
        b: (N, d), likewise.
        weight_a: (N,) 1 for clips that count in `a`, else 0.
        weight_b: (N,), likewise.
        moments: the highest.
    """
    mean_a, mean_b = _mean(a, weight_a), _mean(b, weight_b)
    total = torch.linalg.vector_norm(mean_a - mean_b)
    central_a, central_b = a - mean_a, b - mean_b
    power_a, power_b = central_a, central_b
    for _ in range(moments - 1):
        power_a, power_b = power_a * central_a, power_b * central_b
        total = total + torch.linalg.vector_norm(_mean(power_a, weight_a) - _mean(power_b, weight_b))
    return total


def overlap(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Mean square of the products of centred rows of unit length, column by column: 0 for orthogonal spaces; a scalar.

    Args:
        a: (N, d).
        b: (N, d).
        weight: (N,) 1 for clips that count, else 0.
    """
    unit = []
    for x in (a, b):
        centred = (x - _mean(x, weight)) * weight[:, None]
        # As published, the length is a constant of the gradient.
        unit.append(centred / (centred.detach().norm(dim=1, keepdim=True) + 1e-6))
    return (unit[0].T @ unit[1]).square().mean()


class SelfMM(nn.Module):
    """Self-MM (Yu et al. 2021): beside the fused answer one of each modality, trained on labels made on the way.

    A modality's label begins as the clip's. From the second epoch on it moves by how much nearer the modality's vector
    lies to the centre of positive than of negative clips, compared with the fused vector (`relabelled`). A modality
    weighs tanh|y_m − y| in the loss. Published for scores; with classes, ours, a label is a number in [-1, 1] for each
    class (1: this one), made by the same rule, and the loss is the cross entropy with (y_m + 1) / 2, normalised.

    Args:
        modalities: by name.
        num_outputs: C, classes; 1 for scores.
        encoding: of the modalities; its d and dropout also hold behind them.
        limit: H, greatest absolute score of a label; classes have 1.
        factor: of each modality's loss.
    """

    features: Tensor
    labels: Tensor
    seen: Tensor

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        num_outputs: int,
        encoding: Encoding | None = None,
        limit: PositiveFloat = 3.0,
        factor: NonNegativeFloat = 1.0,
    ) -> None:
        super().__init__()
        require_positive(num_outputs=num_outputs)
        if limit <= 0:
            raise UserError(f"limit: expected a positive number, got {limit}")
        _require_factors(factor=factor)
        encoding = encoding or Encoding()
        self.num_outputs, self.limit, self.factor = num_outputs, limit, factor
        self.encoders = Encoders(modalities, encoding)
        count, dim, dropout = len(modalities), encoding.dim, encoding.dropout
        self.heads = nn.ModuleList(Head(dim, dim, num_outputs, dropout, 2) for _ in modalities)
        self.head = Head(count * dim, dim, num_outputs, dropout, 2)
        self.register_buffer("features", torch.zeros(count + 1, 0, dim))
        self.register_buffer("labels", torch.zeros(count + 1, 0, num_outputs))
        self.register_buffer("seen", torch.zeros(count + 1, 0, dtype=torch.bool))

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Answer:
        """Answer a batch; arguments as in `MultimodalBatch`. `hidden` is a modality's vector before its answer."""
        encoded = self.encoders(features, length, present)
        output, fused = self.head(encoded.joined())
        alone = {name: head(x) for (name, x), head in zip(encoded.hidden.items(), self.heads, strict=True)}
        return Answer(output, {n: a[1] for n, a in alone.items()}, {n: a[0] for n, a in alone.items()}, fused)

    def prepare(self, clips: int) -> None:
        """Make room for vectors and labels of the training clips; see `LearnsLabels`."""
        for name in ("features", "labels", "seen"):
            buffer: Tensor = getattr(self, name)
            setattr(self, name, buffer.new_zeros(buffer.shape[0], clips, *buffer.shape[2:]))

    def losses(self, answer: Answer, target: Tensor, index: Tensor, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A term a modality, ``self_<modality>``; see `LearnsLabels`."""
        given = self._as_scores(target)
        terms = {}
        for m, (name, output) in enumerate(answer.unimodal.items(), start=1):
            label = torch.where(self.seen[m, index, None], self.labels[m, index], given)
            weight = (label - given).abs().sum(1).tanh() * present[name]
            terms[f"self_{name}"] = self.factor * (weight * self._loss(output.float(), label)).mean()
        return terms

    def _loss(self, output: Tensor, label: Tensor) -> Tensor:
        """(N,) of outputs and labels (N, C)."""
        if self.num_outputs == 1:
            return (output - label).abs().squeeze(1)
        share = (label + 1).clamp(min=1e-6)
        return F.cross_entropy(output, share / share.sum(1, keepdim=True), reduction="none")

    def _as_scores(self, target: Tensor) -> Tensor:
        """(N, C): the score itself, or 1 for the class and -1 for the others."""
        if target.is_floating_point():
            return target[:, None]
        return 2.0 * F.one_hot(target, self.num_outputs) - 1

    @torch.no_grad()
    def remember(
        self, answer: Answer, target: Tensor, index: Tensor, present: Mapping[str, Tensor], epoch: int
    ) -> None:
        """Make the clips' labels anew, from the second epoch on, then keep their vectors; see `LearnsLabels`."""
        given = self._as_scores(target).to(self.labels)
        if answer.fused is None:
            raise ValueError("answer: expected one of this network")
        vectors = [answer.fused, *answer.hidden.values()]
        there = [torch.ones_like(index, dtype=torch.bool), *(present[name] for name in answer.hidden)]
        gains = [self._gain(m, vector.to(self.features)) for m, vector in enumerate(vectors)]
        limit = self.limit if self.num_outputs == 1 else 1.0
        for m, (vector, is_there) in enumerate(zip(vectors, there, strict=True)):
            known = self.seen[m, index]
            label = torch.where(known[:, None], self.labels[m, index], given)
            if m > 0 and epoch > 0:
                fresh = relabelled(given, gains[m], gains[0], limit)
                moved = (epoch * label + 2 * fresh) / (epoch + 2)  # (n − 1) / (n + 1) and 2 / (n + 1), n from 1
                # Without clips on both sides there is no centre to compare with.
                label = torch.where(fresh.isfinite() & is_there[:, None], moved, label)
            self.labels[m, index] = label
            self.features[m, index] = torch.where(is_there[:, None], vector.to(self.features), self.features[m, index])
            self.seen[m, index] = known | is_there

    def _gain(self, m: int, vector: Tensor) -> Tensor:
        """α (N, C): (‖f − c⁻‖ − ‖f − c⁺‖) / ‖f − c⁺‖ of vectors (N, d); NaN where a centre has no clips."""
        label, seen = self.labels[m], self.seen[m, :, None]
        away = [
            torch.cdist(vector, _centres(self.features[m], side & seen), compute_mode="donot_use_mm_for_euclid_dist")
            for side in (label > 0, label < 0)
        ]
        return (away[1] - away[0]) / (away[0] + 1e-8)


def _centres(features: Tensor, members: Tensor) -> Tensor:
    """(C, d) means of features (clips, d) over members (clips, C); NaN where there is none."""
    weight = members.to(features.dtype)
    return weight.T @ features / weight.sum(0)[:, None]


def relabelled(label: Tensor, gain: Tensor, fused_gain: Tensor, limit: float) -> Tensor:
    """A modality's label by its vector: ½ (α_m / α) y + ½ (y + α_m − α), within ±H.

    Args:
        label: y (N, C), the clips' own.
        gain: α_m (N, C) of the modality's vectors.
        fused_gain: α (N, C) of the fused ones.
        limit: H.
    """
    return (0.5 * gain / (fused_gain + 1e-8) * label + 0.5 * (label + gain - fused_gain)).clamp(-limit, limit)
