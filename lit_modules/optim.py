"""One way to set up an optimiser and its schedule for every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from leanlight.contracts import UserError

Interval = Literal["epoch", "step"]


def configure(
    parameters: Any,
    optimizer: Callable[[Any], torch.optim.Optimizer],
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    interval: Interval = "epoch",
) -> Any:
    """What a LightningModule's ``configure_optimizers`` returns.

    Args:
        parameters: tensors, or groups of them as torch's optimisers take them.
        optimizer: makes the optimiser from them.
        scheduler: makes the schedule from the optimiser; one on a plateau names its metric itself (``monitor``).
        interval: what a step of the schedule follows.
    """
    made = optimizer(parameters)
    return made if scheduler is None else {"optimizer": made, "lr_scheduler": schedule(scheduler(made), interval)}


def parameter_groups(network: nn.Module, apart: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The parameters of `network` that train, as groups for an optimiser.

    Args:
        network: whose parameters.
        apart: name of a child → options of the group of its parameters, such as lr; the rest are the last group.
    """
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    groups = []
    for child, options in apart.items():
        names = [name for name in trained if name.startswith(f"{child}.")]
        groups.append({"params": [trained.pop(name) for name in names], **options})
    return [group for group in (*groups, {"params": list(trained.values())}) if group["params"]]


def optimizer_of(configured: Any) -> torch.optim.Optimizer:
    """The optimiser in what `configure` returns."""
    return configured["optimizer"] if isinstance(configured, dict) else configured


def schedule(made: Any, interval: Interval = "epoch") -> dict[str, Any]:
    """A schedule as Lightning wants to be told of it. Raises UserError for one on a plateau of no metric."""
    config: dict[str, Any] = {"scheduler": made, "interval": interval}
    if isinstance(made, ReduceLROnPlateau):
        if not hasattr(made, "monitor"):  # PyTorch's own class is told the metric at each step, Lightning's once
            raise UserError(
                "lr_scheduler: expected lightning.pytorch.cli.ReduceLROnPlateau with a monitor, got PyTorch's class, "
                "which names no metric"
            )
        config["monitor"] = made.monitor
    return config
