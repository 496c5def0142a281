"""From the features of a modality to a vector of each clip, and what every network of emotions answers.

Shapes follow from those of the input alone, so that nothing waits for a device, and numbers of clips and steps stay
open in an export. N: clips, C: outputs, M: modalities, d: hidden width, D and L: width and steps of a modality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.emotion import Modality
from leanlight.contracts.ranges import PositiveInt, Share
from lit_modules.nn.checks import require_positive, require_share

SequenceKind = Literal["transformer", "lstm"]


@dataclass(frozen=True)
class Answer:
    """What a network makes of N clips.

    Args:
        output: (N, C) the fused answer: a logit a class, or one score.
        hidden: by modality, (N, d) vectors f_m; empty where a network has none.
        unimodal: by modality, (N, C) what it gives alone; empty where a network does not ask it.
        fused: (N, d) what the output is read from; None where there is no such vector.
        terms: further losses by name, scalars, their factors in them; in training alone.
    """

    output: Tensor
    hidden: Mapping[str, Tensor] = field(default_factory=dict)
    unimodal: Mapping[str, Tensor] = field(default_factory=dict)
    fused: Tensor | None = None
    terms: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class LearnsLabels(Protocol):
    """A network that makes labels of its own from a memory of the training clips, kept in its buffers.

    A step calls `losses` before the optimiser and `remember` after it. Where several processes train, `remember` gets
    the clips of all of them, so that every process has the same memory.
    """

    def prepare(self, clips: int) -> None:
        """Make room for the training part, before any state is loaded.

        Args:
            clips: of the training part.
        """
        ...

    def losses(self, answer: Answer, target: Tensor, index: Tensor, present: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Terms by name that are added to the loss of the output; nothing is remembered.

        Args:
            answer: of a batch.
            target: (N,) int64 class, or (N,) float score.
            index: (N,) int64 positions in the training part.
            present: by modality, (N,) bool.
        """
        ...

    def remember(
        self, answer: Answer, target: Tensor, index: Tensor, present: Mapping[str, Tensor], epoch: int
    ) -> None:
        """Take in the clips of a step; reads `hidden` and `fused` of the answer alone.

        Args:
            answer: of the step's clips, as `losses` had it.
            target: as there.
            index: as there.
            present: as there.
            epoch: from 0.
        """
        ...


@dataclass(frozen=True)
class Encoding:
    """How modalities are encoded; the same for the rows of a table.

    Args:
        dim: d, width of the vectors.
        dropout: of features, and within the layers for sequences, in [0, 1).
        layers: of the transformer or LSTM for sequences.
        heads: of the transformer's attention; they divide d.
        kernel: steps that the convolution before it sees, odd.
        sequence: what reads a sequence after the convolution.
    """

    dim: PositiveInt = 128
    dropout: Share = 0.2
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    kernel: PositiveInt = 3
    sequence: SequenceKind = "transformer"

    def __post_init__(self) -> None:
        require_positive(dim=self.dim, layers=self.layers, heads=self.heads, kernel=self.kernel)
        require_share(dropout=self.dropout)
        require_heads(self.dim, self.heads)
        if self.kernel % 2 == 0:
            raise UserError(f"kernel: expected an odd number of steps, got {self.kernel}")
        if self.sequence not in get_args(SequenceKind):
            raise UserError(f"sequence: expected one of {', '.join(get_args(SequenceKind))}, got {self.sequence}")


def require_heads(dim: int, heads: int) -> None:
    """Raise UserError unless `heads` divides `dim`."""
    if dim % heads:
        raise UserError(f"heads: expected a divisor of dim {dim}, got {heads}")


class Attention(nn.Module):
    """Attention of several heads, as `nn.MultiheadAttention` computes it.

    Args:
        dim: d, of queries and keys.
        heads: their number; it divides d.
        dropout: of the weights, in [0, 1).
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.read = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.read.weight)
        nn.init.zeros_(self.read.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, query: Tensor, source: Tensor, mask: Tensor) -> Tensor:
        """(N, K, d) for each query.

        Args:
            query: (N, K, d).
            source: (N, L, d); the query itself for self-attention.
            mask: (N, L) or (N, K, L) bool, what may be seen. A query that may see nothing sees the first step: a
                learned vector stands there where a modality is missing.
        """
        if query is source:
            q, k, v = self.read(query).chunk(3, -1)
        else:
            split = query.shape[-1]
            q = F.linear(query, self.read.weight[:split], self.read.bias[:split])
            k, v = F.linear(source, self.read.weight[split:], self.read.bias[split:]).chunk(2, -1)
        seen = mask if mask.dim() == 3 else mask[:, None]
        first = torch.arange(source.shape[1], device=source.device) == 0
        seen = seen | (~seen.any(-1, keepdim=True) & first)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        if self.training and self.dropout and query.device.type == "cpu":
            mixed = _dropped_attention(q, k, v, seen[:, None], self.dropout)
        else:
            dropout = self.dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, seen[:, None], dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))


def _dropped_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, dropout: float) -> Tensor:
    """Attention with dropout, of which PyTorch has no fused form on a CPU; its plain one takes half as long again."""
    bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    weight = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
    return F.dropout(weight.softmax(-1), dropout) @ v


class Block(nn.Module):
    """A layer of a transformer that normalises first: attention, then a hidden layer of 4 d, each added to its input.

    Args:
        dim: d.
        heads: of the attention.
        dropout: of weights, of what attention and hidden layer add, and of the hidden layer, in [0, 1).
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_attention, self.norm_hidden = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads, dropout)
        self.expand, self.contract = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, source: Tensor | None = None) -> Tensor:
        """(N, K, d).

        Args:
            x: (N, K, d).
            mask: see `Attention`.
            source: (N, L, d) what is looked at, normalised as `x` is; None: `x` itself.
        """
        query = self.norm_attention(x)
        seen = query if source is None else self.norm_attention(source)
        x = x + self.dropout(self.attention(query, seen, mask))
        hidden = self.dropout(F.relu(self.expand(self.norm_hidden(x))))
        return x + self.dropout(self.contract(hidden))


def positioned(x: Tensor) -> Tensor:
    """Steps (N, L, d), times √d, and sines and cosines of their position added, as transformers take them."""
    length, dim = x.shape[1:]
    half = -(-dim // 2)
    rate = torch.exp(torch.arange(half, device=x.device) * (-math.log(10_000) / max(half - 1, 1)))
    angle = torch.arange(length, device=x.device)[:, None] * rate
    place = torch.cat((angle.sin(), angle.cos()), 1)[:, :dim]
    return x * math.sqrt(dim) + place.to(x.dtype)


def steps_of(features: Tensor, length: Tensor | None, present: Tensor) -> tuple[Tensor, Tensor]:
    """Features as steps (N, L, D), 0 behind their end, and which of them are there, (N, L) bool; L is 1 for vectors."""
    if length is None:
        return features[:, None], present[:, None]
    place = torch.arange(features.shape[1], device=features.device)
    mask = (place < length[:, None]) & present[:, None]
    return torch.where(mask[..., None], features, 0), mask


def last_of(steps: Tensor, mask: Tensor) -> Tensor:
    """Of steps (N, L, d) the last that is there, the first where none is: (N, d)."""
    last = (mask.sum(1) - 1).clamp(min=0)
    return steps.gather(1, last[:, None, None].expand(-1, -1, steps.shape[2])).squeeze(1)


class VectorEncoder(nn.Module):
    """Three linear layers with ReLU, as MERTools encodes features of an utterance.

    Args:
        width: D.
        dim: d.
        dropout: of the features, in [0, 1).
    """

    def __init__(self, width: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(),
            nn.Linear(dim, dim), nn.ReLU(),
        )  # fmt: skip

    def forward(self, steps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (N, d) and steps (N, 1, d) of features (N, 1, D)."""
        encoded = self.layers(steps)
        return encoded.squeeze(1), encoded


class SequenceEncoder(nn.Module):
    """A convolution over steps, then a transformer whose steps are averaged, or an LSTM whose last state counts.

    Args:
        width: D.
        encoding: d and the layers.
    """

    def __init__(self, width: int, encoding: Encoding) -> None:
        super().__init__()
        dim, dropout, layers = encoding.dim, encoding.dropout, encoding.layers
        self.dropout = nn.Dropout(dropout)
        self.convolution = nn.Conv1d(width, dim, encoding.kernel, padding=encoding.kernel // 2, bias=False)
        self.lstm: nn.LSTM | None = None
        if encoding.sequence == "lstm":
            between = dropout if layers > 1 else 0.0
            self.lstm = nn.LSTM(dim, dim, layers, batch_first=True, dropout=between)
        else:
            self.blocks = nn.ModuleList(Block(dim, encoding.heads, dropout) for _ in range(layers))
            self.norm = nn.LayerNorm(dim)

    def forward(self, steps: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (N, d) and steps (N, L, d) of features (N, L, D), of which those of `mask` (N, L) are there."""
        x = self.convolution(self.dropout(steps).transpose(1, 2)).transpose(1, 2)
        if self.lstm is not None:
            # Padding lies behind the steps, so the state at the last one knows nothing of it.
            states = _scanned(self.lstm, x) if torch.compiler.is_exporting() else self.lstm(x)[0]
            return last_of(states, mask), states
        x = self.dropout(positioned(x))
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        weight = mask.to(x.dtype)[..., None]
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1), x


def _scanned(lstm: nn.LSTM, x: Tensor) -> Tensor:
    """What an LSTM gives for (N, L, d) without gradients, by an operation whose number of steps an export leaves open.

    An exported `nn.LSTM` is unrolled over the steps of the example it is exported with.
    """
    from torch._higher_order_ops import scan  # not public in PyTorch yet: nothing but the export shall hang on it

    for layer in lstm.all_weights:
        w_in, w_state, b_in, b_state = (weight.detach() for weight in layer)

        def step(
            state: tuple[Tensor, Tensor], x: Tensor, w: Tensor = w_state, b: Tensor = b_state
        ) -> tuple[tuple[Tensor, Tensor], Tensor]:
            hidden, cell = state
            let_in, forget, candidate, let_out = (x + hidden @ w.T + b).chunk(4, 1)
            cell = forget.sigmoid() * cell + let_in.sigmoid() * candidate.tanh()
            hidden = let_out.sigmoid() * cell.tanh()
            return (hidden, cell), hidden.clone()

        inputs = (x.detach() @ w_in.T + b_in).transpose(0, 1)
        zero = inputs.new_zeros(inputs.shape[1], lstm.hidden_size)
        x = scan(step, (zero, zero.clone()), inputs)[1].transpose(0, 1)
    return x


@dataclass(frozen=True)
class Encoded:
    """Clips after their encoders.

    Args:
        hidden: by modality, (N, d) vectors f_m; a learned one where a clip lacks it.
        steps: by modality, (N, L, d); L is 1 where the features are one vector.
        mask: by modality, (N, L) bool, which steps are there.
    """

    hidden: dict[str, Tensor]
    steps: dict[str, Tensor]
    mask: dict[str, Tensor]

    def joined(self) -> Tensor:
        """(N, M d) the vectors side by side."""
        return torch.cat(tuple(self.hidden.values()), 1)

    def stacked(self) -> Tensor:
        """(N, M, d) the vectors as tokens."""
        return torch.stack(tuple(self.hidden.values()), 1)


class Encoders(nn.Module):
    """An encoder a modality, and what stands in where a clip lacks one.

    Args:
        modalities: by name.
        encoding: how.
    """

    def __init__(self, modalities: Mapping[str, Modality], encoding: Encoding) -> None:
        super().__init__()
        if not modalities:
            raise UserError("modalities: expected one at least, got none")
        #: In the order in which networks take them; a list, since any text may be a modality's name.
        self.modalities, self.dim = tuple(modalities), encoding.dim
        self.encoders = nn.ModuleList(
            SequenceEncoder(modality.width, encoding)
            if modality.longest
            else VectorEncoder(modality.width, encoding.dim, encoding.dropout)
            for modality in modalities.values()
        )
        self.missing = nn.Parameter(torch.zeros(len(modalities), encoding.dim))

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> Encoded:
        """Encode a batch; arguments as in `MultimodalBatch`."""
        encoded = Encoded({}, {}, {})
        for name, encoder, missing in zip(self.modalities, self.encoders, self.missing, strict=True):
            steps, mask = steps_of(features[name], length.get(name), present[name])
            vector, steps = encoder(steps, mask)
            there = present[name][:, None]
            encoded.hidden[name] = torch.where(there, vector, missing.to(vector.dtype))
            encoded.steps[name] = torch.where(there[..., None], steps, missing.to(steps.dtype))
            encoded.mask[name] = mask
        return encoded


def presence(present: Mapping[str, Tensor], modalities: tuple[str, ...]) -> Tensor:
    """(N, M) bool, which modalities a clip has, in their order."""
    return torch.stack([present[name] for name in modalities], 1)


class Head(nn.Module):
    """Hidden layers with ReLU and a linear output.

    Args:
        width: numbers of an input.
        dim: d, of the hidden layers.
        num_outputs: C.
        dropout: of the input, in [0, 1).
        layers: hidden ones.
    """

    def __init__(self, width: int, dim: int, num_outputs: int, dropout: float, layers: int = 1) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, dim), nn.ReLU())
        further = [layer for _ in range(layers - 1) for layer in (nn.Linear(dim, dim), nn.ReLU())]
        self.rest = nn.Sequential(*further, nn.Linear(dim, num_outputs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs (N, C) of inputs (N, width), and the first hidden layer (N, d)."""
        fused = self.first(x)
        return self.rest(fused), fused
