"""The classifier's training step as a plain loop has it: for equality tests and the benchmark."""

from __future__ import annotations

import copy

import torch.nn.functional as F

from leanlight.contracts import ImageBatch
from lit_modules.classifier.module import ImageClassifier


class BareClassifierStep:
    """Forward, backward and optimiser step without Lightning, on a copy of a module's network.

    Args:
        module: whose network and optimiser are taken; it is left as it is.
    """

    def __init__(self, module: ImageClassifier) -> None:
        self.network = copy.deepcopy(module.network)
        self.optimizer = module.make_optimizer(self.network.parameters())

    def __call__(self, batch: ImageBatch) -> None:
        """One step on images in [0, 1]."""
        loss = F.cross_entropy(self.network(batch.image), batch.label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
