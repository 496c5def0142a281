"""A network of timm of which some parts are tuned: prompts between its blocks, and what never changes kept apart."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leanlight.contracts import UserError
from leanlight.contracts.ranges import NonNegativeInt
from lit_modules.nn import TimmNet
from lit_modules.spike_nvpt.layers import ScaledLayer
from lit_modules.spike_nvpt.prompts import Prompts


class PromptedBlock(nn.Module):
    """A block of a transformer before which prompts are put into the sequence, and after which they may leave it.

    Tokens are (N, P + M, D): P prefix tokens (the class token), then patches. Prompts stand between the two.

    Args:
        block: (N, n, D) → (N, n, D).
        prefix: number of prefix tokens (P).
        length: number of prompts (L).
        layer: which set of prompts it gets; None: it leaves those that are there.
        first: no prompts come in, so none are replaced.
        last: prompts leave after it.
        dropout: of prompts, in training.
    """

    tokens: Tensor | None

    def __init__(
        self, block: nn.Module, prefix: int, length: int, layer: int | None, first: bool, last: bool, dropout: float
    ) -> None:
        super().__init__()
        self.block, self.prefix, self.length = block, prefix, length
        self.layer, self.first, self.last = layer, first, last
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("tokens", None)  # (L, D): for the time of a pass, or for good in a folded network

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        if self.tokens is not None:
            # By `shape`: `len` would fix the batch size in an exported program.
            prompts = self.dropout(self.tokens.to(x.dtype).expand(x.shape[0], -1, -1))
            rest = self.prefix if self.first else self.prefix + self.length
            x = torch.cat([x[:, : self.prefix], prompts, x[:, rest:]], dim=1)
        x = self.block(x, **options)
        if self.last:
            x = torch.cat([x[:, : self.prefix], x[:, self.prefix + self.length :]], dim=1)
        return x


class TunedNetwork(nn.Module):
    """A network of timm as a rule of tuning leaves it: images (N, C, H, W) in [0, 1] → logits (N, K).

    Args:
        net: the network.
        frozen_blocks: how many of its first blocks no training changes; what they give can be stored.
        head_only: nothing but the last layer trains; what it sees can be stored.
        prompts: whose tokens its `PromptedBlock`s take; None for none.
        whole: every part is in training mode in training; else the network stays in evaluation mode, and only what a
            rule has added (dropout of prompts, adapters) trains as such.
    """

    def __init__(
        self,
        net: TimmNet,
        frozen_blocks: NonNegativeInt = 0,
        head_only: bool = False,
        prompts: Prompts | None = None,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.net, self.prompts = net, prompts
        self.frozen_blocks, self.head_only, self.whole = frozen_blocks, head_only, whole
        self.train()

    def train(self, mode: bool = True) -> TunedNetwork:
        """Set the mode, in which frozen parts have no share: their dropout would make prompts look robust."""
        super().train(mode)
        if not self.whole:
            self.net.eval()
            for module in self.net.modules():
                for name, child in module.named_children():
                    if name in ("lora_dropout", "adapter") or (isinstance(module, PromptedBlock) and name == "dropout"):
                        child.train(mode)
        return self

    def follow_classes(self, num_classes: int) -> None:
        """See `TimmNet.follow_classes`."""
        self.net.follow_classes(num_classes)

    # ---- passes ----

    @contextmanager
    def _placed(self) -> Iterator[None]:
        """Inside the block, prompts are where they act; computed once, whatever the batch."""
        blocks = [module for module in self.net.modules() if isinstance(module, PromptedBlock)]
        tokens = None if self.prompts is None else self.prompts()
        if tokens is not None:
            for block in blocks:
                block.tokens = None if block.layer is None else tokens[block.layer]
        try:
            yield
        finally:
            if tokens is not None:
                for block in blocks:
                    block.tokens = None

    def forward(self, image: Tensor) -> Tensor:
        with self._placed():
            return self.net(image)

    def forward_features(self, image: Tensor) -> Tensor:
        """Images in [0, 1] → timm's features."""
        with self._placed():
            return self.net.forward_features(image)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """timm's features → logits (N, K), or with `pre_logits` the vectors (N, D) before the last layer."""
        return self.net.forward_head(features, pre_logits=pre_logits)

    @property
    def stores(self) -> bool:
        """Whether training leaves a part of the work as it is, which `prefix` does and `suffix` goes on from."""
        return self.head_only or self.frozen_blocks > 0

    def prefix(self, image: Tensor) -> Tensor:
        """Images → what no training changes: tokens (N, n, D) after the frozen blocks, or vectors (N, D)."""
        if self.head_only:
            return self.forward_head(self.forward_features(image), pre_logits=True)
        found = self.net.network.forward_intermediates(
            self.net.prepare(image),
            indices=[self.frozen_blocks - 1],
            return_prefix_tokens=True,
            output_fmt="NLC",
            intermediates_only=True,
            stop_early=True,
        )[0]
        # timm gives patches and prefix tokens apart, and patches alone where a network has no others.
        return torch.cat([found[1], found[0]], dim=1) if isinstance(found, tuple) else found

    def suffix(self, stored: Tensor) -> Tensor:
        """What `prefix` gave → logits (N, K)."""
        vit = self.net.network
        if self.head_only:
            return vit.get_classifier()(stored)
        with self._placed():
            for block in vit.blocks[self.frozen_blocks :]:
                stored = block(stored)
        return vit.forward_head(vit.norm(stored))

    # ---- taking it away ----

    def folded(self) -> nn.Module:
        """A copy for deployment: prompts are constant tokens, linear changes of layers are merged; no neuron, no T."""
        network = copy.deepcopy(self).cpu().eval().requires_grad_(False)
        if network.prompts is not None:
            tokens = network.prompts()
            for module in network.net.modules():
                if isinstance(module, PromptedBlock) and module.layer is not None:
                    module.tokens = tokens[module.layer].clone()
        return _merged(network.net)


def _merged(module: nn.Module) -> nn.Module:
    """A module in which layers do themselves what a rule has added to them, as far as one layer can."""
    if isinstance(module, ScaledLayer):
        return module.merged()
    for name, child in module.named_children():
        setattr(module, name, _merged(child))
    if not hasattr(module, "get_base_layer"):  # of peft
        return module
    module.merge()  # type: ignore[operator]
    return module.get_base_layer()  # type: ignore[operator]


def blocks_of(net: TimmNet, argument: str = "network") -> nn.Sequential:
    """The blocks of a transformer; UserError for a network that has none to put prompts between."""
    from timm.models import VisionTransformer

    # Others call their blocks with more than the tokens, or mix a fixed number of them.
    if not isinstance(net.network, VisionTransformer):
        raise UserError(
            f"{argument}: expected a vision transformer of timm with blocks in a row, e.g. vit_small_patch14_dinov2; "
            f"got a {type(net.network).__name__}"
        )
    return net.network.blocks


def place_prompts(net: TimmNet, start: int, count: int, length: int, dropout: float) -> None:
    """Wrap the blocks of a transformer so that prompts come in before block `start` and leave after the last.

    Args:
        net: the network, changed in place.
        start: first block that gets prompts.
        count: blocks that get a set each; those behind them keep the prompts as they come.
        length: prompts in a set (L).
        dropout: of prompts, in training.
    """
    blocks = blocks_of(net)
    for i in range(start, len(blocks)):
        layer, last = (i - start if i < start + count else None), i == len(blocks) - 1
        if layer is not None or last:
            prefix = net.network.num_prefix_tokens
            blocks[i] = PromptedBlock(blocks[i], prefix, length, layer, i == start, last, dropout)
