"""How strongly a network fires on given data: by layer and time step, and by class."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from leanlight.contracts import ImageBatch, Measurement, UserError, uncompiled

Reduce = Literal["mean", "sum"]


def firing_layers(network: nn.Module) -> list[str]:
    """Names of the layers whose activity is measured: spiking neurons, or ReLUs in a network without any."""
    names = [name for name, child in network.named_modules() if isinstance(child, BaseNode)]
    return names or [name for name, child in network.named_modules() if isinstance(child, nn.ReLU)]


def measure(
    network: nn.Module, data: ImageBatch, num_classes: int, batch_size: int = 1024, reduce: Reduce = "mean"
) -> Measurement:
    """Mean loss and activity of `network` on `data`, in evaluation mode and without gradients.

    Activity is ``r_l[t]``, the mean over samples and neurons of the layer's spikes at step t, in [0, 1]; of a ReLU the
    mean of its output, with one step. A class' rate is the mean over its samples, layers and steps; 0 where it is
    absent.

    Args:
        network: with spiking neurons, or ReLUs.
        data: on the network's device.
        num_classes: K.
        batch_size: samples at once; 1,024 in SFedCA's published code.
        reduce: of ``r_l[t]`` over batches: ``mean`` by size, or ``sum`` as in that code, which grows with their number.
    """
    layers = firing_layers(network)
    if not layers:
        raise UserError("network: expected spiking neurons or ReLUs to measure, got a network without")
    seen: dict[str, Tensor] = {}
    handles = [network.get_submodule(name).register_forward_hook(_record(seen, name)) for name in layers]
    was_training = network.training
    rates: list[Tensor] = []
    samples: list[Tensor] = []
    loss = torch.zeros((), device=data.image.device)
    try:
        with torch.no_grad(), uncompiled():
            network.eval()
            for image, label in zip(data.image.split(batch_size), data.label.split(batch_size), strict=True):
                seen.clear()
                loss += F.cross_entropy(network(image), label, reduction="sum")
                found = [seen[name] for name in layers]  # (T, N) each
                steps = max(len(rate) for rate in found)
                weight = len(image) / len(data) if reduce == "mean" else 1.0
                rates.append(torch.stack([rate.mean(1).expand(steps) for rate in found]) * weight)
                samples.append(torch.stack([rate.mean(0) for rate in found]).mean(0))
    finally:
        for handle in handles:
            handle.remove()
        network.train(was_training)
    of_class = torch.zeros(num_classes, device=loss.device).index_add_(0, data.label, torch.cat(samples))
    # `bincount` would wait for the device.
    counts = torch.zeros(num_classes, dtype=torch.int64, device=loss.device)
    counts.index_add_(0, data.label, torch.ones_like(data.label))
    of_layer = torch.stack(rates).sum(0)
    # In one piece, so that a device is waited for once.
    found_all = torch.cat([loss.view(1), of_layer.flatten(), of_class / counts.clamp(min=1)]).cpu()
    total, of_layer_flat, by_class = found_all.split([1, of_layer.numel(), num_classes])
    return Measurement(total.item() / len(data), of_layer_flat.view_as(of_layer).clone(), by_class.clone())


def _record(seen: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        activity = output if isinstance(module, BaseNode) else output.unsqueeze(0)
        seen[name] = activity.float().flatten(2).mean(2)  # over neurons, in full precision under autocast: (T, N)

    return hook
