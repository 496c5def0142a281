"""Local training of several clients at once, by `torch.func.vmap` over stacked weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from leanlight.contracts import ImageBatch, UserError, to_device
from leanlight.contracts.federated import State
from lit_modules.federated.local import LocalObjective, LocalTraining


def check_batchable(network: nn.Module, local: LocalTraining) -> None:
    """Raise UserError for what several clients at once cannot do."""
    key = "clients_at_once"
    for child in network.modules():
        if isinstance(child, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, BaseNode)):
            raise UserError(
                f"{key}: expected 1 for a network with {type(child).__name__}, which keeps a state or draws at random"
            )
    if local.augment is not None:
        raise UserError(f"{key}: expected 1 with local.augment, which draws at random for each client")


def train_clients(
    network: nn.Module,
    data: Sequence[ImageBatch],
    local: LocalTraining,
    lr: float,
    objective: LocalObjective,
    controls: Sequence[list[Tensor]],
    generators: Sequence[torch.Generator],
    works: Sequence[float],
) -> tuple[list[tuple[int, int, Tensor]], list[State]]:
    """Train a copy of `network` for each client by plain SGD; return steps, images, mean loss, and state of each.

    The same as `train_client` for each alone, up to the rounding of batched products. Shorter batches are padded with
    items of weight 0, and clients with fewer steps stand still at the end.

    Args:
        network: with the received weights; it stays as it is.
        data: of each client, on the network's device.
        local: epochs and batch size.
        lr: η, of all.
        objective: what is added to the loss's gradient.
        controls: of each client, server's minus client's control variate by parameter; or empty lists.
        generators: on the CPU; make the order of each client's data.
        works: share of all steps after which each client stops, in (0, 1].
    """
    device, clients = data[0].image.device, len(data)
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    fixed = {name: value for name, value in network.state_dict().items() if name not in names}
    start = [network.get_parameter(name).detach() for name in names]
    stacked = [value.expand(clients, *value.shape).clone() for value in start]
    gaps = [torch.stack(parts) for parts in zip(*controls, strict=True)] if controls[0] else []
    index, weight = _plan(data, local, generators, works)
    passes, steps = weight.sum((0, 2)).tolist(), (weight.sum(2) > 0).sum(0).tolist()
    longest = max(map(len, data))
    images = torch.stack([F.pad(d.image, (0, 0, 0, 0, 0, 0, 0, longest - len(d))) for d in data])
    labels = torch.stack([F.pad(d.label, (0, longest - len(d))) for d in data])

    def loss_of(parameters: list[Tensor], image: Tensor, label: Tensor, share: Tensor) -> Tensor:
        logits = functional_call(network, {**dict(zip(names, parameters, strict=True)), **fixed}, (image,))
        return (F.cross_entropy(logits, label, reduction="none") * share).sum()

    step = vmap(grad_and_value(loss_of))
    rows = torch.arange(clients, device=device).unsqueeze(1)
    totals = torch.zeros(clients, device=device)
    network.train()
    # (clients, batch_size) each
    for chosen, used in zip(to_device(index, device), to_device(weight, device), strict=True):
        counts = used.sum(1)
        share = used / counts.clamp(min=1).unsqueeze(1)
        gradients, losses = step(stacked, images[rows, chosen], labels[rows, chosen], share)
        if type(objective) is not LocalObjective:
            gradients = _corrected(objective, stacked, gradients, start, gaps)
        rate = lr * (counts > 0).to(images.dtype)
        for value, gradient in zip(stacked, gradients, strict=True):
            value.addcmul_(gradient, rate.view(-1, *[1] * (value.ndim - 1)), value=-1)
        totals += losses * counts
    reports = [
        (made, int(seen), total / max(seen, 1.0)) for made, seen, total in zip(steps, passes, totals, strict=True)
    ]
    trained = dict(zip(names, stacked, strict=True))
    states = [
        {name: (trained[name][k] if name in trained else value).clone() for name, value in network.state_dict().items()}
        for k in range(clients)
    ]
    return reports, states


def _corrected(
    objective: LocalObjective,
    stacked: Sequence[Tensor],
    gradients: Sequence[Tensor],
    start: Sequence[Tensor],
    gaps: list[Tensor],
) -> list[Tensor]:
    """Gradients with the objective's own term."""
    parameters = [nn.Parameter(value, requires_grad=False) for value in stacked]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    objective.correct(parameters, [value.expand_as(p) for value, p in zip(start, parameters, strict=True)], gaps)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _plan(
    data: Sequence[ImageBatch],
    local: LocalTraining,
    generators: Sequence[torch.Generator],
    works: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Positions (steps, clients, batch_size) that each client takes in each step, and 1 where they count, else 0.

    Both on the CPU.
    """
    plans = [
        list(local.batches(len(part), generator, work))
        for part, generator, work in zip(data, generators, works, strict=True)
    ]
    shape = max(map(len, plans)), len(data), local.batch_size
    index, weight = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    for client, batches in enumerate(plans):
        for number, batch in enumerate(batches):
            index[number, client, : len(batch)] = batch
            weight[number, client, : len(batch)] = 1.0
    return index, weight
