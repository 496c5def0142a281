"""DC and DSA: a set whose images give a network in training the gradients that real images give it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import UserError, derived_seed, to_device
from leanlight.contracts.ranges import PositiveFloat, PositiveInt, Share
from leanlight.ops.differentiable import dsa, siamese_dsa
from lit_modules.at_bptt.distillers import Distiller, OuterStep, Task, fresh_network
from lit_modules.at_bptt.inner import FlatNetwork, SyntheticData


def gradient_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Sum over layers and output nodes of 1 - cosine between two gradients (Zhao, Mopuri & Bilen 2021).

    Of weights (out, in, …) each row is an output node; biases and parameters of norms, of one axis, do not count.
    """
    distances = []
    for a, b in zip(synthetic, real, strict=True):
        if a.dim() > 1:
            a, b = a.flatten(1), b.flatten(1)
            norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
            distances.append((1 - (a * b).sum(1) / (norms + 1e-6)).sum())
    return torch.stack(distances).sum()


@dataclass
class GradientMatching(Distiller):
    """DC (Zhao, Mopuri & Bilen 2021), or DSA (Zhao & Bilen 2021) with `augment`: match gradients class by class.

    A fresh network serves `outer_loop` outer steps. After each but the last it trains on the set as that is by then.

    Args:
        outer_loop: outer steps of one network; 1, 10, 50 for 1, 10, 50 images a class in the paper.
        inner_loop: epochs on the set after an outer step; 1, 50, 10 in the paper.
        lr: learning rate of the network, by SGD.
        momentum: of that SGD.
        batch_size: images of the set in a step of the network.
        augment: transform the real and the synthetic images of a class alike, and those that the network trains on.
    """

    outer_loop: PositiveInt = 10
    inner_loop: PositiveInt = 50
    lr: PositiveFloat = 0.01
    momentum: Share = 0.5
    batch_size: PositiveInt = 256
    augment: bool = False

    def __post_init__(self) -> None:
        self._task: Task | None = None
        self._seed, self._networks = 0, 0  # of this epoch, and how many it has made
        self._step = 0  # outer steps of the present network
        self._network: nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._saved: Mapping[str, Any] | None = None  # of a network that a checkpoint holds, until it is used

    def prepare(self, task: Task) -> None:
        if task.learn_labels:
            raise UserError("learn_labels: gradient matching has no gradient for labels; use false")
        FlatNetwork(fresh_network(task.network, 0, torch.device("cpu")))  # refuses batch norm
        self._task, self._step, self._saved = task, 0, None
        self._network = self._optimizer = None

    def start_epoch(self, data: SyntheticData, seed: int) -> None:
        self._seed, self._networks = seed, 0

    @property
    def choice(self) -> Any:
        """With the epoch's seed all processes make the same networks, and train them alike on the same set."""
        return {"seed": self._seed, "networks": self._networks}

    @choice.setter
    def choice(self, value: Any) -> None:
        self._seed, self._networks = value["seed"], value["networks"]

    def outer_step(self, data: SyntheticData, image: Tensor, label: Tensor, seed: int) -> OuterStep:
        assert self._task is not None
        network, classes = self._present(image.device), self._task.num_classes
        counts = F.one_hot(label, classes).sum(0).tolist()  # sizes, which the host has to know
        real, synthetic = (
            image[label.argsort(stable=True)].split(counts),
            data.images.detach().unflatten(0, (classes, -1)),
        )
        gradients, loss = torch.zeros_like(synthetic), image.new_zeros(())
        # Class after class: each has its own number of real images, and a class's graph is gone before the next one's.
        for number, count in enumerate(counts):
            if not count:
                continue  # a class that this batch lacks has no gradient to match
            leaf = synthetic[number].clone().requires_grad_()
            shown = [real[number], leaf]
            if self.augment:
                alike = derived_seed(seed, "augment", number)
                shown = [siamese_dsa(x, torch.Generator().manual_seed(alike)) for x in shown]
            target = self._gradient(network, shown[0], number)
            distance = gradient_distance(self._gradient(network, shown[1], number, create_graph=True), target)
            (gradients[number],) = torch.autograd.grad(distance, leaf)
            loss += distance.detach()
        return OuterStep(gradients.flatten(0, 1), None, loss, image.new_zeros(()))

    def _gradient(
        self, network: nn.Module, images: Tensor, number: int, create_graph: bool = False
    ) -> tuple[Tensor, ...]:
        """Of the cross entropy of images of one class, with respect to the network."""
        label = torch.full((len(images),), number, device=images.device)
        loss = F.cross_entropy(network(images), label)
        return torch.autograd.grad(loss, list(network.parameters()), create_graph=create_graph)

    def _present(self, device: torch.device) -> nn.Module:
        """The network in training: that of the checkpoint, or of the last step, or a fresh one."""
        if self._network is None:
            assert self._task is not None
            seed = derived_seed(self._seed, "network", self._networks)
            self._network = fresh_network(self._task.network, seed, device).train()
            self._optimizer = torch.optim.SGD(self._network.parameters(), self.lr, self.momentum)
            if self._saved is not None:
                self._network.load_state_dict(self._saved["network"])
                self._optimizer.load_state_dict(self._saved["optimizer"])
                self._saved = None
        return self._network

    def updated(self, data: SyntheticData, own: Tensor | None) -> None:
        """Train the network on the set as it is now, or give it up after its last outer step."""
        self._step += 1
        if self._step == self.outer_loop:
            self._network = self._optimizer = None
            self._step, self._networks = 0, self._networks + 1
            return
        network, optimizer = self._present(data.images.device), self._optimizer
        assert optimizer is not None
        generator = torch.Generator().manual_seed(derived_seed(self._seed, "train", self._networks, self._step))
        with torch.enable_grad():
            for _ in range(self.inner_loop):
                for index in torch.randperm(len(data.images), generator=generator).split(self.batch_size):
                    index = to_device(index, data.images.device)
                    images = data.images[index]
                    logits = network(dsa(images, generator) if self.augment else images)
                    optimizer.zero_grad(set_to_none=True)
                    F.cross_entropy(logits, data.labels[index]).backward()
                    optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        saved: Mapping[str, Any] | None = self._saved
        if self._network is not None and self._optimizer is not None:
            saved = {"network": self._network.state_dict(), "optimizer": self._optimizer.state_dict()}
        return {"step": self._step, "present": saved}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step, self._saved, self._network, self._optimizer = state["step"], state["present"], None, None
