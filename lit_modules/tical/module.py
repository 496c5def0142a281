"""Training glue of emotion recognition: hooks, optimisers, logging, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leanlight.contracts import (
    Allows,
    EmotionData,
    EmotionMeta,
    MediaItem,
    Modality,
    MultimodalBatch,
    PrimaryMetric,
    Progress,
    Split,
    UserError,
    data_of,
    derived_seed,
    nearest,
    run_seed,
)
from leanlight.contracts.ranges import NonNegativeFloat, Seed, Share
from lit_modules.history import History
from lit_modules.hparams import save_hparams
from lit_modules.nn.processes import everyone
from lit_modules.optim import configure
from lit_modules.step_log import log_evaluation, log_step
from lit_modules.tical import pictures
from lit_modules.tical.anchors import AnchorLists
from lit_modules.tical.assessment import ConsistencyAssessment
from lit_modules.tical.encoders import Answer, LearnsLabels
from lit_modules.tical.evaluation import EmotionEvaluation
from lit_modules.tical.export import export_emotions
from lit_modules.tical.losses import SoftLoss, hyp_cpcc, staged_loss
from lit_modules.tical.missing import lose
from lit_modules.tical.network import EmotionNetwork, Facts, Verdict
from lit_modules.tical.predictions import write_table
from lit_modules.tical.tree import LabelTree

Network = Callable[[Mapping[str, Modality], int], nn.Module]


class EmotionRecognition(LightningModule):
    """Recognise emotion or sentiment from several modalities, and say what each of them suggests alone.

    Any network of the package, with TiCAL's assessment of its clips or without. Inside a step clips are assessed by the
    anchors there are; then come loss, optimiser step, and the step's own anchors. Networks are made when the
    modalities of the data are known.

    Args:
        network: makes the network from the modalities by name and the number of outputs, C or 1.
        assessment: how clips are assessed; null for the network alone.
        target: ``classes``, or ``score``: the score itself is learned, by its distance.
        missing: by modality, the share of the clips that lose it, in training, validation and test alike, in [0, 1).
        tree: of labels: ``flat``, ``ordinal`` (negative, neutral, positive, then their levels), or a file of edges.
        tree_weight: factor of the correlation of tree and hyperbolic distances, at least 0.
        gather: whether this correlation is that of the clips of all processes, as one process with the whole batch has
            it; else each process sees its own batch.
        soft: losses of an assessment of reading ``soft``, which has no tree; null: `SoftLoss`' own.
        class_weights: whether rare classes weigh more in the loss: by the inverse of their number.
        optimizer: makes the optimiser; Adam with lr 0.0001 and weight_decay 0.005 by default.
        lr_scheduler: makes the learning-rate schedule from the optimiser; constant by default.
        lr_interval: what a step of the schedule follows, ``epoch`` or ``step``.
        seed: of what is drawn here; that of ``seed_everything`` by default.
    """

    allows = Allows()
    collected_in = "predictions"  # the table of clips lies beside what it is made of

    def __init__(
        self,
        network: Network,
        assessment: ConsistencyAssessment | None = None,
        target: Literal["classes", "score"] = "classes",
        missing: dict[str, Share] | None = None,
        tree: str = "flat",
        tree_weight: NonNegativeFloat = 1.0,
        gather: bool = True,
        soft: SoftLoss | None = None,
        class_weights: bool = True,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        seed: Seed | None = None,
    ) -> None:
        super().__init__()
        save_hparams(self)
        if target not in ("classes", "score"):
            raise UserError(f"target: expected classes or score, got {target!r}")
        if not tree_weight >= 0:
            raise UserError(f"tree_weight: expected at least 0, got {tree_weight}")
        for name, share in (missing or {}).items():
            if not 0 <= share < 1:
                raise UserError(f"missing.{name}: expected a share in [0, 1), got {share}")
        self.make_network, self.assessment, self.target = network, assessment, target
        self.missing, self.class_weights = dict(missing or {}), class_weights
        self.tree_weight, self.gather = tree_weight, gather
        is_soft = assessment is not None and assessment.reading == "soft"
        if soft is not None and not is_soft:
            raise UserError("soft: expected an assessment of reading soft, or null")
        self.soft = (soft or SoftLoss()) if is_soft else None
        self.make_optimizer: Callable[..., torch.optim.Optimizer] = optimizer or partial(
            torch.optim.Adam, lr=1e-4, weight_decay=5e-3
        )
        self.make_scheduler, self.lr_interval = lr_scheduler, lr_interval
        self._tree, self._given_seed = tree, seed
        self.tree: LabelTree | None = None
        self.evaluation = EmotionEvaluation()
        self.network: EmotionNetwork | None = None
        self.history = History()
        self._meta: EmotionMeta | None = None
        self._class_weight: Tensor | None = None
        self._levels: Tensor | None = None
        self._warned = False
        self._step: tuple[MultimodalBatch, Verdict] | None = None
        self._terms: dict[str, Tensor] = {}

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Make the network for the modalities of the data, or check that they are those it was made for."""
        data = data_of(self, EmotionData)
        self._meta = data.meta
        if self.network is not None:
            self.network.facts.check(data.meta)
        elif data.meta.classes:
            self._build(Facts.of(data.meta, data.names("train")))
        elif stage != "predict":
            raise UserError(f"data: expected clips with labels, got none with any in {data.meta.source}")
        else:
            return  # a checkpoint is needed, and knows the classes
        assert self.network is not None
        # What features are scaled by, where they are; a prediction of other clips takes it from the checkpoint.
        self.network.scaling = dict(getattr(data, "statistics", {}))
        if stage == "fit":
            counts = torch.tensor(data.meta.class_counts, dtype=torch.float32)
            known = (counts > 0).sum() * counts.clamp(min=1)
            self._class_weight = torch.where(counts > 0, counts.sum() / known, 0.0) if self.class_weights else None
        self.evaluation.prepare(self.network.facts)

    def _build(self, facts: Facts) -> None:
        for name in self.missing:
            if name not in facts.modalities:
                known = ", ".join(facts.modalities)
                raise UserError(f"missing: expected one of {known}, got {name!r}{nearest(name, facts.modalities)}")
        if self.target == "score" and facts.score_range is None:
            raise UserError("target: expected classes, since the data have no scores; got score")
        if self.assessment is not None and self.soft is None and self.tree_weight > 0:
            self.tree = LabelTree.named(self._tree, facts.classes)
        outputs = 1 if self.target == "score" else len(facts.classes)
        body = self.make_network(facts.modalities, outputs)
        if isinstance(body, LearnsLabels):
            body.prepare(len(facts.clips))
        seed = derived_seed(run_seed(self._given_seed), "projections")
        self.network = EmotionNetwork(body, facts, outputs, self.assessment, seed)
        if self.tree is None and (self.soft is None or self.soft.hyperbolic == 0):  # then nothing trains them
            self.network.projections.requires_grad_(False)
        # What is remembered is the same on every process: DDP would send it around in every step.
        kept = {"lists": self.network.lists, "body": body}
        same = tuple(f"network.{name}." for name, part in kept.items() if isinstance(part, AnchorLists | LearnsLabels))
        names = [name for name, _ in self.named_buffers() if name.startswith(same)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def configure_optimizers(self) -> Any:
        assert self.network is not None
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return configure(parameters, self.make_optimizer, self.make_scheduler, self.lr_interval)

    def compile_networks(self, **options: Any) -> None:
        assert self.network is not None
        self.network.body.compile(**options)

    # ---- steps ----

    def on_fit_start(self) -> None:
        if self._class_weight is not None:
            self._class_weight = self._class_weight.to(self.device)
        if self.tree is not None:
            self.tree = self.tree.to(self.device)
        if self.network is not None and self.target == "score":
            self._levels = self.network.levels().to(self.device)

    def on_train_epoch_start(self) -> None:
        assert self.network is not None
        warm = self.assessment is None or self.current_epoch < self.assessment.warmup_epochs
        self.network.assessing = not warm
        lacking = {} if warm or self.network.lists is None or self._warned else self.network.lists.without_anchors()
        if any(lacking.values()):
            self._warned = True
            classes = self.network.facts.classes
            told = "; ".join(f"{name}: {', '.join(classes[k] for k in ks)}" for name, ks in lacking.items() if ks)
            rank_zero_warn(f"no anchors yet of some classes, whose most confident clips stand in ({told})")

    def forward(
        self, features: Mapping[str, Tensor], length: Mapping[str, Tensor], present: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """What is told of clips: see `EmotionNetwork.forward`."""
        assert self.network is not None
        return self.network(features, length, present)

    def _judged(self, batch: MultimodalBatch, split: Split) -> tuple[MultimodalBatch, Verdict]:
        """The batch without what is missing, and the verdict on it."""
        if self.missing:
            moment = self.global_step if split == "train" else split
            batch = lose(batch, self.missing, run_seed(self._given_seed), moment)
        return batch, self._verdict(batch, split)

    def _verdict(self, batch: MultimodalBatch, split: Split) -> Verdict:
        assert self.network is not None
        clip = batch.index if split == "train" else None
        return self.network.judge(batch.features, batch.length, batch.present, clip)

    def training_step(self, batch: MultimodalBatch, batch_idx: int) -> Tensor:
        assert self.network is not None
        batch, verdict = self._judged(batch, "train")
        terms = self._losses(batch, verdict)
        loss = torch.stack([self.tree_weight * term if name == "tree" else term for name, term in terms.items()]).sum()
        if verdict.points and not self.network.assessing:  # DDP waits for every weight, in the warm-up too
            loss = loss + 0.0 * torch.stack([point.sum() for point in verdict.points.values()]).sum()
        self._step = batch, verdict
        self._terms = {name: term.detach() for name, term in terms.items()}
        values = {"loss": loss.detach(), **self._terms, **self._facts_of(verdict)}
        log_step(self, {f"train/{name}": value for name, value in values.items()}, len(batch), over_processes=True)
        return loss

    def _losses(self, batch: MultimodalBatch, verdict: Verdict) -> dict[str, Tensor]:
        """The terms of the loss by name, that of the tree without its factor."""
        assert self.network is not None
        target, answer, assessed = self._target(batch), verdict.answer, verdict.assessed
        if self.soft is None or self.assessment is None:
            terms = {"task": staged_loss(answer, target, assessed, self._class_weight, batch.present)}
        else:
            terms = self.soft.terms(
                answer,
                target,
                batch.label,
                assessed,
                points=verdict.points,
                lists=self.network.lists,
                geometry=self.assessment.geometry,
                class_weight=self._class_weight,
                present=batch.present,
                levels=self._levels,
            )
        terms["task"] = terms["task"] * self._share(target)
        terms |= answer.terms
        if isinstance(self.network.body, LearnsLabels):
            terms |= self.network.body.losses(answer, target, batch.index, batch.present)
        if self.tree is not None and assessed is not None:
            terms["tree"] = self._tree_loss(verdict.points, assessed.pseudo)
        return terms

    def _share(self, target: Tensor) -> Tensor | float:
        """By how much the mean over this process' clips counts in that over all: as the weights of its classes do."""
        if self.trainer.world_size == 1 or self._class_weight is None or self.target == "score":
            return 1.0
        own = self._class_weight[target].sum()
        mean = self.trainer.strategy.reduce(own.clone(), reduce_op="mean")
        assert isinstance(mean, Tensor)
        return own / mean

    def _target(self, batch: MultimodalBatch) -> Tensor:
        """(N,) classes or scores."""
        if self.target == "classes":
            return batch.label
        assert batch.score is not None
        return batch.score

    def _tree_loss(self, points: Mapping[str, Tensor], pseudo: Mapping[str, Tensor]) -> Tensor:
        """Summed over the modalities: 1 less the correlation of distances in the tree and between classes."""
        assert self.assessment is not None
        assert self.tree is not None
        point, label = (torch.stack(list(each.values()), 1) for each in (points, pseudo))
        if self.gather:
            point, label = everyone(point), everyone(label)
        pairs = zip(point.unbind(1), label.unbind(1), strict=True)
        return torch.stack([hyp_cpcc(*pair, self.tree, self.assessment.geometry) for pair in pairs]).sum()

    def _facts_of(self, verdict: Verdict) -> dict[str, Tensor]:
        """How many anchors there are before the step, by modality, and the mean of κ."""
        assert self.network is not None
        lists, told = self.network.lists, {}
        if lists is not None:
            count = lists.written.clamp(max=lists.length).float()
            told = {f"anchors_{name}": count[k] for k, name in enumerate(lists.modalities)}
        if verdict.assessed is not None:
            told["consistency"] = verdict.assessed.consistency.mean()
        return told

    def on_train_batch_end(self, outputs: Any, batch: MultimodalBatch, batch_idx: int) -> None:
        """Remember the clips of the step, those of all processes, now that the optimiser has made its own."""
        if self._step is None or self.network is None:
            return
        (batch, verdict), self._step = self._step, None
        lists, body, answer = self.network.lists, self.network.body, verdict.answer
        learns = isinstance(body, LearnsLabels)
        if lists is None and not learns:
            return
        seen = {"clip": batch.index, "label": batch.label, "target": self._target(batch)}
        seen |= _prefixed("present", batch.present)
        if lists is not None:
            seen |= _prefixed("point", verdict.points)
            output = verdict.output.detach()
            seen["chosen"], seen["confidence"] = self.network.anchoring(output, batch.label, batch.score)
            seen |= {} if verdict.assessed is None else _prefixed("distance", verdict.assessed.distance)
        if learns:
            seen |= _prefixed("hidden", answer.hidden)
            seen |= {} if answer.fused is None else {"fused": answer.fused}
        seen = self._of_all_processes({name: value.detach() for name, value in seen.items()})
        present = _of(seen, "present")
        if lists is not None:
            lists.add(_of(seen, "point"), seen["label"], seen["clip"], seen["chosen"], seen["confidence"], present)
            if verdict.assessed is not None and self.assessment is not None:
                lists.observe(_of(seen, "distance"), self.assessment.range_momentum)
        if learns:
            told = Answer(answer.output, _of(seen, "hidden"), fused=seen.get("fused"))
            body.remember(told, seen["target"], seen["clip"], present, self.current_epoch)

    def _of_all_processes(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Values (N, ...) of the clips of all processes, by one collective: float64 holds all of them exactly."""
        if self.trainer.world_size == 1:
            return values
        packed = torch.cat([value.double().view(len(value), -1) for value in values.values()], 1)
        gathered = self.all_gather(packed)
        assert isinstance(gathered, Tensor)
        parts = gathered.flatten(0, 1).split([value[0].numel() for value in values.values()], 1)
        return {
            name: part.reshape(-1, *value.shape[1:]).to(value.dtype)
            for (name, value), part in zip(values.items(), parts, strict=True)
        }

    def on_train_epoch_end(self) -> None:
        assert self.network is not None
        if (lists := self.network.lists) is not None:
            counts = dict(zip(lists.modalities, lists.counts().tolist(), strict=True))
            self.history.add(epoch=self.current_epoch + 1, **counts)

    def validation_step(self, batch: MultimodalBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: MultimodalBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def _evaluate(self, batch: MultimodalBatch, split: Split) -> None:
        assert self.network is not None
        batch, verdict = self._judged(batch, split)
        self.evaluation.update(split, self.network, verdict, batch)
        target = self._target(batch)
        classes, output = self.target == "classes", verdict.output
        loss = F.cross_entropy(output, target) if classes else F.l1_loss(output[:, 0], target)
        values = {f"{split}/loss": loss}
        if verdict.assessed is not None:
            values[f"{split}/consistency"] = verdict.assessed.consistency.mean()
        log_evaluation(self, values, len(batch))

    def on_validation_epoch_start(self) -> None:
        self.evaluation.start("val")

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish("val"), sync_dist=True)

    def on_test_epoch_start(self) -> None:
        self.evaluation.start("test")

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish("test"), sync_dist=True)

    # ---- predictions ----

    def predict_step(self, batch: MultimodalBatch, batch_idx: int) -> dict[str, Tensor | list[str]]:
        """What is told of clips.

        Returns:
            ``index`` (N,), ``clip``, their names, and ``probabilities`` (N, C) or ``score`` (N,). Where clips are
            assessed also ``consistency`` (N,) and, a modality, ``says_NAME`` (N,) int64 class, -1 for none,
            ``typicality_NAME`` (N,) and ``anchor_NAME``, the name of the nearest training clip.
        """
        assert self.network is not None
        data = data_of(self, EmotionData)
        part = self.trainer.datamodule.predict_split  # type: ignore[attr-defined]
        verdict = self._verdict(batch, part)
        told, names = self.network.told(verdict), data.names(part)
        found: dict[str, Tensor | list[str]] = {"index": batch.index, "clip": [names[i] for i in batch.index.tolist()]}
        for field in ("probabilities", "score", "consistency"):
            if field in told:
                found[field] = told[field].float()
        for name in self.network.facts.modalities:
            if "says" in told:
                found[f"says_{name}"] = told["says"][name]
            if "anchor" in told:
                clips = self.network.facts.clips
                found[f"typicality_{name}"] = told["typicality"][name].float()
                found[f"anchor_{name}"] = [clips[i] if i >= 0 else "" for i in told["anchor"][name].tolist()]
        return found

    def collect(self, pieces: Callable[[], Iterator[Mapping[str, Any]]], directory: Path) -> dict[str, float]:
        """Write ``clips.csv``, a row a clip: see `lit_modules.tical.predictions`."""
        assert self.network is not None
        return write_table(pieces(), self.network.facts, directory / "clips.csv")

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/accuracy", "max") if self.target == "classes" else PrimaryMetric("val/mae", "min")

    def progress(self) -> Progress:
        return Progress("step", self.global_step)

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """train: anchors by class over the epochs. val, test: see `EmotionEvaluation.media`."""
        if self.network is None:
            return {}
        if split != "train":
            return self.evaluation.media(split, self.network)
        return pictures.anchors(self.history, self.network.facts.classes, tuple(self.network.facts.modalities))

    def export(self, directory: Path) -> list[Path]:
        """Write the network with its anchors for plain PyTorch: see `lit_modules.tical.export`."""
        if self.network is None:
            raise UserError("the network does not know its modalities yet; expected a fitted module or its checkpoint")
        return export_emotions(self.network, Path(directory))

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert self.network is not None
        checkpoint["emotions"] = {
            "facts": self.network.facts.data,
            "scaling": {name: list(moments) for name, moments in self.network.scaling.items()},
            "assessing": self.network.assessing,
            "history": self.history.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["emotions"]
        facts = Facts.read(saved["facts"])
        if self._meta is not None:
            facts.check(self._meta)
        if self.network is None or self.network.facts != facts:  # of other clips, whose number Self-MM's memory has
            self._build(facts)
        assert self.network is not None
        self.network.assessing = saved["assessing"]
        self.network.scaling = {name: (mean, deviation) for name, (mean, deviation) in saved["scaling"].items()}
        self.history.load_state_dict(saved["history"])


def _prefixed(prefix: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix} {name}": value for name, value in values.items()}


def _of(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What `_prefixed` was given."""
    return {name[len(prefix) + 1 :]: value for name, value in values.items() if name.startswith(f"{prefix} ")}
