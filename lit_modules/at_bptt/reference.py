"""What gradient engines are compared on, for the equality test and the benchmark; nothing else uses it.

The reference itself is `Unrolled`, which is also a row of the tables: autograd through the graph of the whole window,
as published implementations do it.
"""

from __future__ import annotations

import torch

from leanlight.ops.differentiable import find_augmentation
from lit_modules.at_bptt.engines import GradientEngine
from lit_modules.at_bptt.inner import BatchSampler, FlatNetwork, InnerOptimizer, InnerProblem, RealLoss, SyntheticData
from lit_modules.nn import ConvNet

_CLASSES, _IPC = 10, 10


class ReferenceWindow:
    """One window of inner training of a ConvNet-3 on random images, and its outer loss on random real ones.

    Args:
        width: of the network.
        size: side of the images, pixels.
        real: real images of the outer loss.
        window: inner steps.
        device: to work on.
        dtype: of everything.
        optimizer: of the inner steps; Adam by default. With it float32 is a poor judge of engines: it divides
            gradients that are zero but for rounding (biases before a norm) by their own size.
        chunk: real images at a time in the outer loss, all by default.
    """

    def __init__(
        self,
        width: int,
        size: int,
        real: int,
        window: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        optimizer: InnerOptimizer | None = None,
        chunk: int | None = None,
    ) -> None:
        self.chunk = chunk
        torch.manual_seed(0)
        network = ConvNet(3, _CLASSES, width, 3, image_size=size, mean=0.0, std=1.0).to(device, dtype)
        optimizer = optimizer or InnerOptimizer()
        self.problem = InnerProblem(FlatNetwork(network), optimizer, find_augmentation("flip_rotate", "augment"))
        self.state = optimizer.start(self.problem.network.parameters())
        images = torch.randn(_CLASSES * _IPC, 3, size, size).to(device, dtype)
        self.data = SyntheticData(images, torch.eye(_CLASSES).repeat_interleave(_IPC, 0).to(device, dtype))
        self.image, self.label = (
            torch.randn(real, 3, size, size).to(device, dtype),
            torch.arange(real).to(device) % _CLASSES,
        )
        sampler = BatchSampler(_CLASSES, _IPC)
        self.batches = sampler.draw(window, torch.Generator().manual_seed(0), torch.device(device))

    def gradient(self, engine: GradientEngine) -> torch.Tensor:
        """The meta-gradient with respect to the images (n, 3, size, size)."""
        outer_loss = RealLoss(self.problem.network, self.image, self.label, self.chunk)
        result = engine.meta_gradient(self.problem, self.state, self.data, self.batches, outer_loss, False)
        return result.images
