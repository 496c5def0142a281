"""Train many fresh networks as one batch: each the one that it would be alone, up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from leanlight.contracts import NetworkFactory, isolated_rng, to_device
from leanlight.ops.differentiable import augment_each, find_augmentation
from lit_modules.at_bptt.inner import FlatNetwork, StackedNetworks
from lit_modules.classifier.training import LabelledImages, Order, Recipe, Shuffled


@dataclass(frozen=True)
class Course:
    """How networks train, and when they are measured.

    Args:
        recipe: how they train.
        epochs: numbers of epochs to copy them after, ascending.
        order: what an epoch goes through: all images by default, or one mini-batch, so that an epoch is a step.
    """

    recipe: Recipe
    epochs: Sequence[int]
    order: Order | None = None


def can_stack(factory: NetworkFactory) -> bool:
    """Whether networks of a factory can train as one batch: without batch norm, dropout and compiled code."""
    with isolated_rng(0):
        modules = list(factory().modules())
    compiled = any(module._compiled_call_impl is not None for module in modules)
    return not compiled and not any(isinstance(module, (_BatchNorm, _DropoutNd)) for module in modules)


def train_together(
    data: Sequence[LabelledImages], factory: NetworkFactory, course: Course, seeds: Sequence[int]
) -> list[list[nn.Module]]:
    """Of each network its copies after so many epochs, in evaluation mode; leaves random states alone.

    Args:
        data: what each network trains on: images (n, C, H, W), float, and labels, (n,) or (n, K). All are equally
            large, on one device; networks may share a set.
        factory: makes a network that `can_stack`.
        course: how it trains, in an order of its own, and when it is copied.
        seeds: one a network: of its initialisation and of all that its training draws.
    """
    device, recipe, order = data[0][0].device, course.recipe, course.order or Shuffled(len(data[0][0]))
    augment = find_augmentation(recipe.augment, "recipe.augment")
    copies: list[list[nn.Module]] = [[] for _ in seeds]
    # Callers are validation hooks, where Lightning has gradients and version counting off.
    with torch.inference_mode(False), torch.enable_grad():
        made = [_fresh(factory, seed) for seed in seeds]
        modules, generators = [network.to(device) for network, _ in made], [generator for _, generator in made]
        images, labels, first = _pool(data)
        networks = StackedNetworks([FlatNetwork(module) for module in modules])
        theta = nn.Parameter(networks.parameters())
        # All of the recipe's optimisers work element by element, so that one matrix is as good as many networks.
        optimizer = recipe.make_optimizer(nn.ParameterList([theta]))
        scheduler = recipe.make_scheduler(optimizer, batches=-(-order.size // recipe.batch_size))
        for epoch in range(1, recipe.epochs + 1):
            positions = torch.stack([order.positions(generator) for generator in generators])
            for index in (to_device(positions, device) + first).split(recipe.batch_size, 1):
                image, label = images[index], labels[index].flatten(0, 1)
                logits = networks(theta, augment_each(augment, image, generators) if augment else image)
                # Each network's mean over its batch; the sum of losses that share nothing has the gradients of all.
                loss = F.cross_entropy(
                    logits.flatten(0, 1), label, label_smoothing=recipe.label_smoothing, reduction="sum"
                )
                optimizer.zero_grad(set_to_none=True)
                (loss / index.shape[1]).backward()
                optimizer.step()
                scheduler.step()
            if epoch in course.epochs:
                for own, module, row in zip(copies, modules, theta.detach(), strict=True):
                    own.append(_with_parameters(module, row))
    return copies


@torch.no_grad()
def _with_parameters(network: nn.Module, theta: Tensor) -> nn.Module:
    """A copy of a network, in evaluation mode, with the parameters theta (P,)."""
    made = copy.deepcopy(network).eval()
    pieces = theta.split([value.numel() for value in made.parameters()])
    for parameter, piece in zip(made.parameters(), pieces, strict=True):
        parameter.copy_(piece.view_as(parameter))
    return made


def _fresh(factory: NetworkFactory, seed: int) -> tuple[nn.Module, torch.Generator]:
    """A network, and a generator that goes on where its initialisation left the random state."""
    with isolated_rng(seed):
        network = factory()
        return network, torch.Generator().set_state(torch.get_rng_state())


def _pool(data: Sequence[LabelledImages]) -> tuple[Tensor, Tensor, Tensor]:
    """The images and labels of all sets, each of them once, and where that of each network begins (S, 1)."""
    places: dict[int, int] = {}
    sets: list[LabelledImages] = []
    first = []
    for images, labels in data:
        if id(images) not in places:
            places[id(images)] = len(sets) * len(images)
            sets.append((images.detach(), labels.detach()))
        first.append(places[id(images)])
    start = torch.tensor(first).unsqueeze(1).to(data[0][0].device)
    return torch.cat([images for images, _ in sets]), torch.cat([labels for _, labels in sets]), start
