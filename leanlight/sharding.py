"""Weights, gradients and optimiser states spread over processes, for modules of the suite and their batches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch.plugins.precision import FSDPPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, MixedPrecision, StateDictType
from torch.optim import Optimizer

from leanlight.contracts import Batch


class _BatchPrecision(FSDPPrecision):
    """Leaves batches, which are frozen, as they are, and clips by the norm of all processes' gradients.

    Args:
        precision: of the trainer.
        strategy: whose model has the gradients.
    """

    def __init__(self, precision: Any, strategy: FSDPStrategy) -> None:
        super().__init__(precision)
        self._strategy = strategy

    @property
    def mixed_precision_config(self) -> MixedPrecision:
        # Autocast casts inputs where they are used.
        return replace(super().mixed_precision_config, cast_root_forward_inputs=False)

    def convert_input(self, data: Any) -> Any:
        return data if isinstance(data, Batch) else super().convert_input(data)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: float | int, norm_type: float = 2.0) -> None:
        model = self._strategy.model
        assert isinstance(model, FullyShardedDataParallel)
        model.clip_grad_norm_(clip_val, norm_type)


class ShardedStrategy(FSDPStrategy):
    """PyTorch's FSDP as Lightning has it, for the suite's batches, for clipping by norm, and on CPUs, too.

    Lightning's own refuses frozen batches and `gradient_clip_val`, and leaves CPUs out, on which there is nothing to
    gain, but everything to try. It wraps a module once, so that a fit and its test are of the same weights.
    """

    _wrapped: nn.Module | None = None

    @property
    def precision_plugin(self) -> FSDPPrecision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        self._precision_plugin = None if plugin is None else _BatchPrecision(plugin.precision, self)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        # A test after a fit comes here again, with weights that are spread already.
        if self._wrapped is None or self._wrapped.module is not model:
            self._wrapped = self._wrap(model)
        return self._wrapped

    def _wrap(self, model: nn.Module) -> nn.Module:
        if self.root_device.type != "cpu":
            return super()._setup_model(model)
        return FullyShardedDataParallel(
            model,
            device_id=self.root_device,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
        )

    def lightning_module_state_dict(self) -> dict[str, Any]:
        if self.root_device.type != "cpu" or self._state_dict_type != "full":
            return super().lightning_module_state_dict()
        # Lightning asks for weights to be brought to the CPU; of those that are there PyTorch frees what it hands out.
        model, kind = self.model, StateDictType.FULL_STATE_DICT
        assert model is not None
        with FullyShardedDataParallel.state_dict_type(model, kind, FullStateDictConfig(rank0_only=True)):
            return model.state_dict()
