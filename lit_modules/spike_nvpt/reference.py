"""Visual prompt tuning as a plain loop has it: for equality tests and the benchmark."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import ImageBatch
from lit_modules.nn import TimmNet
from lit_modules.optim import parameter_groups
from lit_modules.spike_nvpt.module import TunedClassifier


class PlainVPT(nn.Module):
    """VPT written around a transformer of timm with a class token, without wrapped blocks or rules of tuning.

    Args:
        net: the pre-trained network with its last layer; it is frozen but for that one, in place.
        prompts: (K, L, D) values at the start: K is 1 for shallow prompts, the number of blocks for deep ones.
    """

    def __init__(self, net: TimmNet, prompts: Tensor) -> None:
        super().__init__()
        self.net, self.prompts = net.requires_grad_(False).eval(), nn.Parameter(prompts.detach().clone())
        net.network.head.requires_grad_(True)

    def forward(self, image: Tensor) -> Tensor:
        """Images (N, C, H, W) in [0, 1] → logits (N, K)."""
        vit = self.net.network
        x = vit.norm_pre(vit._pos_embed(vit.patch_embed(self.net.prepare(image))))
        length, behind = self.prompts.shape[1], 1
        for i, block in enumerate(vit.blocks):
            if i < len(self.prompts):
                prompts = self.prompts[i].expand(len(x), -1, -1)
                x = torch.cat([x[:, :1], prompts, x[:, behind:]], dim=1)
                behind = 1 + length
            x = block(x)
        return vit.head(vit.norm(x[:, 0]))


class BareTunedStep:
    """Forward, backward and optimiser step without Lightning, on a copy of a module's network.

    Args:
        module: whose network and optimiser are taken; it is left as it is.
    """

    def __init__(self, module: TunedClassifier) -> None:
        self.network = copy.deepcopy(module.network)
        options = {"weight_decay": module.prompt_weight_decay}
        if module.prompt_lr is not None:
            options["lr"] = module.prompt_lr
        self.optimizer = module.make_optimizer(parameter_groups(self.network, {"prompts": options}))

    def __call__(self, batch: ImageBatch) -> None:
        """One step on images in [0, 1]."""
        loss = F.cross_entropy(self.network(batch.image), batch.label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
