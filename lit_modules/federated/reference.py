"""A round of FedAvg as a plain loop has it: for equality tests and the benchmark."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import derived_seed

Client = tuple[Tensor, Tensor]


def plain_round(
    network: nn.Module,
    clients: Sequence[Client],
    number: int,
    epochs: int,
    lr: float = 0.1,
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Over all clients: load the state, train, save the state; then the mean of states becomes the network's.

    Args:
        network: trained in place.
        clients: images (n, C, H, W) in [0, 1] and labels (n,) of each.
        number: of the round, from 0.
        epochs: local epochs E.
        lr: η of plain SGD.
        batch_size: B.
        seed: of the order of a client's data, which is that of `FederatedClassifier`, so that both can be compared.
    """
    worker = copy.deepcopy(network)
    states = []
    for client, (image, label) in enumerate(clients):
        worker.load_state_dict(network.state_dict())
        optimizer = torch.optim.SGD(worker.parameters(), lr=lr)
        order = torch.Generator().manual_seed(derived_seed(seed, "order", number, client))
        worker.train()
        for _ in range(epochs):
            for index in torch.randperm(len(label), generator=order).split(batch_size):
                loss = F.cross_entropy(worker(image[index]), label[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        states.append({name: value.clone() for name, value in worker.state_dict().items()})
    network.load_state_dict(
        {
            name: torch.stack([state[name] for state in states]).mean(0)
            if value.is_floating_point()
            else torch.stack([state[name] for state in states]).amax(0)
            for name, value in states[0].items()
        }
    )
