"""Rules of tuning: which parameters of a pre-trained network train, and what is added to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from leanlight.contracts import MissingExtraError, UserError
from leanlight.contracts.ranges import PositiveInt, Share
from lit_modules.nn import TimmNet
from lit_modules.nn.checks import require_positive
from lit_modules.spike_nvpt.layers import AdaptedLayer, ScaledLayer
from lit_modules.spike_nvpt.prompts import Prompts, SpikingPrompts
from lit_modules.spike_nvpt.vit import TunedNetwork, blocks_of, place_prompts

Depth = Literal["deep", "shallow", "first", "last"]


class Tuning(ABC):
    """A rule of tuning. The last layer trains under every rule."""

    @abstractmethod
    def adapt(self, net: TimmNet) -> TunedNetwork:
        """Freeze what does not train, add what is added, in place."""


@dataclass(frozen=True)
class LinearProbe(Tuning):
    """Train the last layer alone."""

    def adapt(self, net: TimmNet) -> TunedNetwork:
        # Of two last layers, as those of a distilled network, logits are no single layer of what comes before.
        return TunedNetwork(_frozen(net), head_only=isinstance(net.network.get_classifier(), nn.Module))


@dataclass(frozen=True)
class FullTuning(Tuning):
    """Train everything; the one rule under which the network is in training mode."""

    def adapt(self, net: TimmNet) -> TunedNetwork:
        return TunedNetwork(net, whole=True)


@dataclass(frozen=True)
class PartialTuning(Tuning):
    """Train the last blocks, the norm behind them and the last layer.

    Args:
        blocks: how many, at least 1 and at most those of the network.
    """

    blocks: PositiveInt = 1

    def __post_init__(self) -> None:
        require_positive(blocks=self.blocks)

    def adapt(self, net: TimmNet) -> TunedNetwork:
        blocks = blocks_of(_frozen(net))
        _check_blocks(self.blocks, blocks)
        frozen = len(blocks) - self.blocks
        for part in (*list(blocks)[frozen:], net.network.norm, net.network.fc_norm):
            part.requires_grad_(True)
        return TunedNetwork(net, frozen_blocks=frozen)


@dataclass(frozen=True)
class BitFit(Tuning):
    """Train all biases and the last layer (Ben Zaken et al. 2022)."""

    def adapt(self, net: TimmNet) -> TunedNetwork:
        _frozen(net)
        for name, parameter in net.network.named_parameters():
            if name.endswith("bias"):  # also q_bias and v_bias
                parameter.requires_grad_(True)
        return TunedNetwork(net)


@dataclass(frozen=True)
class LoRA(Tuning):
    """Train low-rank changes of linear layers (Hu et al. 2022), by peft, and the last layer.

    timm's transformers have one layer ``qkv`` for queries, keys and values, which peft takes as one: the three share
    the matrix A, and keys change, too.

    Args:
        rank: of the change (r), at least 1.
        alpha: the change is multiplied with alpha / rank; at least 1.
        targets: names of the layers, as their last part.
        dropout: of their inputs, in training, in [0, 1).
    """

    rank: PositiveInt = 8
    alpha: PositiveInt = 8
    targets: tuple[str, ...] = ("qkv",)
    dropout: Share = 0.0

    def __post_init__(self) -> None:
        require_positive(rank=self.rank, alpha=self.alpha)
        _check_dropout(self.dropout)

    def adapt(self, net: TimmNet) -> TunedNetwork:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ModuleNotFoundError as error:
            raise MissingExtraError("peft", "vision") from error
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, target_modules=list(self.targets), lora_dropout=self.dropout
        )
        net.requires_grad_(False)
        try:
            inject_adapter_in_model(config, net.network)
        except ValueError as error:
            names = ", ".join(self.targets)
            raise UserError(f"targets: expected names of linear layers of the network, got {names}") from error
        return TunedNetwork(_with_last_layer(net))  # peft has frozen it


@dataclass(frozen=True)
class Adapter(Tuning):
    """Train a small network behind the MLP of every block (Pfeiffer et al. 2021), and the last layer.

    Args:
        bottleneck: width of the small network, at least 1.
    """

    bottleneck: PositiveInt = 48

    def __post_init__(self) -> None:
        require_positive(bottleneck=self.bottleneck)

    def adapt(self, net: TimmNet) -> TunedNetwork:
        blocks: Any = blocks_of(_frozen(net))
        for block in blocks:
            if not hasattr(block, "mlp"):
                raise UserError(f"network: expected blocks with one MLP each, got a {type(block).__name__}")
            block.mlp = AdaptedLayer(block.mlp, net.network.embed_dim, self.bottleneck)
        return TunedNetwork(net)


@dataclass(frozen=True)
class SSF(Tuning):
    """Train a scale and a shift of every channel behind every linear layer, norm and patch embedding, and the last
    layer (Lian et al. 2022). At export they are merged into the layers.
    """

    def adapt(self, net: TimmNet) -> TunedNetwork:
        blocks_of(net)  # of other networks, norms over a batch or layers in groups would need more than this
        last = _last_layers(_frozen(net))
        for parent in list(net.network.modules()):
            for name, layer in parent.named_children():
                known = isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm) and layer.weight is not None
                if known and layer not in last:
                    setattr(parent, name, ScaledLayer(layer))
        return TunedNetwork(net)


@dataclass(frozen=True)
class PromptTuning(Tuning):
    """Train prompts and the last layer (VPT, Jia et al. 2022; with `SpikingPrompts` Spike-NVPT).

    Args:
        prompts: makes the prompts from (layers, width, values of a patch).
        depth: ``deep``: fresh prompts before every block; ``shallow``: before the first alone; ``first``, ``last``:
            fresh ones before the first or last `blocks` blocks, and none before those.
        blocks: how many, with ``first`` and ``last``, at least 1 and at most those of the network.
        dropout: of prompts, in training, in [0, 1).
    """

    prompts: Callable[[int, int, int], Prompts] = SpikingPrompts
    depth: Depth = "deep"
    blocks: PositiveInt | None = None
    dropout: Share = 0.0

    def __post_init__(self) -> None:
        if self.depth not in get_args(Depth):
            raise UserError(f"depth: expected one of {', '.join(get_args(Depth))}, got {self.depth!r}")
        if (self.blocks is not None) != (self.depth in ("first", "last")):
            raise UserError(f"blocks: expected a number with depth first or last alone, got {self.blocks}")
        if self.blocks is not None:
            require_positive(blocks=self.blocks)
        _check_dropout(self.dropout)

    def adapt(self, net: TimmNet) -> TunedNetwork:
        blocks = blocks_of(_frozen(net))
        count = {"deep": len(blocks), "shallow": 1}.get(self.depth, self.blocks or 1)
        _check_blocks(count, blocks)
        start = len(blocks) - count if self.depth == "last" else 0
        patch = net.network.patch_embed.proj.weight
        prompts = self.prompts(count, net.network.embed_dim, patch[0].numel())
        place_prompts(net, start, count, prompts.shape[1], self.dropout)
        untrained = not any(parameter.requires_grad for parameter in prompts.parameters()) and not self.dropout
        return TunedNetwork(net, frozen_blocks=start, head_only=untrained, prompts=prompts)


def _frozen(net: TimmNet) -> TimmNet:
    """Freeze a network but for the last layer that it may have."""
    net.requires_grad_(False)
    return _with_last_layer(net)


def _with_last_layer(net: TimmNet) -> TimmNet:
    """Let the last layer train that a network may have."""
    for layer in _last_layers(net):
        layer.requires_grad_(True)
    return net


def _last_layers(net: TimmNet) -> tuple[nn.Module, ...]:
    """The last layer of a network; distilled ones have two."""
    found: Any = net.network.get_classifier()
    return found if isinstance(found, tuple) else (found,)


def _check_blocks(count: int, blocks: nn.Sequential) -> None:
    if count > len(blocks):
        raise UserError(f"blocks: expected at most the {len(blocks)} of the network, got {count}")


def _check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise UserError(f"dropout: expected a number in [0, 1), got {dropout}")
