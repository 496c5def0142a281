"""Local training of one client, and what a local objective adds to its gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import ClientUpdate, ImageBatch, Measurement, UserError, to_device
from leanlight.contracts.federated import State
from leanlight.contracts.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from leanlight.ops.differentiable import find_augmentation
from lit_modules.federated.privacy import DPSGD, LossOf, poisson_draw, private_gradient

Tensors = list[Tensor]


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains in a round.

    Args:
        epochs: passes over its data (E); 5 in SFedCA's paper.
        batch_size: images a step (B), fewer in the last one of a pass; 128 in SFedCA's paper.
        augment: name of an augmentation, in `leanlight.ops.differentiable.ALL_AUGMENTATIONS`; none by default.
        privacy: what hides single images in the weights that a client sends; nothing by default.
    """

    epochs: NonNegativeInt = 5
    batch_size: PositiveInt = 128
    augment: str | None = None
    privacy: DPSGD | None = None

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise UserError(f"local.epochs: expected 0 or more, got {self.epochs}")
        if self.batch_size < 1:
            raise UserError(f"local.batch_size: expected at least 1, got {self.batch_size}")
        find_augmentation(self.augment, "local.augment")

    def batches(self, items: int, generator: torch.Generator, work: float = 1.0) -> Iterator[Tensor]:
        """Positions (up to `batch_size`,) of each local step: every pass in a new order.

        Of all steps the share `work` is made, at least one. With `privacy` each step takes what chance gives it.
        """
        total = self.epochs * -(-items // self.batch_size)
        steps = min(total, max(1, round(work * total)))
        if self.privacy is not None:
            return (poisson_draw(items, self.sampling_rate(items), generator) for _ in range(steps))
        passes = (torch.randperm(items, generator=generator).split(self.batch_size) for _ in range(self.epochs))
        return itertools.islice(itertools.chain.from_iterable(passes), steps)

    def sampling_rate(self, items: int) -> float:
        """Chance q of each of a client's images to be in a step, where `privacy` draws them."""
        return min(1.0, self.batch_size / items)


class LocalObjective:
    """Plain local training; subclasses add a term whose gradient they know in closed form."""

    #: Whether clients and server keep control variates between rounds.
    has_control = False

    def correct(self, parameters: Sequence[Tensor], start: Tensors, control: Tensors) -> None:
        """Add the gradient of the objective's own term to ``p.grad`` of `parameters`.

        Args:
            parameters: as they are now, with the loss's gradient.
            start: the same as they were received.
            control: server's minus client's control variate, or empty.
        """


@dataclass(frozen=True)
class FedProx(LocalObjective):
    """Stay near the received weights: ``loss + mu / 2 * |w - w_r|**2`` (Li et al. 2020, arXiv:1812.06127).

    Parameters only; buffers are free.

    Args:
        mu: weight μ of the proximal term, at least 0.
    """

    mu: NonNegativeFloat = 0.1

    def __post_init__(self) -> None:
        if self.mu < 0:
            raise UserError(f"objective.mu: expected a number of at least 0, got {self.mu}")

    def correct(self, parameters: Sequence[Tensor], start: Tensors, control: Tensors) -> None:
        torch._foreach_add_(_gradients(parameters), torch._foreach_sub(list(parameters), start), alpha=self.mu)


@dataclass(frozen=True)
class Scaffold(LocalObjective):
    """Correct client drift: step along ``g - c_k + c`` (Karimireddy et al. 2020, arXiv:1910.06378; option II).

    Afterwards ``c_k' = c_k - c + (w_r - w_k) / (K * lr)`` for K local steps, and the server's control moves by the sum
    of the changes over all clients N. The client's optimiser must be plain SGD.
    """

    has_control = True

    def correct(self, parameters: Sequence[Tensor], start: Tensors, control: Tensors) -> None:
        torch._foreach_add_(_gradients(parameters), control)


def _gradients(parameters: Sequence[Tensor]) -> Tensors:
    # A parameter outside of the loss's graph has no gradient yet.
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def is_plain_sgd(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step is ``p - lr * gradient``, with one lr for all parameters."""
    off = ("momentum", "weight_decay", "maximize")
    groups = optimizer.param_groups
    return isinstance(optimizer, torch.optim.SGD) and len(groups) == 1 and not any(groups[0][name] for name in off)


def cross_entropy(network: nn.Module, image: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of the network's logits."""
    return F.cross_entropy(network(image), label)


def train_client(
    network: nn.Module,
    data: ImageBatch,
    local: LocalTraining,
    optimizer: torch.optim.Optimizer,
    objective: LocalObjective,
    control: Tensors,
    generator: torch.Generator,
    work: float = 1.0,
    loss_of: LossOf = cross_entropy,
) -> tuple[int, int, Tensor]:
    """Train `network` in place; return local steps, images seen and the mean loss over them (a scalar tensor).

    Augmentation and dropout draw from the global random state.

    Args:
        network: starts with the received weights.
        data: all of the client's images, on the network's device.
        local: epochs, batch size and augmentation.
        optimizer: of the network's parameters.
        objective: what is added to the loss's gradient.
        control: server's minus client's control variate by parameter, or empty.
        generator: on the CPU; makes the order of the data.
        work: share of all steps after which it stops, in (0, 1].
        loss_of: loss of (network, image, label).
    """
    augment = find_augmentation(local.augment, "local.augment")
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    plain = is_plain_sgd(optimizer) and type(objective) is LocalObjective and local.privacy is None
    start = [] if plain else [parameter.detach().clone() for parameter in parameters]
    losses: list[Tensor] = []
    order = list(local.batches(len(data), generator, work))
    counts = [len(index) for index in order]
    network.train()
    private = None
    if local.privacy is not None:
        expected = local.sampling_rate(len(data)) * len(data)
        private = private_gradient(network, local.privacy, optimizer, loss_of, expected)
    # One copy for all steps: each would hold up a GPU.
    for index in to_device(torch.cat(order), data.image.device).split(counts) if order else ():
        image, label = data.image[index], data.label[index]
        image = augment(image, None) if augment and len(index) else image
        loss = private(image, label) if private else loss_of(network, image, label)
        if plain:
            _descend(loss, parameters, optimizer.param_groups[0]["lr"])
        else:
            if private is None:
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
            objective.correct(parameters, start, control)
            optimizer.step()
        losses.append(loss.detach())
    weights = to_device(torch.tensor(counts, dtype=torch.float32), data.image.device)
    mean = (torch.stack(losses) * weights).sum() / weights.sum().clamp(min=1) if losses else weights.sum()
    return len(losses), sum(counts), mean


@torch.no_grad()
def _descend(loss: Tensor, parameters: Sequence[Tensor], lr: float) -> None:
    """A step of plain SGD, bit for bit that of `torch.optim.SGD`.

    Neither ``p.grad`` nor the optimiser is needed for it, which are a third of the time of a small network's step.
    """
    gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    moved = [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    torch._foreach_add_(moved, [gradient for gradient in gradients if gradient is not None], alpha=-lr)


def make_update(
    client: int,
    items: int,
    trained: tuple[int, int, Tensor],
    start: Mapping[str, Tensor],
    state: State,
    extras: State,
    before: Measurement | None,
    after: Measurement | None,
) -> ClientUpdate:
    """What a client sends and reports after its training.

    Args:
        client: its id.
        items: size of its data.
        trained: steps, images and mean loss, as `train_client` returns them.
        start: the received parameters, by name.
        state: its parameters and buffers now.
        extras: what else it sends.
        before: measurement with the received weights, where it was asked for.
        after: measurement with its own weights, where it was asked for.
    """
    steps, passes, loss = trained
    # The largest of each: one operation for all tensors, and NaN where there is one.
    largest = torch._foreach_norm([loss, *filter(torch.is_floating_point, state.values())], math.inf)
    finite = torch.stack(largest).isfinite().all()
    moves = torch._foreach_sub([state[name] for name in start], [value.detach() for value in start.values()])
    distance = torch.stack(torch._foreach_norm(moves)).norm()
    # All that is to be known here in one row, so that a device is waited for once a client.
    mean_loss, moved, is_finite = torch.stack([loss, distance, finite.to(loss.dtype)]).tolist()
    traffic = sum(value.numel() * value.element_size() for value in [*state.values(), *extras.values()])
    return ClientUpdate(
        client=client,
        items=items,
        steps=steps,
        loss=mean_loss,
        passes=passes,
        state=state,
        distance=moved,
        extras=extras,
        before=before,
        after=after,
        received_bytes=traffic,
        sent_bytes=traffic,
        finite=bool(is_finite),
    )
