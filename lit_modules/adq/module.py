"""Training glue of the network that scores items for selection: hooks, optimisers, logging, predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from leanlight.contracts import (
    ImageBatch,
    ImageData,
    MediaItem,
    Split,
    UserError,
    data_of,
    derived_seed,
    isolated_rng,
    predicted_origin,
    run_seed,
)
from leanlight.contracts.ranges import PositiveInt
from lit_modules.adq.pictures import margins
from lit_modules.adq.scores import random_views, texture
from lit_modules.classifier import ClassifierHooks, cross_entropy
from lit_modules.frozen import Frozen
from lit_modules.hparams import save_hparams
from lit_modules.nn import logits_and_features, pooled_features
from lit_modules.nn.checks import blank_output, require_positive
from lit_modules.selection import DYNAMICS, TrainingDynamics
from lit_modules.step_log import log_step

Output = Literal["embedding", "logits", "texture", "views"]


class SampleScorer(ClassifierHooks):
    """A classifier whose predictions hold, by index, what rules of selection ask for; fitted or as it is made.

    Training is ordinary cross entropy, and what training says of each item is kept: see `TrainingDynamics`. `predict`
    gives `outputs` of any part of the data and, of the part that was trained on, also the dynamics.

    Args:
        network: makes the network: float images (N, C, H, W) in [0, 1] → logits (N, K), with timm's names of features.
        optimizer: makes the optimiser from the network's parameters; Adam with lr 0.001 by default.
        lr_scheduler: makes the learning-rate schedule from the optimiser; constant by default.
        lr_interval: what a step of the schedule follows, ``epoch`` or ``step``.
        outputs: what is predicted, of ``embedding``, ``logits``, ``texture``, ``views``.
        view_network: makes the network that embeds the views, the paper's a ResNet-18 for ImageNet; None: the scorer's.
        views: random crops of each item (V), a function of the run's seed and the item's index alone.
        record: whether training is recorded, item by item.
        channels_last: keep images and weights in that memory format, which GPUs' tensor cores prefer.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        outputs: Sequence[Output] = get_args(Output),
        view_network: Callable[[], nn.Module] | None = None,
        views: PositiveInt = 2,
        record: bool = True,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        require_positive(views=views)
        for output in outputs:
            if output not in get_args(Output):
                raise UserError(f"outputs: expected some of {', '.join(get_args(Output))}, got {output!r}")
        save_hparams(self)
        self._compose(network(), optimizer, lr_scheduler, lr_interval, channels_last)
        self.outputs, self.make_view_network, self.views = tuple(outputs), view_network, views
        #: Of the data with that fingerprint; None where training is not recorded, or has not begun.
        self.dynamics: TrainingDynamics | None = None
        self.record, self._fingerprint = record, ""
        self._viewer: Frozen[nn.Module] | None = None
        self._by_item: dict[str, Tensor] = {}

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Check networks against the data, make metrics for its classes, make room for what training will tell."""
        meta = data_of(self, ImageData).meta
        self._fit_to(meta)
        if {"embedding", "views"} & set(self.outputs):
            blank_output(self.network, meta.shape, "network", pooled_features)
        if stage == "fit" and self.record:
            self.dynamics, self._fingerprint = TrainingDynamics(meta.counts["train"]), meta.fingerprint
        if stage == "predict" and "views" in self.outputs and self.make_view_network is not None:
            # Whatever it draws is a function of the seed: it is not in the checkpoint.
            with isolated_rng(derived_seed(run_seed(), "view_network")):
                self._viewer = Frozen(self.make_view_network())
            blank_output(self._viewer.network, meta.shape, "view_network", pooled_features)

    def on_fit_start(self) -> None:
        if self.dynamics is not None:
            self.dynamics.to(self.device)

    # ---- steps ----

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        _check_labels(batch)
        logits = self(batch.image)
        loss = cross_entropy(logits, batch.label, batch.weight)
        self._terms = {"cross_entropy": loss.detach()}
        if self.dynamics is not None:
            self.dynamics.record(batch.index, logits, batch.label, batch_idx)
        right = (logits.detach().argmax(1) == batch.label).float().mean()
        log_step(self, {"train/loss": loss, "train/accuracy": right}, len(batch), over_processes=True)
        return loss

    def on_train_epoch_end(self) -> None:
        if self.dynamics is not None:
            self.dynamics.end_epoch()

    # ---- predictions ----

    def on_predict_start(self) -> None:
        if self._viewer is not None:
            self._viewer.to(self.device)
        data = data_of(self, ImageData)
        recorded = self.dynamics is not None and len(self.dynamics) and getattr(data, "predict_split", "") == "train"
        self._by_item = self._usable(data.meta.fingerprint) if recorded else {}

    def _usable(self, fingerprint: str) -> dict[str, Tensor]:
        """What training told of all items; nothing, with a warning, where it does not hold of every one."""
        assert self.dynamics is not None
        by_item = self.dynamics.by_item()
        unseen = int(by_item[DYNAMICS[0]][:, 0].isnan().sum())
        problem = ""
        if fingerprint != self._fingerprint:
            problem = "training saw other data"
        elif unseen:
            problem = f"{unseen:,} of {self.dynamics.items:,} items were in no training batch"
        if problem:
            rank_zero_warn(f"predictions go without {', '.join(DYNAMICS)}: {problem}")
        return {} if problem else by_item

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``index``, ``origin``, ``label`` (N,), and `lit_modules.selection.FIELDS`: `outputs` and dynamics."""
        _check_labels(batch)
        outputs = {"index": batch.index, **predicted_origin(self, batch.index), "label": batch.label}
        logits, embedding = logits_and_features(self.network, self._laid_out(batch.image))
        offered: dict[str, Callable[[], Tensor | None]] = {
            "embedding": lambda: embedding,
            "logits": lambda: logits,
            "texture": lambda: texture(batch.image),
            "views": lambda: self._embedded_views(batch),
        }
        for name in self.outputs:
            value = offered[name]()
            assert value is not None  # `setup` has asked for features
            outputs[name] = value.float()
        index = batch.index.cpu()
        return outputs | {name: values[index] for name, values in self._by_item.items()}

    def _embedded_views(self, batch: ImageBatch) -> Tensor:
        """(N, V, D) vectors of random crops."""
        # A stream an item: neither batches nor processes nor what was predicted before change a crop.
        seeds = [derived_seed(run_seed(), "views", index) for index in batch.index.tolist()]
        crops = random_views(batch.image, self.views, [torch.Generator().manual_seed(seed) for seed in seeds])
        network = self.network if self._viewer is None else self._viewer.network
        return pooled_features(network, self._laid_out(crops.flatten(0, 1))).unflatten(0, (-1, self.views))

    # ---- what callbacks and commands ask ----

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """train: margins of the items in the first and the last epoch. val, test: see `ClassifierEvaluation.media`."""
        if split != "train":
            return super().media(split)
        return {} if self.dynamics is None else margins(self.dynamics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.dynamics is not None:
            checkpoint["dynamics"] = {**self.dynamics.state_dict(), "data": self._fingerprint}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "dynamics" in checkpoint:
            state = checkpoint["dynamics"]
            self._fingerprint = state["data"]
            self.dynamics = TrainingDynamics(len(state["batch"]), self.device)
            self.dynamics.load_state_dict(state)


def _check_labels(batch: ImageBatch) -> None:
    if batch.label.ndim != 1:
        raise UserError(f"data: selection needs one class an item, got labels of shape {tuple(batch.label.shape)}")
