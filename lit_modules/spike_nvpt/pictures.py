"""Pictures of prompts and of what they do to attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import Heatmap, ImageGrid, MediaItem
from lit_modules.classifier.pictures import drawable
from lit_modules.history import History
from lit_modules.spike_nvpt.prompts import Prompts
from lit_modules.spike_nvpt.vit import PromptedBlock, TunedNetwork

SHOWN = 8  # images whose attention is drawn
_SIDE = 112  # pixels of a tile at least, so that its caption fits


@torch.no_grad()
def of_prompts(prompts: Prompts | None, history: History) -> dict[str, MediaItem]:
    """Tokens, one a row, layer below layer; over training the share of ones among bits, and how many changed.

    Args:
        prompts: None where the rule of tuning has none.
        history: ``epoch``, and of bits ``density``, ``density_<layer>`` and ``flips``.
    """
    if prompts is None:
        return {}
    layers, length, width = prompts.shape
    tokens = prompts().detach().float().cpu().reshape(layers * length, width)
    where = f"prompt, {length} a layer, first layer on top" if layers > 1 else "prompt"
    lines = {"all layers" if layers > 1 else "bits": "density"}
    if layers > 1:
        lines |= {"first layer": "density_0", "last layer": f"density_{layers - 1}"}
    curves = {
        "density": history.curve("epoch", lines, "epoch", "share of ones among bits"),
        "flips": history.curve("epoch", {"bits": "flips"}, "epoch", "bits that changed"),
    }
    drawn = {name: curve for name, curve in curves.items() if curve is not None}
    return {"prompts": Heatmap(tokens, "element of the token", where), **drawn}


@torch.no_grad()
def of_attention(network: TunedNetwork, image: Tensor) -> dict[str, MediaItem]:
    """Images, and where the class token looks in the last block: without prompts, then with them.

    A map is the mean over heads of the attention to patches, a share a. It is drawn as a M / (1 + a M), M the number of
    patches: grey where all get the same, which division by the largest would draw as white. Captions give the share of
    all attention that prompts get. Nothing for a network without a class token, or of another kind of attention.

    Args:
        network: tuned; left as it was.
        image: (N, C, H, W) in [0, 1] on its device.
    """
    attention: Any = network.net.network.blocks[-1]
    attention = getattr(attention.block if isinstance(attention, PromptedBlock) else attention, "attn", None)
    if network.net.network.cls_token is None or not isinstance(getattr(attention, "num_heads", None), int):
        return {}
    ways = {"attention": False} if network.prompts is None else {"without prompts": True, "with prompts": False}
    size = [side * -(-_SIDE // min(image.shape[2:])) for side in image.shape[2:]]
    rows, captions = [F.interpolate(drawable(image), size, mode="nearest")], [""] * len(image)
    for name, without in ways.items():
        with _without_prompts(network) if without else nullcontext():
            maps, on_prompts = _class_attention(network, attention, image)
        even = maps / maps.mean((1, 2), keepdim=True)
        shown = F.interpolate((even / (1 + even))[:, None], size, mode="nearest")
        rows.append(shown.expand(-1, rows[0].shape[1], -1, -1))
        some = network.prompts is not None and not without
        captions += [f"{name}, which get {share:.0%}" if some else name for share in on_prompts]
    return {"attention": ImageGrid(torch.cat(rows), len(image), captions)}


def _class_attention(network: TunedNetwork, attention: Any, image: Tensor) -> tuple[Tensor, list[float]]:
    """How the class token attends in a layer `attention`: to patches (N, h, w), and to prompts in sum (N values)."""
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    training = network.training
    try:
        network.eval().forward_features(image)
    finally:
        handle.remove()
        network.train(training)
    # As timm computes it; its fused kernel gives no weights.
    items, count, _ = seen[0].shape
    qkv = attention.qkv(seen[0]).reshape(items, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(qkv[0]), attention.k_norm(qkv[1])
    weights = ((query[:, :, :1] * attention.scale) @ key.transpose(-2, -1)).softmax(-1)[:, :, 0].mean(1).float().cpu()
    vit = network.net.network
    height, width = vit.patch_embed.grid_size
    prompts = weights[:, vit.num_prefix_tokens : count - height * width]
    return weights[:, count - height * width :].reshape(items, height, width), prompts.sum(1).tolist()


@contextmanager
def _without_prompts(network: TunedNetwork) -> Iterator[None]:
    """Inside the block, the transformer is the one that was given."""
    vit = network.net.network
    prompted = vit.blocks
    vit.blocks = nn.Sequential(*(x.block if isinstance(x, PromptedBlock) else x for x in prompted))
    try:
        yield
    finally:
        vit.blocks = prompted
