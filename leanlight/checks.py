"""Configurations that are well formed, but would give wrong numbers: refused before anything is built."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, StrategyRegistry

from leanlight.contracts import Allows, UserError
from leanlight.contracts.allows import PRECISIONS

_SHARDING = (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)
_PRECISION_NAMES = {None: "32-true", 32: "32-true", "32": "32-true", 16: "16-mixed", "16": "16-mixed"}
_PRECISION_NAMES |= {"bf16": "bf16-mixed"}


def check_config(resolved: Mapping[str, Any]) -> None:
    """Refuse a resolved configuration that selects on test data, or asks for what the suite or its model cannot do."""
    check_monitors(resolved)
    model = str(resolved["model"]["class_path"])
    allows = getattr(_imported(model), "allows", None)  # a plain LightningModule declares nothing
    check_precision(resolved["trainer"]["precision"], model, allows)
    if allows is not None and not allows.sharded:
        check_sharding(resolved["trainer"]["strategy"], model)


def check_monitors(config: Any, where: str = "") -> None:
    """Refuse any `monitor` that looks at test data: nothing is selected or stopped on test."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            here = f"{where}.{key}" if where else str(key)
            if key == "monitor" and str(value).startswith("test"):
                raise UserError(f"{here}: {value!r} would select on test data; monitor a val/ metric instead")
            check_monitors(value, here)
    elif isinstance(config, list):
        for index, value in enumerate(config):
            check_monitors(value, f"{where}[{index}]")


def check_precision(precision: Any, model: str, allows: Allows | None) -> None:
    """Refuse a precision that the suite's float32 batches and buffers, or the model's mathematics, cannot follow."""
    name = _PRECISION_NAMES.get(precision, precision)
    if name not in PRECISIONS:
        raise UserError(
            f"trainer.precision: expected {', '.join(PRECISIONS)}, got {precision!r}: batches and buffers are float32"
        )
    if allows is not None and name not in allows.precision:
        expected = " or ".join(allows.precision)
        raise UserError(f"trainer.precision: expected {expected} for {model}, got {name}: {allows.why}")


def check_sharding(strategy: Any, model: str) -> None:
    """Refuse a strategy that shards weights: evaluation, pictures and export of the suite's modules read them whole."""
    if isinstance(strategy, Mapping):
        strategy = strategy["class_path"]
    found = StrategyRegistry[strategy]["strategy"] if strategy in StrategyRegistry else _imported(str(strategy))
    if isinstance(found, type) and issubclass(found, _SHARDING):
        raise UserError(
            f"trainer.strategy: {strategy} shards weights, and {model} is evaluated, drawn and exported from whole "
            "ones; use ddp (--config trainer/gpus)"
        )


def _imported(class_path: str) -> Any:
    """What the parser imported to check the configuration."""
    package, _, name = class_path.rpartition(".")
    return getattr(sys.modules.get(package), name, None)
