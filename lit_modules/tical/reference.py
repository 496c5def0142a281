"""What a benchmark compares with: the plain forms of what is fast here, and a training step without Lightning."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import MultimodalBatch
from lit_modules.tical.baselines import MulT
from lit_modules.tical.encoders import Attention, Block, positioned
from lit_modules.tical.losses import hyp_cpcc, staged_loss
from lit_modules.tical.network import EmotionNetwork
from lit_modules.tical.tree import LabelTree

if TYPE_CHECKING:
    from lit_modules.tical.module import EmotionRecognition


def broadcast_nearest(query: Tensor, anchors: Tensor, curvature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Distances (N,) and positions (N,) of the nearest anchors in Poincaré's ball, by all differences (N, Q, d).

    Args:
        query: (N, d) points.
        anchors: (Q, d) points.
        curvature: c, positive.
    """
    square = (query[:, None] - anchors).square().sum(-1)
    rest, other = (1 - curvature * x.square().sum(-1) for x in (query, anchors))
    distance = (1 + 2 * curvature * square / (rest[:, None] * other)).acosh() / math.sqrt(curvature)
    least, position = distance.min(1)
    return least, position


class JoinedLists:
    """Lists of anchors that are joined with the new ones and cut in every step.

    Args:
        modalities: names.
        dim: coordinates of a point.
        length: Q.
    """

    def __init__(self, modalities: tuple[str, ...], dim: int, length: int) -> None:
        self.length = length
        self.points = {name: torch.zeros(0, dim) for name in modalities}
        self.label = {name: torch.zeros(0, dtype=torch.int64) for name in modalities}

    def add(self, points: Mapping[str, Tensor], label: Tensor, clip: Tensor, chosen: Tensor) -> None:
        """Take in the chosen samples of a step; arguments as of `AnchorLists.add`."""
        order = clip.argsort(stable=True)
        order = order[chosen[order]]
        for name, new in points.items():
            self.points[name] = torch.cat([self.points[name], new[order]])[-self.length :]
            self.label[name] = torch.cat([self.label[name], label[order]])[-self.length :]


# -- steps


def train_step(
    network: EmotionNetwork,
    optimizer: torch.optim.Optimizer,
    batch: MultimodalBatch,
    tree: LabelTree | None = None,
    tree_weight: float = 1.0,
) -> None:
    """What `EmotionRecognition` does in a step with classes of equal weight: judge, learn, and remember.

    Args:
        network: with an assessment of the published reading, or none.
        optimizer: of its parameters.
        batch: on the network's device.
        tree: of the classes; None without its term.
        tree_weight: factor of the term.
    """
    verdict = network.judge(batch.features, batch.length, batch.present, batch.index)
    assessed, assessment, lists = verdict.assessed, network.assessment, network.lists
    loss = staged_loss(verdict.answer, batch.label, assessed, None, batch.present)
    if tree is not None and assessed is not None and assessment is not None:
        pairs = ((verdict.points[name], assessed.pseudo[name]) for name in verdict.points)
        terms = [hyp_cpcc(point, label, tree, assessment.geometry) for point, label in pairs]
        loss = torch.stack([loss, tree_weight * torch.stack(terms).sum()]).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if lists is not None and assessment is not None:
        points = {name: point.detach() for name, point in verdict.points.items()}
        chosen, confidence = network.anchoring(verdict.output.detach(), batch.label, batch.score)
        lists.add(points, batch.label, batch.index, chosen, confidence, batch.present)
        if assessed is not None:
            lists.observe(assessed.distance, assessment.range_momentum)


class BareEmotionStep:
    """`train_step` on a copy of a module's network that assesses from its first epoch on.

    Args:
        module: whose network, tree and optimiser are taken; it is left as it is.
    """

    def __init__(self, module: EmotionRecognition) -> None:
        assert module.network is not None
        self.module, self.network = module, copy.deepcopy(module.network)
        self.network.assessing = True
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = module.make_optimizer(trained)

    def __call__(self, batch: MultimodalBatch) -> None:
        """One step."""
        train_step(self.network, self.optimizer, batch, self.module.tree, self.module.tree_weight)


# -- MulT as its authors compute it


class PublishedMulT(nn.Module):
    """The layers of a `MulT` in the order of the published code, for complete clips whose sequences are full.

    Steps come first; keys and values of a pair are embedded and normalised one by one, in every transformer and layer;
    attention is a product, a softmax and a product, whose weights are averaged over the heads.

    Args:
        network: whose weights are copied.
    """

    def __init__(self, network: MulT) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """(N, C) of features (N, L, D)."""
        net = self.network
        steps = {
            name: convolution(features[name].transpose(1, 2)).permute(2, 0, 1)
            for name, convolution in zip(net.modalities, net.embed, strict=True)
        }
        pairs = iter(net.pairs)
        last = []
        for target, memory in zip(net.modalities, net.memories, strict=True):
            found = [self._pair(next(pairs), steps[target], steps[o]) for o in net.modalities if o != target]
            x = torch.cat(found, 2)
            for block in memory.blocks:  # type: ignore[union-attr]
                x = _layer(block, x, x, x)
            last.append(memory.norm(x)[-1])  # type: ignore[operator]
        joined = torch.cat(last, 1)
        return net.output(joined + net.residual(joined))

    def _pair(self, transformer: nn.Module, x: Tensor, source: Tensor) -> Tensor:
        x, keys, values = (self._embedded(each) for each in (x, source, source))
        for block in transformer.blocks:  # type: ignore[union-attr]
            x = _layer(block, x, keys, values)
        return transformer.norm(x)  # type: ignore[operator]

    def _embedded(self, x: Tensor) -> Tensor:
        return self.network.embedding_dropout(positioned(x.transpose(0, 1)).transpose(0, 1))


def _layer(block: Block, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(L, N, d): attention and the hidden layer."""
    query, keys, values = (block.norm_attention(each) for each in (x, keys, values))
    mixed, _ = _attend(block.attention, query, keys, values)
    x = x + block.dropout(mixed)
    hidden = block.dropout(F.relu(block.expand(block.norm_hidden(x))))
    return x + block.dropout(block.contract(hidden))


def _attend(attention: Attention, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What is found (L, N, d), and the weights (N, L, S), a mean over the heads."""
    (length, clips, dim), heads = query.shape, attention.heads
    weights, biases = attention.read.weight.chunk(3), attention.read.bias.chunk(3)
    q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, keys, values), weights, biases, strict=True))
    q = q * (dim // heads) ** -0.5
    q, k, v = (x.reshape(len(x), clips * heads, dim // heads).transpose(0, 1) for x in (q, k, v))
    weight = F.softmax(torch.bmm(q, k.transpose(1, 2)).float(), -1).type_as(q)
    weight = F.dropout(weight, attention.dropout, attention.training)
    mixed = torch.bmm(weight, v).transpose(0, 1).reshape(length, clips, dim)
    return attention.out(mixed), weight.view(clips, heads, length, -1).sum(1) / heads
