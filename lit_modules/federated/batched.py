"""Local training of several clients at once: one network with weights of each client."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from leanlight.contracts import ImageBatch, UserError, isolated_rng, to_device
from leanlight.contracts.federated import State
from lit_modules.federated.local import LocalObjective, LocalTraining


class LinearStack:
    """A network whose linear layers have weights of each client; all else takes the clients' items as one batch.

    For networks with parameters in linear layers alone, whatever lies between: flattening, ReLUs, spiking neurons.
    Weights' gradients are products of a layer's inputs with its outputs' gradients. Plain descent adds these products
    to the weights, so that no gradient as large as all clients' weights is ever written and read again.

    Args:
        network: is copied.
        clients: K.
        items: of each client in a batch, N.
    """

    def __init__(self, network: nn.Module, clients: int, items: int) -> None:
        self.network = copy.deepcopy(network).train()
        self.layers = {
            name: _StackedLinear(layer, clients, items)
            for name, layer in self.network.named_modules()
            if type(layer) is nn.Linear
        }
        for name, layer in self.layers.items():
            self.network.set_submodule(name, layer)
        stacked = dict(self.network.named_parameters())
        #: The trainable ones, (K, ...) each.
        self.parameters = {name: stacked[name] for name, old in network.named_parameters() if old.requires_grad}
        for name in self.parameters:
            if name.rpartition(".")[0] not in self.layers:
                raise ValueError(f"{name} is of no linear layer")

    def __call__(self, image: Tensor) -> Tensor:
        """Logits (K·N, classes) of images (K·N, C, H, W), client by client."""
        for layer in self.layers.values():
            layer.calls.clear()
        return self.network(image)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of the loss of the last call, by parameter."""
        found = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        for name, into, out in self._products(loss):
            if f"{name}.weight" in found:
                found[f"{name}.weight"] += out.mT @ into
            if f"{name}.bias" in found:
                found[f"{name}.bias"] += out.sum(1)
        return list(found.values())

    @torch.no_grad()
    def descend(self, loss: Tensor, lr: float) -> None:
        """A step of plain SGD on the loss of the last call."""
        for name, into, out in self._products(loss):
            if f"{name}.weight" in self.parameters:
                self.parameters[f"{name}.weight"].baddbmm_(out.mT, into, alpha=-lr)
            if f"{name}.bias" in self.parameters:
                self.parameters[f"{name}.bias"].add_(out.sum(1), alpha=-lr)

    def _products(self, loss: Tensor) -> list[tuple[str, Tensor, Tensor]]:
        """Layer, inputs (K, M, in) and gradient of the outputs (K, M, out) of each call of a layer."""
        calls = [(name, layer, *call) for name, layer in self.layers.items() for call in layer.calls]
        gradients = torch.autograd.grad(loss, [out for *_, out in calls], allow_unused=True)
        # Under autocast they are shorter than the weights.
        return [
            (name, into.to(layer.weight.dtype), gradient.to(layer.weight.dtype))
            for (name, layer, into, _), gradient in zip(calls, gradients, strict=True)
            if gradient is not None
        ]


class _StackedLinear(nn.Module):
    """A linear layer with weights of each client, which remembers its calls: inputs and outputs.

    Args:
        layer: has the weights that all begin with.
        clients: K.
        items: of each client, N; inputs are (…·K·N, ..., in), where time may stand before the clients.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: nn.Linear, clients: int, items: int) -> None:
        super().__init__()
        self.shape, self.rows = (-1, clients, items), clients * items
        for name in ("weight", "bias"):
            value = getattr(layer, name)
            stacked = None if value is None else nn.Parameter(_repeat(value, clients), requires_grad=False)
            self.register_parameter(name, stacked)
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        by_client = x.unflatten(0, self.shape).transpose(0, 1) if len(x) > self.rows else x.unflatten(0, self.shape[1:])
        into = by_client.flatten(1, -2)  # (K, M, in)
        out = (
            into @ self.weight.mT if self.bias is None else torch.baddbmm(self.bias.unsqueeze(1), into, self.weight.mT)
        )
        if not out.requires_grad:  # before it there is nothing that trains
            out.requires_grad_()
        self.calls.append((into.detach(), out))
        by_client = out.view(*by_client.shape[:-1], -1)
        return by_client.transpose(0, 1).flatten(0, 2) if len(x) > self.rows else by_client.flatten(0, 1)


class VmapStack:
    """Any network without state and chance, by `torch.func.vmap` over stacked weights.

    Args:
        network: stays as it is.
        clients: K.
        items: of each client in a batch, N.
    """

    def __init__(self, network: nn.Module, clients: int, items: int) -> None:
        named = {name: value for name, value in network.named_parameters() if value.requires_grad}
        fixed = {name: value for name, value in network.state_dict().items() if name not in named}
        self.shape = clients, items
        #: The trainable ones, (K, ...) each.
        self.parameters = {name: nn.Parameter(_repeat(value, clients)) for name, value in named.items()}
        self._call = vmap(lambda own, image: functional_call(network, {**own, **fixed}, (image,)))

    def __call__(self, image: Tensor) -> Tensor:
        """Logits (K·N, classes) of images (K·N, C, H, W), client by client."""
        return self._call(self.parameters, image.unflatten(0, self.shape)).flatten(0, 1)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of the loss of the last call, by parameter."""
        return list(torch.autograd.grad(loss, list(self.parameters.values()), materialize_grads=True))

    @torch.no_grad()
    def descend(self, loss: Tensor, lr: float) -> None:
        """A step of plain SGD on the loss of the last call."""
        torch._foreach_add_(list(self.parameters.values()), self.gradients(loss), alpha=-lr)


Stack = type[LinearStack] | type[VmapStack]


def _repeat(value: Tensor, clients: int) -> Tensor:
    return value.detach().expand(clients, *value.shape).clone()


def find_stack(network: nn.Module, local: LocalTraining, image_shape: tuple[int, ...]) -> Stack:
    """What trains several clients of `network` at once: the faster one of those that give what each alone would.

    Args:
        network: of a client.
        local: how clients train.
        image_shape: (C, H, W).

    Raises:
        UserError: no batched computation does.
    """
    key = "clients_at_once"
    for child in network.modules():
        if isinstance(child, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            raise UserError(
                f"{key}: expected 1 for a network with {type(child).__name__}, which mixes images or draws at random"
            )
    if local.augment is not None:
        raise UserError(f"{key}: expected 1 with local.augment, which draws at random for each client")
    reason = "it draws at random, or keeps a state"
    for stack in (LinearStack, VmapStack):
        try:
            if _agrees(stack, network, image_shape):
                return stack
        except Exception as error:  # whatever a network of any make does with stacked weights
            reason = " ".join(str(error).split())[:200]
    raise UserError(f"{key}: expected 1 for {type(network).__name__}, of which several do not run as one: {reason}")


@torch.no_grad()
def _agrees(stack: Stack, network: nn.Module, image_shape: tuple[int, ...]) -> bool:
    """Whether two clients with weights of their own get, in each of two calls, the logits that each gets alone.

    In double precision, where no spike depends on the order of additions.
    """
    with isolated_rng():
        networks = [copy.deepcopy(network).to("cpu", torch.float64).train() for _ in range(2)]
        both = stack(networks[0], 2, 3)
        for name, value in both.parameters.items():
            value.add_(torch.randn_like(value), alpha=0.1)
            for client, part in zip(networks, value, strict=True):
                client.get_parameter(name).copy_(part)
        for image in torch.rand(2, 6, *image_shape, dtype=torch.float64):
            alone = torch.cat([client(part) for client, part in zip(networks, image.split(3), strict=True)])
            # The second call would show what the first one left behind.
            if not all(torch.allclose(both(image), alone) for _ in range(2)):
                return False
    return True


def train_clients(
    network: nn.Module,
    data: Sequence[ImageBatch],
    local: LocalTraining,
    lr: float,
    objective: LocalObjective,
    controls: Sequence[list[Tensor]],
    generators: Sequence[torch.Generator],
    works: Sequence[float],
    stack: Stack,
) -> tuple[list[tuple[int, int, Tensor]], list[State]]:
    """Train a copy of `network` for each client by plain SGD; return steps, images, mean loss, and state of each.

    The same as `train_client` for each alone, up to the rounding of batched products. Shorter batches are padded with
    items of weight 0, and clients with fewer steps stand still at the end.

    Args:
        network: with the received weights; they stay as they are.
        data: of each client, on the network's device.
        local: epochs and batch size.
        lr: η, of all.
        objective: what is added to the loss's gradient.
        controls: of each client, server's minus client's control variate by parameter; or empty lists.
        generators: on the CPU; make the order of each client's data.
        works: share of all steps after which each client stops, in (0, 1].
        stack: what `find_stack` found for it.
    """
    device, clients = data[0].image.device, len(data)
    network.train()
    stacked = stack(network, clients, local.batch_size)
    start = {name: network.get_parameter(name).detach() for name in stacked.parameters}
    gaps = [torch.stack(parts) for parts in zip(*controls, strict=True)] if controls[0] else []
    index, weight = _plan(data, local, generators, works)
    counts = weight.sum(2)
    shares = weight / counts.clamp(min=1).unsqueeze(2)
    images, labels = torch.cat([d.image for d in data]), torch.cat([d.label for d in data])
    terms = []
    # (clients * batch_size,) each, and (clients,)
    plan = (to_device(part, device) for part in (index.flatten(1), shares.flatten(1), counts))
    for chosen, share, count in zip(*plan, strict=True):
        term = F.cross_entropy(stacked(images[chosen]), labels[chosen], reduction="none")
        loss = (term * share).sum()  # `@` would be in half precision under autocast
        if type(objective) is LocalObjective:
            stacked.descend(loss, lr)
        else:
            _descend(objective, stacked, loss, lr * (count > 0), start, gaps)
        terms.append(term.detach())
    totals = (torch.stack(terms).view_as(weight) * to_device(weight, device)).sum((0, 2)) if terms else counts.sum(0)
    made = zip((counts > 0).sum(0).tolist(), counts.sum(0).tolist(), totals, strict=True)
    reports = [(steps, int(passes), total / max(passes, 1.0)) for steps, passes, total in made]
    return reports, [_state(network, stacked.parameters, client) for client in range(clients)]


@torch.no_grad()
def _descend(
    objective: LocalObjective,
    stacked: LinearStack | VmapStack,
    loss: Tensor,
    rates: Tensor,
    start: Mapping[str, Tensor],
    gaps: list[Tensor],
) -> None:
    """A step with the objective's own term. rates: (clients,), 0 for those that stand still."""
    parameters = list(stacked.parameters.values())
    for parameter, gradient in zip(parameters, stacked.gradients(loss), strict=True):
        parameter.grad = gradient.clone()  # of two parameters it can be one tensor, and is corrected in place
    objective.correct(
        parameters, [value.expand_as(p) for value, p in zip(start.values(), parameters, strict=True)], gaps
    )
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.addcmul_(parameter.grad, rates.view(-1, *[1] * (parameter.ndim - 1)), value=-1)
        parameter.grad = None


def _state(network: nn.Module, stacked: Mapping[str, Tensor], client: int) -> State:
    """A client's state: its own parameters, and what else the network has."""
    return {
        name: (stacked[name][client].detach() if name in stacked else value).clone()
        for name, value in network.state_dict().items()
    }


def _plan(
    data: Sequence[ImageBatch],
    local: LocalTraining,
    generators: Sequence[torch.Generator],
    works: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Positions (steps, clients, batch_size), among the images of all clients in a row, that each client takes in each
    step, and 1 where they count, else 0.

    Both on the CPU.
    """
    plans = [
        list(local.batches(len(part), generator, work))
        for part, generator, work in zip(data, generators, works, strict=True)
    ]
    shape = max(map(len, plans)), len(data), local.batch_size
    index, weight = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    first = 0
    for client, (part, batches) in enumerate(zip(data, plans, strict=True)):
        index[:, client] = first
        for number, batch in enumerate(batches):
            index[number, client, : len(batch)] = batch + first
            weight[number, client, : len(batch)] = 1.0
        first += len(part)
    return index, weight
