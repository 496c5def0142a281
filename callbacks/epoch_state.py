"""What a training epoch has gathered so far, which Lightning leaves out of its checkpoints.

Without it, a run resumed in the middle of an epoch logs epoch means over the remaining batches only.
Everything here is plain tensors, numbers, strings, lists and dicts, so that it loads with ``weights_only=True``.

Lightning has no public way to these values: private names are used, and `lightning_internals` says so where a version
has renamed them.
"""

from __future__ import annotations

import builtins
from dataclasses import fields
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor
from torchmetrics import Metric

from callbacks.common import lightning_internals

_PURPOSE = "resuming inside an epoch"
with lightning_internals(_PURPOSE):
    from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync

State = dict[str, Any]

_METADATA = tuple(field.name for field in fields(_Metadata) if field.name not in ("reduce_fx", "_sync"))
_NEWEST = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")


@lightning_internals(_PURPOSE)
def capture_epoch(trainer: Trainer, module: LightningModule) -> State:
    """Return accumulators of `self.log`, of every torchmetrics metric, and the newest value of each logged name."""
    connector = trainer._logger_connector
    results = trainer.fit_loop.epoch_loop._results
    state = {
        "logged": {key: _dump_result(result) for key, result in results.items()},
        "metrics": {name: _dump_metric(metric) for name, metric in _metrics(module) if metric._update_count},
        "newest": {name: dict(getattr(connector, name)) for name in _NEWEST},
        "first_batch": connector._first_loop_iter,
    }
    return _to(state, torch.device("cpu"))


@lightning_internals(_PURPOSE)
def restore_epoch(trainer: Trainer, module: LightningModule, state: State) -> None:
    """Put back what `capture_epoch` returned, before the first batch after a resume.

    Args:
        trainer: of the resumed run.
        module: of the resumed run, with the same metrics as before.
        state: of this rank.
    """
    state = _to(state, trainer.strategy.root_device)
    metrics = dict(_metrics(module))
    for name, saved in state["metrics"].items():
        _load(metrics[name], saved)
    results = trainer.fit_loop.epoch_loop._results
    for key, saved in state["logged"].items():
        if (result := _load_result(saved, trainer, metrics)) is not None:
            results[key] = result
    trainer._logger_connector._first_loop_iter = state["first_batch"]


@lightning_internals(_PURPOSE)
def restore_newest(trainer: Trainer, state: State) -> None:
    """Put back the newest value of each logged name, so that monitors see them before the next validation."""
    for name in _NEWEST:
        getattr(trainer._logger_connector, name).update(_to(state["newest"][name], trainer.strategy.root_device))


def _metrics(module: LightningModule) -> list[tuple[str, Metric]]:
    return [(name, child) for name, child in module.named_modules() if isinstance(child, Metric)]


def _dump_metric(metric: Metric) -> State:
    return {"states": {name: getattr(metric, name) for name in metric._defaults}, "updates": metric._update_count}


def _load(metric: Metric, saved: State) -> None:
    for name, value in saved["states"].items():
        setattr(metric, name, value)
    metric._update_count = saved["updates"]


# Lightning keeps one `_ResultMetric` for each logged name: how to reduce it (`meta`), the running value, inside a
# torchmetrics object, and the newest value. A reduction is a function (torch.mean, max, …), which no plain checkpoint
# holds; its name and where it lives are kept instead.


def _dump_result(result: _ResultMetric) -> State:
    reduce = result.meta.reduce_fx
    owner = "builtins" if reduce is getattr(builtins, reduce.__name__, None) else "torch"
    saved: State = {
        "meta": {name: getattr(result.meta, name) for name in _METADATA},
        "reduce": [owner, reduce.__name__],
        "sync": [result.meta.sync.should, result.meta.sync.rank_zero_only],
        "newest": result._forward_cache,
        "reset": result.has_reset,
    }
    # A logged torchmetrics object is one of the module's metrics: its states are kept there.
    return saved | (_dump_metric(result) if result.is_tensor else {})


def _load_result(saved: State, trainer: Trainer, metrics: dict[str, Metric]) -> _ResultMetric | None:
    owner, name = saved["reduce"]
    meta = _Metadata(**saved["meta"], reduce_fx=getattr(builtins if owner == "builtins" else torch, name))
    should, rank_zero_only = saved["sync"]
    # The function that reduces over the processes belongs to the strategy of the new run.
    meta.sync = _Sync(fn=trainer.strategy.reduce, _should=should, rank_zero_only=rank_zero_only)
    result = _ResultMetric(meta, is_tensor="states" in saved)
    if result.is_tensor:
        result.to(trainer.strategy.root_device)
        _load(result, saved)
    elif meta.metric_attribute in metrics:
        result.value = metrics[meta.metric_attribute]
        result._update_count = 1  # torchmetrics warns when a metric is computed that was never updated
    else:
        return None
    result._forward_cache = saved["newest"]
    result.has_reset = saved["reset"]
    return result


def _to(state: Any, device: torch.device) -> Any:
    if isinstance(state, Tensor):
        return move_data_to_device(state.detach().clone(), device)
    if isinstance(state, dict):
        return {key: _to(value, device) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_to(value, device) for value in state]
    return state
