"""Count the operations of an inference and estimate its energy at 45 nm.

A layer whose input is real-valued multiplies and accumulates: one MAC for every weight use, padding included. A layer
whose input is binary only adds: one AC for every spike and every weight it meets. A MAC costs 4.6 pJ and an AC 0.9 pJ
(32-bit float, 45 nm; M. Horowitz, "Computing's energy problem", ISSCC 2014), the figures that papers on spiking
networks use. Convolutions, linear layers and matrix products count, and the two products of an attention that is one
kernel as real-valued ones; norms (folded into weights at deployment), neurons, pooling and memory traffic do not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from spikingjelly.activation_based.neuron import BaseNode
from spikingjelly.activation_based.op_counter import MACCounter, SynOpCounter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from callbacks.common import inputs_of, items_in, writes_files
from callbacks.pictures import render
from leanlight.contracts import HasVariants, Table, uncompiled
from leanlight.contracts.ranges import NonNegativeInt

MAC_PJ = 4.6
AC_PJ = 0.9
#: Attention as one kernel, of each processor. Written out, it is matrix products, which have rules of their own.
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
)


@dataclass(frozen=True)
class LayerOps:
    """Operations of one layer for one input, all time steps together.

    Args:
        name: path of the layer in the network.
        macs: multiplications with accumulation, a mean over inputs.
        acs: accumulations, a mean over inputs.
    """

    name: str
    macs: float
    acs: float

    @property
    def energy_pj(self) -> float:
        """Energy in picojoules."""
        return self.macs * MAC_PJ + self.acs * AC_PJ


def count_operations(network: nn.Module, batch: Tensor, first_layer_repeats: bool = False) -> list[LayerOps]:
    """Run a network on a batch and return the operations of each layer for one input, in order of execution.

    What the network really executes is counted. A network with direct encoding (the same image at every time step) may
    compute what precedes its first neuron once; `first_layer_repeats` counts these layers once for every time step
    instead, as hardware without a cache for them would compute. A layer that receives firing rates instead of spikes
    (a readout after the mean over time) has a real-valued input and counts MACs.

    Args:
        network: in the mode in which it is to be measured.
        batch: its input (N, ...).
        first_layer_repeats: whether layers before the first neuron count at every time step.
    """
    counter = OperationCounter(network, first_layer_repeats)
    with torch.no_grad(), counter:
        network(batch)
    return counter.layers(len(batch))


class OperationCounter(AbstractContextManager["OperationCounter"]):
    """Counts the operations of everything that `network` executes inside the ``with`` block.

    The rules, which look at each matrix product and convolution that PyTorch dispatches, are spikingjelly's: its
    `MACCounter` and `SynOpCounter` agree that an input is either binary or real-valued, and the latter knows which
    weights a spike at the border meets. Its `DispatchCounterMode` does not serve for the table by layer: it names
    layers by the class of the module called first, so that two networks of a class fall together.

    Args:
        network: whose layers are told apart; operations of others count under an empty name.
        first_layer_repeats: see `count_operations`.
    """

    def __init__(self, network: nn.Module, first_layer_repeats: bool = False) -> None:
        self.network = network
        self.first_layer_repeats = first_layer_repeats
        self.counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        synops = SynOpCounter().rules
        self._rules: dict[Any, tuple[Any, Any]] = dict.fromkeys(_ATTENTION, (_attention_macs, lambda *_: 0))
        self._rules |= {op: (rule, synops[op]) for op, rule in MACCounter().rules.items() if op in synops}
        self._inside: list[str] = []
        self._before_neuron: list[tuple[str, int, int]] = []
        self._first_neuron: nn.Module | None = None
        self._time_steps = self._batch = 0
        self._handles: list[RemovableHandle] = []
        self._uncompiled = ExitStack()
        self._mode = _Dispatch(self)

    def layers(self, inputs: int) -> list[LayerOps]:
        """The counts so far for one of `inputs` inputs."""
        return [LayerOps(name, macs / inputs, acs / inputs) for name, (macs, acs) in self.counts.items()]

    def __enter__(self) -> OperationCounter:
        self._uncompiled.enter_context(uncompiled())
        for name, child in self.network.named_modules():
            self._handles.append(child.register_forward_pre_hook(self._entering(name), prepend=True))
            self._handles.append(child.register_forward_hook(self._leaving, always_call=True))
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._uncompiled.close()

    def record(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Count one operation that PyTorch has dispatched: its arguments and its result."""
        if op not in self._rules:
            return
        macs, acs = (int(rule(args, kwargs, out)) for rule in self._rules[op])
        name = self._inside[-1] if self._inside else ""
        self.counts[name][0] += macs
        self.counts[name][1] += acs
        if self._first_neuron is None and macs:
            result = out[0] if isinstance(out, tuple) else out
            self._before_neuron.append((name, macs, len(result)))  # of it: N, or N times the steps folded into it

    # -- where we are, told by hooks

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not self._inside:  # a pass begins
                self._first_neuron, self._time_steps, self._before_neuron = None, 0, []
            self._inside.append(name)
            # The first neuron tells the number of time steps: of one call in multi-step mode, else by its calls.
            if isinstance(module, BaseNode) and self._first_neuron in (None, module):
                self._first_neuron = module
                self._time_steps += len(inputs[0]) if module.step_mode == "m" else 1
                self._batch = inputs[0].shape[1 if module.step_mode == "m" else 0]

        return hook

    def _leaving(self, *_: Any) -> None:
        self._inside.pop()
        if self._inside or not self._time_steps or not self.first_layer_repeats:
            return
        for name, macs, rows in self._before_neuron:
            done = max(1, rows // self._batch)  # time steps this layer did compute
            self.counts[name][0] += macs * (self._time_steps // done - 1)


def _attention_macs(args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Scores and their products with the values: query (…, n, E), key (…, m, E), value (…, m, E′)."""
    query, key, value = args[:3]
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


class _Dispatch(TorchDispatchMode):
    """Shows every operation to the counter."""

    def __init__(self, counter: OperationCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._counter._rules:
            with self:  # without gradients, composite operations arrive whole
                parts = func.decompose(*args, **kwargs)
                if parts is not NotImplemented:
                    return parts
        out = func(*args, **kwargs)
        self._counter.record(func, args, kwargs, out)
        return out


class EnergyMeter(Callback):
    """Logs operations and energy of an inference, measured on the first test batches.

    ``test/energy_pj``, ``test/macs`` and ``test/acs`` are means for one input over everything that `test_step`
    executes; ``artifacts/energy.csv`` has them by layer, and so has W&B. Where an item of a batch stands for several
    inputs, as an episode does for its decisions, `test_step` returns a mapping with their number as ``inputs``. For a
    module that stands for several networks (`HasVariants`) these are measured one by one on the images of the batches:
    ``test/energy_pj_<name>`` and so on, ``artifacts/energy_<name>.csv``.

    Args:
        batches: number of test batches to measure; 0 for none.
        first_layer_repeats: count layers before the first neuron at every time step, though they are computed once.
    """

    def __init__(self, batches: NonNegativeInt = 2, first_layer_repeats: bool = False) -> None:
        self.batches = batches
        self.first_layer_repeats = first_layer_repeats
        self._counter: OperationCounter | None = None
        self._variants: dict[str, OperationCounter] = {}
        self._running = False
        self._inputs = 0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counter, self._variants, self._inputs = None, {}, 0
        if isinstance(pl_module, HasVariants):
            repeats = self.first_layer_repeats
            self._variants = {
                name: OperationCounter(network, repeats) for name, network in pl_module.variants().items()
            }
        else:
            self._counter = OperationCounter(pl_module, self.first_layer_repeats)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx >= self.batches:
            return
        if self._counter is not None:
            self._counter.__enter__()
            self._running = True
        for counter in self._variants.values():
            with counter:
                counter.network.eval()(batch.image)
        self._inputs += items_in(batch) if self._variants else 0

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._stop():
            self._inputs += inputs_of(outputs, batch)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counters = {"": self._counter} if self._counter is not None else self._variants
        for name, counter in counters.items():
            layers = counter.layers(self._inputs) if self._inputs else []
            if not layers:
                continue
            total = LayerOps("total", sum(layer.macs for layer in layers), sum(layer.acs for layer in layers))
            end = f"_{name}" if name else ""
            values = {
                f"test/energy_pj{end}": total.energy_pj,
                f"test/macs{end}": total.macs,
                f"test/acs{end}": total.acs,
            }
            pl_module.log_dict(values, sync_dist=True)
            if writes_files(trainer):
                self._publish(trainer, [*layers, total], f"energy{end}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> bool:
        running, self._running = self._running, False
        if running and self._counter is not None:
            self._counter.__exit__(None, None, None)
        return running

    def _publish(self, trainer: Trainer, layers: Sequence[LayerOps], file: str) -> None:
        rows = [(layer.name, layer.macs, layer.acs, round(layer.energy_pj, 3)) for layer in layers]
        table = Table(("layer", "macs", "acs", "energy_pj"), rows)
        render(table, Path(trainer.default_root_dir) / "artifacts" / file, file)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table(f"test/{file}", columns=list(table.columns), data=[list(row) for row in rows])
