"""What gradient engines are compared on, for the equality test and the benchmark; nothing else uses it.

The reference itself is `Unrolled`, which is also a row of the tables: autograd through the graph of the whole window,
as published implementations do it, with the networks as PyTorch has them.
"""

from __future__ import annotations

import torch
from torch import nn

from leanlight.ops.differentiable import find_augmentation
from lit_modules.at_bptt.engines import GradientEngine
from lit_modules.at_bptt.inner import BatchSampler, FlatNetwork, InnerOptimizer, InnerProblem, RealLoss, SyntheticData
from lit_modules.at_bptt.norms import twice_differentiable
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
        published: leave the network as PyTorch has it; else its norms have second derivatives of their own.
        soft: train on soft labels.
        warm_up: inner steps in front of the window.
        seed: of the network.
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
        published: bool = False,
        soft: bool = False,
        warm_up: int = 0,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        network: nn.Module = ConvNet(3, _CLASSES, width, 3, image_size=size, mean=0.0, std=1.0).to(device, dtype)
        network = network if published else twice_differentiable(network)
        optimizer = optimizer or InnerOptimizer()
        self.problem = InnerProblem(FlatNetwork(network), optimizer, find_augmentation("flip_rotate", "augment"))
        torch.manual_seed(0)
        images, labels = torch.randn(_CLASSES * _IPC, 3, size, size), torch.eye(_CLASSES).repeat_interleave(_IPC, 0)
        labels = torch.softmax(4 * labels + torch.randn(labels.shape), 1) if soft else labels
        self.data = SyntheticData(images.to(device, dtype), labels.to(device, dtype))
        image, label = torch.randn(real, 3, size, size).to(device, dtype), torch.arange(real).to(device) % _CLASSES
        self.outer_loss = RealLoss(self.problem.network, image, label, chunk)
        generator = torch.Generator().manual_seed(0)
        batches = BatchSampler(_CLASSES, _IPC).draw(warm_up + window, generator, torch.device(device))
        start = optimizer.start(self.problem.network.parameters())
        self.state = self.problem.trained(start, self.data, batches[:warm_up])
        self.batches = batches[warm_up:]

    def gradient(self, engine: GradientEngine) -> torch.Tensor:
        """The meta-gradient with respect to the images (n, 3, size, size)."""
        return engine.meta_gradient(
            self.problem, self.state, self.data, self.batches, self.outer_loss, learn_labels=False
        ).images
