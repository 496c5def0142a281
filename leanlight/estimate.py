"""Memory of one training step of a configuration, from shapes alone: nothing is loaded, computed or written."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

from leanlight.contracts import HasStep, HasStepShape, TrainingStep, UserError
from leanlight.experiment import LeanlightCLI
from leanlight.invocation import Invocation

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_LEFT_OUT = (
    "left out: temporary buffers of kernels, what the loss itself keeps, the allocator's slack, the CUDA context (some "
    "500 MB), data sets and replay memories kept on the device. Saved activations are those of the CPU's operations"
)


@dataclass(frozen=True)
class Estimate:
    """Bytes of one training step.

    Args:
        weights: parameters and buffers of the module, and further copies that the step trains.
        gradients: of the trained parameters.
        optimizer_state: after its first step.
        batch: the network's input.
        activations: what the forward pass keeps for the backward pass, without weights and input.
    """

    weights: int
    gradients: int
    optimizer_state: int
    batch: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


class _ModelAndData(LeanlightCLI):
    """Builds no trainer: whether the devices that a configuration names are there does not matter."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


def main(call: Invocation) -> int:
    """Print the estimate of a fit. Raises UserError where the method or its data do not say what a step holds."""
    cli = _ModelAndData(call)
    model, data = cli.model, cli.datamodule
    for key, thing, kind in (("model", model, HasStep), ("data", data, HasStepShape)):
        if not isinstance(thing, kind):
            raise UserError(
                f"--estimate: {key}: {type(thing).__name__} does not say what one training step holds "
                f"(leanlight.contracts.{kind.__name__})"
            )
    precision = str(cli.resolved["trainer"]["precision"] or "32-true")
    try:
        found, step = estimate_step(model, tuple(data.step_shape), precision)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--estimate: {type(model).__name__} cannot be followed by shapes alone: {reason}") from error
    shape = " x ".join(map(str, step.shape))
    print(f"one training step of {type(model).__name__}, {type(step.network).__name__} on {shape}, {precision}\n")
    rows = {name.replace("_", " ").replace("optimizer", "optimiser"): size for name, size in asdict(found).items()}
    for name, size in [*rows.items(), ("sum", found.total)]:
        print(f"  {name:<16} {size / 2**20:>12,.2f} MiB")
    print(f"\n{_LEFT_OUT}")
    return 0


def estimate_step(
    model: nn.Module, shape: tuple[int, ...], precision: str = "32-true"
) -> tuple[Estimate, TrainingStep]:
    """Follow one forward pass and one step of the optimiser on tensors without content.

    Args:
        model: a `HasStep`.
        shape: (N, …) of the batch that the data give in a step.
        precision: as ``trainer.precision`` calls it.

    Returns:
        The estimate, and the step that it is of.
    """
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        model = copy.deepcopy(model).train()
    with mode, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by a deep copy
        step = model.training_parts(shape)  # type: ignore[operator]  # of a `HasStep`
        batch = torch.empty(step.shape)
        autocast: AbstractContextManager[Any] = nullcontext()
        if precision in _AUTOCAST:
            autocast = torch.autocast("cpu", _AUTOCAST[precision])
        with autocast:
            activations = saved_bytes(step.network, batch)
        trained = [p for group in step.optimizer.param_groups for p in group["params"] if p.requires_grad]
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        step.optimizer.step()
        state = [value for values in step.optimizer.state.values() for value in values.values()]
        weights = _bytes(_tensors(model)) + step.copies * _bytes(_tensors(step.network))
    gradients = max(1, step.copies) * _bytes(trained)
    kept = _bytes(value for value in state if isinstance(value, Tensor))
    return Estimate(weights, gradients, kept, _bytes([batch]), activations), step


def saved_bytes(network: nn.Module, batch: Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage once, without weights and input."""
    known = {_storage(tensor) for tensor in (*_tensors(network), batch)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(batch)
    assert output.requires_grad  # the graph, and with it every counted storage, is alive until here
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
