"""How often spiking neurons fire."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from callbacks.media import due, publish
from leanlight.contracts import Bars, Split, uncompiled
from leanlight.contracts.ranges import NonNegativeInt


class FiringRates:
    """Counts the spikes of every spikingjelly neuron (`BaseNode`) in `network` while it is attached.

    The counts stay on the device of the spikes.

    Args:
        network: attached to at once; `detach` ends it.
    """

    def __init__(self, network: nn.Module) -> None:
        self.spikes: dict[str, Tensor] = {}
        self.chances: dict[str, int] = {}
        nodes = [(name, child) for name, child in network.named_modules() if isinstance(child, BaseNode)]
        self._handles: list[RemovableHandle] = [node.register_forward_hook(self._hook(name)) for name, node in nodes]
        self._uncompiled = ExitStack()
        if nodes:
            self._uncompiled.enter_context(uncompiled())

    def _hook(self, name: str) -> Any:
        def count(node: nn.Module, inputs: Any, output: Tensor) -> None:
            total = output.detach().sum(dtype=torch.float32 if output.device.type == "mps" else torch.float64)
            self.spikes[name] = self.spikes[name] + total if name in self.spikes else total
            self.chances[name] = self.chances.get(name, 0) + output.numel()

        return count

    def detach(self) -> None:
        """Remove the hooks; the counts stay."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._uncompiled.close()


class SpikeStatistics(Callback):
    """Logs the firing rate of every spiking layer in validation and test, and draws it.

    ``<split>/firing_rate/<layer>`` is spikes per neuron, time step and image, in [0, 1] for binary spikes;
    ``<split>/firing_rate`` is the same over all neurons of the network. A layer is its path in the module. Hooks are
    there only during evaluation: training is not slowed. Networks without spikingjelly neurons are left alone. A bar
    chart goes to ``artifacts/media/<split>/firing_rate.png``.

    Args:
        every_n_epochs: draw after the validations of every n-th epoch and of the last; 0 draws none.
    """

    def __init__(self, every_n_epochs: NonNegativeInt = 1) -> None:
        self.every_n_epochs = every_n_epochs
        self._rates: FiringRates | None = None

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._rates = FiringRates(pl_module)

    def _end(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        rates, self._rates = self._rates, None
        if rates is None:
            return
        rates.detach()
        if not rates.spikes:
            return
        device = pl_module.device
        chances = torch.tensor([rates.chances[name] for name in rates.spikes], dtype=torch.float64, device=device)
        spikes = torch.stack([count.to(device, torch.float64) for count in rates.spikes.values()])
        if trainer.world_size > 1:
            spikes, chances = trainer.strategy.reduce(torch.stack([spikes, chances]), reduce_op="sum").unbind()
        layers = dict(zip(rates.spikes, (spikes / chances).tolist(), strict=True))
        logged = {f"{split}/firing_rate/{name}": rate for name, rate in layers.items()}
        logged[f"{split}/firing_rate"] = float(spikes.sum() / chances.sum())
        pl_module.log_dict(logged, sync_dist=True)
        if split == "test" or due(trainer, self.every_n_epochs):
            publish(trainer, pl_module, split, {"firing_rate": Bars(layers, "spikes per neuron and time step")})

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, "val")

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, "test")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._rates is not None:
            self._rates.detach()
            self._rates = None
