"""The training step of a judge without Lightning, for measurements."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from leanlight.contracts import TokenBatch
from lit_modules.falcon_eye.losses import token_loss

if TYPE_CHECKING:
    from lit_modules.falcon_eye.module import SafetyJudge


class BareJudgeStep:
    """Cross entropy of the answers, backward and optimiser, on a copy of a module's network.

    Args:
        module: whose network and optimiser are taken; it is left as it is.
    """

    def __init__(self, module: SafetyJudge) -> None:
        self.encoder, self.network = module.encoder, copy.deepcopy(module.network).train()
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        self.optimizer = module.make_optimizer(trained)

    def __call__(self, batch: TokenBatch) -> None:
        """One step."""
        labels = batch.labels
        assert labels is not None
        inputs = self.encoder.batch_inputs(batch)
        del inputs["labels"]  # else the model would compute its own loss, over all positions
        logits = self.network(**inputs, logits_to_keep=batch.learned, use_cache=False).logits
        loss, weight = token_loss(logits, labels, torch.ones_like(labels, dtype=torch.float32))
        self.optimizer.zero_grad()
        (loss / weight).backward()
        self.optimizer.step()
