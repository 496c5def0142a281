"""Training glue of judges of safety: hooks, optimisers, logging, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from leanlight.contracts import (
    IGNORED,
    SAFETY_FIELDS,
    Allows,
    MediaItem,
    PrimaryMetric,
    Progress,
    SafetyData,
    SafetySample,
    Split,
    TokenBatch,
    UserError,
    data_of,
    derived_seed,
    isolated_rng,
    run_seed,
)
from leanlight.contracts.ranges import PositiveFloat, PositiveInt
from lit_modules.falcon_eye import checkpoints, pictures
from lit_modules.falcon_eye.answering import Asking, language_layers
from lit_modules.falcon_eye.backbone import Backbone, PretrainedVLM, VLMSource
from lit_modules.falcon_eye.encoding import AnswerEnd, SafetyEncoder
from lit_modules.falcon_eye.evaluation import SafetyEvaluation
from lit_modules.falcon_eye.export import export_judge
from lit_modules.falcon_eye.losses import token_loss
from lit_modules.falcon_eye.predictions import outputs, write_verdicts
from lit_modules.falcon_eye.prompt import Prompt
from lit_modules.falcon_eye.tuning import FullTuning, LoRATuning, Tuning
from lit_modules.history import History
from lit_modules.hparams import save_hparams
from lit_modules.optim import configure
from lit_modules.step_log import log_evaluation, log_step


class SafetyJudge(LightningModule):
    """Train a vision-language model to judge instruction, picture and answer, in words that are read by a parser.

    Its answers are five lines (see `Prompt`), learned by next-token cross entropy. On validation data fields are judged
    by P(harmful) alone, one pass a batch; on test data answers are written and read, too.

    Args:
        backbone: makes the model with its processor: `PretrainedVLM` from a folder or a hub name, or `TinyVLM`.
        tuning: which weights train: `FullTuning` by default, or `LoRATuning`.
        prompt: how samples become questions and answers; `Prompt`'s own by default.
        max_length: tokens of question and answer at most; longer texts of users are cut, and counted.
        min_pixels: area below which pictures are enlarged, in pixels.
        max_pixels: area above which they are shrunk; the authors' is 360 x 360.
        answer_eos: what ends an answer in training: ``im_end``, the end of a turn; ``pad``, the authors' way; ``both``.
        loss_on: what is learned: the ``answer``, or ``answer+prompt``.
        field_loss_weight: how much more the words of judgements weigh in the loss than other tokens; positive.
        optimizer: makes the optimiser; AdamW with lr 0.00001 and no weight decay by default.
        lr_scheduler: makes the learning-rate schedule from the optimiser; constant by default.
        lr_interval: what a step of the schedule follows, ``step`` or ``epoch``.
        gradient_checkpointing: whether activations are computed anew in the backward pass, for less memory.
        max_new_tokens: of a written answer, at most.
        strict_parser: whether answers are read as the authors' evaluation reads them, or with patience.
        export_merged: of LoRA, whether an export holds the whole model with the changes added, or the adapter alone.
    """

    allows = Allows(sharded=True)
    collected_in = "verdicts"

    def __init__(
        self,
        backbone: VLMSource,
        tuning: Tuning | None = None,
        prompt: Prompt | None = None,
        max_length: PositiveInt = 8192,
        min_pixels: PositiveInt = 56 * 56,
        max_pixels: PositiveInt = 360 * 360,
        answer_eos: AnswerEnd = "im_end",
        loss_on: Literal["answer", "answer+prompt"] = "answer",
        field_loss_weight: PositiveFloat = 1.0,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "step",
        gradient_checkpointing: bool = False,
        max_new_tokens: PositiveInt = 512,
        strict_parser: bool = False,
        export_merged: bool = False,
    ) -> None:
        super().__init__()
        save_hparams(self)
        if loss_on not in ("answer", "answer+prompt"):
            raise UserError(f"loss_on: expected answer or answer+prompt, got {loss_on!r}")
        if not field_loss_weight > 0:
            raise UserError(f"field_loss_weight: expected a positive number, got {field_loss_weight}")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
        self.make_backbone, self.tuning, self.prompt = backbone, tuning or FullTuning(), prompt or Prompt()
        self._encoding: dict[str, Any] = {
            "max_length": max_length,
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "answer_eos": answer_eos,
        }
        self.loss_on, self.field_loss_weight = loss_on, field_loss_weight
        self.make_optimizer: Callable[..., torch.optim.Optimizer] = optimizer or partial(
            torch.optim.AdamW, lr=1e-5, weight_decay=0.0
        )
        self.make_scheduler, self.lr_interval = lr_scheduler, lr_interval
        self.gradient_checkpointing, self.max_new_tokens = gradient_checkpointing, max_new_tokens
        self.strict_parser, self.export_merged = strict_parser, export_merged
        self.backbone: Backbone | None = None
        self.network: Any = None  # what is called: the backbone's model, with adapters where there are some
        self._encoder: SafetyEncoder | None = None
        self.evaluation = SafetyEvaluation()
        self.history = History()
        self._terms: dict[str, Tensor] = {}
        self._data_facts: dict[str, Any] = {}

    # ---- set-up ----

    def setup(self, stage: str) -> None:
        """Make the model, with a tokenizer for the texts of the data where it has none, and what measures it."""
        data = data_of(self, SafetyData)
        if self.backbone is None:
            texts = (*self.prompt.texts(), *data.texts())
            self._build(self.make_backbone.build(texts), data.meta.fields)
        self.evaluation.prepare(data.meta.fields)
        if self._sharded and checkpoints.frozen(self.network) and isinstance(self.make_backbone, PretrainedVLM):
            raise UserError(
                "tuning: expected FullTuning of all weights with FSDP, whose checkpoints cannot leave out those that "
                f"rest, got {type(self.tuning).__name__}; use ddp (--config trainer/gpus)"
            )
        if stage == "fit":
            self._data_facts = {
                "name": data.meta.name,
                "counts": dict(data.meta.counts),
                "fingerprint": data.meta.fingerprint,
            }
            self.network.train()  # models come in evaluation mode, and Lightning leaves it so
            trained = sum(parameter.numel() for parameter in self.network.parameters() if parameter.requires_grad)
            total = sum(parameter.numel() for parameter in self.network.parameters())
            scale = f", low-rank changes times {self.tuning.scale:g}" if isinstance(self.tuning, LoRATuning) else ""
            rank_zero_info(f"{trained:,} of {total:,} weights train{scale}")
            cut = self.encoder.cut(data.samples("train"), targets=True)
            if cut.any():
                rank_zero_warn(
                    f"max_length: texts of {int((cut > 0).sum()):,} of {len(cut):,} training samples are cut, by "
                    f"{int(cut.sum()):,} tokens in all"
                )

    def _build(self, backbone: Backbone, fields: Sequence[str] = SAFETY_FIELDS) -> None:
        """Take a backbone, make what trains of it, and the encoder of its samples, whose fields are judged."""
        self.backbone = backbone
        with isolated_rng(derived_seed(run_seed(None), "adapters")):
            self.network = self.tuning.adapt(backbone.model)
        if self.gradient_checkpointing:
            model: Any = backbone.model
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()  # else nothing behind frozen embeddings has a gradient
        self._encoder = SafetyEncoder(backbone, self.prompt, **self._encoding, fields=fields)

    @property
    def encoder(self) -> SafetyEncoder:
        """What turns samples into batches; the DataModule asks for it."""
        if self._encoder is None:
            raise UserError("the judge has no tokenizer yet; expected a fitted module or its checkpoint")
        return self._encoder

    def configure_optimizers(self) -> Any:
        parameters = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        return configure(parameters, self.make_optimizer, self.make_scheduler, self.lr_interval)

    def compile_networks(self, **options: Any) -> None:
        """Compile the layers of the language model; the vision tower cuts pictures apart by their sizes."""
        for layer in language_layers(self.network):
            layer.compile(**options)

    # ---- steps ----

    def forward(self, batch: TokenBatch, keep: int = 0) -> Tensor:
        """Logits (N, K, V) of the last `keep` positions of a batch, of all for 0."""
        inputs = self.encoder.batch_inputs(replace(batch, labels=None))  # the loss is ours
        return self.network(**inputs, logits_to_keep=keep, use_cache=False).logits

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        loss, weight = self._loss(batch)
        mean = loss / weight.clamp(min=1e-12)
        self._terms = {"cross_entropy": mean.detach()}
        padding = 1 - batch.attention_mask.float().mean()
        values = {"train/loss": mean.detach(), "train/padding": padding, "train/learned_tokens": weight}
        log_step(self, values, len(batch), over_processes=True)
        return (mean + self._unseen(batch)) * self._share(weight)

    def _loss(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Summed cross entropy of the tokens that are learned, and their number, both by their weights."""
        labels = batch.labels
        assert labels is not None
        if self.loss_on == "answer+prompt":
            learned = (batch.attention_mask == 1) & (batch.token_types == 0)
            labels = torch.where(learned, batch.input_ids, IGNORED)
        weights = torch.ones_like(labels, dtype=torch.float32)
        if self.field_loss_weight != 1:
            words = torch.isin(batch.labels, self.encoder.label_ids.to(labels.device))  # type: ignore[arg-type]
            weights = torch.where(words, self.field_loss_weight, weights)
        kept = batch.learned if self.loss_on == "answer" else 0
        return token_loss(self(batch, kept), labels, weights)

    def _unseen(self, batch: TokenBatch) -> Tensor | float:
        """0, by way of the weights that see pictures where the batch shows none: other processes wait for gradients."""
        if self.trainer.world_size == 1 or any(len(patches) for patches in batch.pixel_values):
            return 0.0
        trained = [(name, weights) for name, weights in self.network.named_parameters() if weights.requires_grad]
        seeing = [weights.sum() for name, weights in trained if "visual" in name or "vision" in name]
        return 0 * torch.stack(seeing).sum() if seeing else 0.0

    def _share(self, weight: Tensor) -> Tensor | float:
        """By how much the mean over this process' tokens counts in that over all."""
        if self.trainer.world_size == 1:
            return 1.0
        mean = self.trainer.strategy.reduce(weight.clone(), reduce_op="mean")
        assert isinstance(mean, Tensor)
        return weight / mean.clamp(min=1e-12)

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        samples = self._samples("val", batch.index)
        loss, weight = self._loss(batch)
        # A mean over the tokens of all batches and processes.
        log_evaluation(self, {"val/loss": loss / weight}, float(weight))
        self.evaluation.update("val", samples, self._asking(scores=True).verdicts_on(batch))

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        samples = self._samples("test", batch.index)
        self.evaluation.update("test", samples, self._asking().verdicts_on(batch))

    def _samples(self, split: str, index: Tensor) -> list[SafetySample]:
        samples = data_of(self, SafetyData).samples(split)
        return [samples[place] for place in index.tolist()]

    def _asking(self, scores: bool = False) -> Asking:
        """The network as it is asked; with `scores`, without writing where that gives judgements."""
        quick = scores and self.prompt.order == "judgments_first"
        return Asking(
            self.network,
            self.encoder,
            mode="score_only" if quick else "generate",
            max_new_tokens=self.max_new_tokens,
            strict=self.strict_parser,
        )

    def on_validation_epoch_start(self) -> None:
        self.evaluation.start("val")

    def on_validation_epoch_end(self) -> None:
        self.log_dict(
            self.evaluation.finish("val", written=self._asking(scores=True).mode == "generate"), sync_dist=True
        )
        if self.trainer.sanity_checking:
            return
        figures = self.evaluation.figures("val")
        by_field = {f"accuracy_{name}": figures.get(f"{name}_accuracy", math.nan) for name in self.evaluation.fields}
        self.history.add(step=self.global_step, loss=float(self.trainer.callback_metrics["val/loss"]), **by_field)

    def on_test_epoch_start(self) -> None:
        self.evaluation.start("test")

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.evaluation.finish("test"), sync_dist=True)

    # ---- predictions ----

    def on_predict_start(self) -> None:
        """Refuse to judge what the prompt hides: see `Prompt.require_shown`."""
        part = self.trainer.datamodule.predict_split  # type: ignore[attr-defined]
        self.prompt.require_shown(self.encoder.fields, data_of(self, SafetyData).samples(part))

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> dict[str, Tensor | list[str]]:
        """Verdicts on samples.

        Returns:
            ``index`` (N,), ``sample``, their names, by field ``FIELD``, what is said of it, and ``p_FIELD`` (N,),
            P(harmful), NaN where there is none; ``categories``, ``explanation``, ``text`` and ``failure``.
        """
        part = self.trainer.datamodule.predict_split  # type: ignore[attr-defined]
        samples = self._samples(part, batch.index)
        return outputs(batch.index, samples, self._asking().verdicts_on(batch), self.encoder.fields)

    def collect(self, pieces: Callable[[], Iterator[Mapping[str, Any]]], directory: Path) -> dict[str, float]:
        """Write ``verdicts.jsonl``, a line a sample: see `lit_modules.falcon_eye.predictions`."""
        return write_verdicts(pieces(), self.encoder.fields, directory / "verdicts.jsonl")

    # ---- what callbacks and commands ask ----

    @property
    def primary_metric(self) -> PrimaryMetric:
        return PrimaryMetric("val/balanced_accuracy", "max")

    def progress(self) -> Progress:
        return Progress("step", self.global_step)

    def loss_terms(self) -> Mapping[str, Tensor | float]:
        return self._terms

    def media(self, split: Split) -> Mapping[str, MediaItem]:
        """train: loss and accuracies on validation data over the steps. val, test: see `SafetyEvaluation.media`."""
        if split == "train":
            return pictures.curves(self.history, self.evaluation.fields)
        return self.evaluation.media(split)

    @property
    def _sharded(self) -> bool:
        """Whether no process holds all weights outside of its steps."""
        return self._trainer is not None and isinstance(self.trainer.strategy, FSDPStrategy)

    def export(self, directory: Path) -> list[Path]:
        """Write model or adapter, processor and card for transformers: see `lit_modules.falcon_eye.export`.

        Nothing while FSDP spreads the weights over processes: the checkpoint has them whole.
        """
        if self._sharded:
            rank_zero_warn("no export while weights are sharded; `leanlight export RUN` makes it of the checkpoint")
            return []
        whole = self.export_merged or not isinstance(self.make_backbone, PretrainedVLM)
        return export_judge(self.network, self.encoder, self.about(), Path(directory), whole)

    def about(self) -> dict[str, Any]:
        """What a judge is beside its weights, in plain containers: base, data, question, settings, thresholds."""
        backbone = self.encoder.backbone
        return {
            "base": {"name": backbone.name, "digest": backbone.digest},
            "data": self._data_facts,
            "prompt": asdict(self.prompt),
            "encoding": self.encoder.settings,
            "max_new_tokens": self.max_new_tokens,
            "strict_parser": self.strict_parser,
            "thresholds": self.evaluation.thresholds,
        }

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        backbone = self.encoder.backbone
        if isinstance(self.make_backbone, PretrainedVLM):
            base = {"name": backbone.name, "digest": backbone.digest}
            checkpoints.leave_out(checkpoint, self.network, "network.", base)
        checkpoint["judge"] = {
            "tokenizer": None if isinstance(self.make_backbone, PretrainedVLM) else backbone.tokenizer_json,
            "fields": list(self.encoder.fields),
            "data": self._data_facts,
            "thresholds": dict(self.evaluation.thresholds),
            "history": self.history.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint["judge"]
        backbone, tokenizer = self.backbone, saved["tokenizer"]
        if backbone is None or (tokenizer is not None and backbone.tokenizer_json != tokenizer):
            backbone = self.make_backbone.build(tokenizer=tokenizer)
            self._build(backbone, saved["fields"])
        elif list(self.encoder.fields) != saved["fields"]:  # what it was trained to judge, whatever these data have
            self._encoder = SafetyEncoder(backbone, self.prompt, **self._encoding, fields=saved["fields"])
        base = {"name": backbone.name, "digest": backbone.digest}
        checkpoints.complete(checkpoint, self.network, "network.", base)
        self._data_facts = dict(saved["data"])
        self.evaluation.thresholds = dict(saved["thresholds"])
        self.history.load_state_dict(saved["history"])
