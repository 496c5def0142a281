"""Batch norms whose statistics are those of given weights, instead of what training passed through."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def measure_norms(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the statistics of all batch norms to their means over `batches`, all else as in evaluation (HeteroFL's static
    batch norm, Diao et al., ICLR 2021).

    `torch.optim.swa_utils.update_bn` would run the whole network as in training, scalers included.

    Args:
        network: changed in place; its mode is restored.
        batches: inputs (N, ...), each counting alike.
    """
    norms = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    if not norms:
        return
    momenta, was_training = [norm.momentum for norm in norms], network.training
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a mean over all batches
        norm.train()
    try:
        for batch in batches:
            network(batch)
    finally:
        network.train(was_training)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
