"""Training glue of session recommendation: hooks, optimisers, logging, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leanlight.contracts import (
    Allows,
    Catalogue,
    MediaItem,
    PrimaryMetric,
    Progress,
    SessionBatch,
    SessionData,
    Split,
    UserError,
    data_of,
    derived_seed,
    isolated_rng,
    run_seed,
)
from leanlight.contracts.ranges import NonNegativeFloat, PositiveInt, Seed
from lit_modules.hid import pictures
from lit_modules.hid.evaluation import SessionEvaluation
from lit_modules.hid.export import export_recommender
from lit_modules.hid.intents import HybridIntents, Intents
from lit_modules.hid.losses import ICLoss
from lit_modules.hid.network import SessionNetwork
from lit_modules.hid.plugins import Plugin
from lit_modules.hid.recommend import ItemFacts, Recommendation, recommend
from lit_modules.hid.scoring import Scoring, top_k
from lit_modules.hparams import save_hparams
from lit_modules.nn.checks import require_positive
from lit_modules.optim import configure
from lit_modules.step_log import log_evaluation, log_step


class SessionRecommender(LightningModule):
    """Recommend the next item of a session: any backbone, with HID's constraint of intents, a plug-in, or neither.

    The loss is cross entropy over the whole catalogue, plus `epsilon` times HID's `ICLoss`, plus a plug-in's terms.
    Networks are made when the items of the data are known. A backbone without parameters (`Popularity` and its like)
    runs through the same module: training then changes nothing.

    Args:
        backbone: makes the network from the number of items: a `Backbone`, or a rule without parameters.
        scoring: how a session and the table of items become scores; dot products by default.
        intents: how items are grouped; needed by an `icloss` that compares with intents.
        icloss: HID's loss; null for the backbone alone.
        epsilon: factor ε of `icloss`, at least 0; null: 0.4 (``paper``), 0.2 (``released``).
        plugin: makes another method for the long tail, to stand beside the backbone.
        topk: lengths K of the recommended lists that are measured; the longest is predicted.
        optimizer: makes the optimiser; Adam with lr 0.001 by default.
        lr_scheduler: makes the learning-rate schedule from the optimiser; constant by default.
        lr_interval: what a step of the schedule follows, ``epoch`` or ``step``.
        seed: of what is drawn here; that of ``seed_everything`` by default.
    """

    allows = Allows()

    def __init__(
        self,
        backbone: Callable[[int], nn.Module],
        scoring: Scoring | None = None,
        intents: HybridIntents | None = None,
        icloss: ICLoss | None = None,
        epsilon: NonNegativeFloat | None = None,
        plugin: Callable[[], Plugin] | None = None,
        topk: Sequence[PositiveInt] = (5, 10, 20),
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        seed: Seed | None = None,
    ) -> None:
        super().__init__()
        save_hparams(self)
        if epsilon is None:
            epsilon = 0.2 if icloss is not None and icloss.form == "released" else 0.4
        if epsilon < 0:
            raise UserError(f"epsilon: expected at least 0, got {epsilon}")
        if not topk:
            raise UserError("topk: expected one length at least, got none")
        require_positive(topk=min(topk))
        if icloss is not None and icloss.against == "intents" and intents is None:
            raise UserError("intents: expected how items are grouped, since icloss compares with intents; got none")
        self.make_backbone, self.make_plugin = backbone, plugin
        self.scoring, self.make_intents = scoring or Scoring(), intents
        self.icloss = icloss if epsilon > 0 else None  # with 0 nothing of it is computed, so that no bit changes
        self.epsilon = epsilon
        self.make_optimizer: Callable[..., torch.optim.Optimizer] = optimizer or torch.optim.Adam
        self.make_scheduler, self.lr_interval = lr_scheduler, lr_interval
        self._given_seed = seed
        self.evaluation = SessionEvaluation(sorted(topk))
        self.network: SessionNetwork | None = None
        self.intents: Intents | None = None
        self.catalogue: Catalogue | None = None
        self._prepared = False
        self._needless: nn.Parameter | None = None
        self._batches = 0  # of training; what a backbone without an optimiser counts its progress by
        self._terms: dict[str, Tensor] = {}

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Make the network for the items of the data, and what is counted or clustered once: see `_prepare`."""
        data = data_of(self, SessionData)
        if self.catalogue is not None:
            self._check_items(self.catalogue, data.catalogue, "data")
        else:
            self._build(data.catalogue)
        if stage == "fit" or not self._prepared:  # what training alone goes by is in no checkpoint
            self._prepare(data)
        self.evaluation.prepare(data.catalogue)

    def _check_items(self, own: Catalogue, other: Catalogue, key: str) -> None:
        """Numbers of items mean nothing in another catalogue."""
        if own.names != other.names:
            raise UserError(
                f"{key}: expected the {own.num_items:,} items that this model was made for, in their order; got "
                f"{other.num_items:,} items that differ"
            )

    def _build(self, catalogue: Catalogue) -> None:
        """Make the network for a catalogue; its plug-in last, so that the backbone begins as it does without."""
        if (longest := max(self.evaluation.topk)) > catalogue.num_items:
            raise UserError(f"topk: expected at most {catalogue.num_items:,}, the items of the data, got {longest}")
        self.catalogue = catalogue
        backbone = self.make_backbone(catalogue.num_items)
        plugin = None if self.make_plugin is None else self.make_plugin()
        self.network = SessionNetwork(backbone, self.scoring, plugin)
        if not self.network.trains:
            if plugin is not None or self.icloss is not None:
                raise UserError(
                    f"backbone: {type(backbone).__name__} has nothing to train; expected plugin and icloss to be null"
                )
            self.automatic_optimization = False
            self._needless = nn.Parameter(torch.zeros(()))  # DistributedDataParallel wraps no module without one

    def _prepare(self, data: SessionData) -> None:
        """Count what network and plug-in go by in the training sessions, and cluster intents.

        Every process counts for itself, the same from the same sessions. Intents are clustered on the first process,
        and handed to the others: eigenvectors may differ between processors.
        """
        assert self.network is not None
        limit = getattr(self.network.backbone, "max_length", None)
        if limit is not None and data.meta.max_length > limit:
            name = type(self.network.backbone).__name__
            raise UserError(
                f"data: {name} reads sessions of at most {limit} clicks, got some of {data.meta.max_length}; set "
                "max_session_length"
            )
        for part in (self.network.backbone, self.network.plugin):
            if part is not None:
                part.prepare(data.catalogue, data.train_sessions)
        self._prepared = True
        if self.make_intents is not None and self.intents is None:
            if self.trainer.is_global_zero:
                with isolated_rng():
                    self.intents = self.make_intents.build(data.catalogue, data.train_sessions)
            self.intents = self.trainer.strategy.broadcast(self.intents)
        # Buffers hold what was counted and stay as they are: DDP would send them around in every step.
        names = [name for name, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def configure_optimizers(self) -> Any:
        assert self.network is not None
        if not self.network.trains:
            return []  # for None Lightning warns
        parameters = self.network.parameters()
        return configure(parameters, self.make_optimizer, self.make_scheduler, self.lr_interval)

    def compile_networks(self, **options: Any) -> None:
        assert self.network is not None
        self.network.backbone.compile(**options)

    # ---- steps ----

    def forward(self, items: Tensor) -> Tensor:
        """Sessions (N, L) int64, 0 behind their clicks → scores (N, m)."""
        assert self.network is not None
        return self.network(items)

    def training_step(self, batch: SessionBatch, batch_idx: int) -> Tensor | None:
        assert self.network is not None
        self._batches += 1
        if not self.network.trains:
            return None
        terms = self._losses(self._augmented(batch))
        loss = torch.stack([self._factor(name) * term for name, term in terms.items()]).sum()
        self._terms = {name: term.detach() for name, term in terms.items()}
        values = {f"train/{name}": term for name, term in {"loss": loss.detach(), **self._terms}.items()}
        log_step(self, values, len(batch), over_processes=True)
        return loss

    def _factor(self, term: str) -> float:
        return self.epsilon if term == "icloss" else 1.0

    def _augmented(self, batch: SessionBatch) -> SessionBatch:
        """With the sessions that a plug-in adds. What it draws is a function of seed, step and process."""
        assert self.network is not None
        if self.network.plugin is None:
            return batch
        seed = derived_seed(run_seed(self._given_seed), "augment", self.global_step, self.global_rank)
        return self.network.plugin.augment(batch, torch.Generator(batch.items.device).manual_seed(seed))

    def _losses(self, batch: SessionBatch) -> dict[str, Tensor]:
        """The terms of the loss by name, without their factors."""
        network = self.network
        assert network is not None
        session, table = network.encode(batch.items, batch.length)
        if network.rescores:
            scores = network.score(session, table, batch.items, batch.length)
            terms = {"cross_entropy": F.cross_entropy(scores, batch.target - 1)}
        else:
            terms = {"cross_entropy": self.scoring.loss(session, table, batch.target)}
        if self.icloss is not None:
            terms["icloss"] = self.icloss(session, batch, table, self.intents)
        if network.plugin is not None:
            terms |= network.plugin.loss(session, batch, table, self.scoring, self.intents)
        return terms

    def validation_step(self, batch: SessionBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: SessionBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: SessionBatch, split: Split) -> None:
        assert self.network is not None
        scores = self(batch.items)
        recommended, _ = top_k(scores, max(self.evaluation.topk))
        self.evaluation.update(split, recommended, batch.length, batch.target)
        if self.network.trains:
            loss = F.cross_entropy(scores, batch.target - 1)
            log_evaluation(self, {f"{split}/loss": loss}, len(batch))

    def on_validation_epoch_start(self) -> None:
        self.evaluation.start("val")

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish("val"), sync_dist=True)

    def on_test_epoch_start(self) -> None:
        self.evaluation.start("test")

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish("test"), sync_dist=True)

    def predict_step(self, batch: SessionBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return ``index``, ``target`` (N,), ``recommended`` and ``score`` (N, K); items by their numbers from 1."""
        recommended, score = top_k(self(batch.items), max(self.evaluation.topk))
        return {
            "index": batch.index,
            "target": batch.target,
            "recommended": recommended,
            "score": score.float(),
        }

    def recommend(self, sessions: Sequence[Sequence[str]], k: int = 10, **options: Any) -> list[list[Recommendation]]:
        """The K best items of sessions in original ids: see `lit_modules.hid.recommend`.

        Args:
            sessions: original ids in the order of the clicks.
            k: items of a list (K).
            options: ``exclude_seen``, ``category``, ``batch_size``.
        """
        network, facts = self._known()
        return recommend(network, facts, sessions, k, **options)

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric(f"val/hr_{max(self.evaluation.topk)}", "max")

    def progress(self) -> Progress:
        floor = self.network is not None and not self.network.trains
        return Progress("step", self._batches if floor else self.global_step)

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """train: sizes and a map of the intents. val, test: see `SessionEvaluation.media`."""
        if split != "train":
            return self.evaluation.media(split)
        if self.intents is None or self.catalogue is None or self.network is None or not self.network.trains:
            return {}
        table = self.network.backbone.item_embedding().detach()
        return pictures.of_intents(self.intents, self.catalogue.clicks, table)

    def export(self, directory: Path) -> list[Path]:
        """Write the network and a table of its items for plain PyTorch: see `lit_modules.hid.export`."""
        network, facts = self._known()
        return export_recommender(network, facts, Path(directory))

    def _known(self) -> tuple[SessionNetwork, ItemFacts]:
        if self.network is None or self.catalogue is None:
            raise UserError("the recommender does not know its items yet; expected a fitted module or its checkpoint")
        pairs = None if self.intents is None else (self.intents.item.cpu(), self.intents.intent.cpu())
        return self.network, ItemFacts(self.catalogue, pairs)

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.catalogue is not None
        checkpoint["catalogue"] = {**vars(self.catalogue)}
        checkpoint["intents"] = None if self.intents is None else self.intents.data
        checkpoint["batches"] = self._batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        catalogue = Catalogue(**checkpoint["catalogue"])
        if self.catalogue is None:
            self._build(catalogue)
        else:
            self._check_items(catalogue, self.catalogue, "data")
        if checkpoint["intents"] is not None:
            self.intents = Intents(**checkpoint["intents"])
        self._batches, self._prepared = checkpoint["batches"], True
        _take_shapes(self, checkpoint["state_dict"])


def _take_shapes(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give buffers that were counted in other data, or not yet, the shapes of a checkpoint's."""
    for name, owner in module.named_modules():
        for leaf, own in owner._buffers.items():
            saved = state.get(f"{name}.{leaf}" if name else leaf)
            if saved is not None and (own is None or own.shape != saved.shape):
                owner._buffers[leaf] = torch.empty_like(saved, device=None if own is None else own.device)
