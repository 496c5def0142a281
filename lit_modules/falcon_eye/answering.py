"""Ask a vision-language model for verdicts: scores in one pass, or answers that it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from leanlight.contracts import SafetySample, TokenBatch, UserError, Verdict, nearest, uncompiled
from leanlight.contracts.ranges import FiniteFloat, PositiveInt
from lit_modules.falcon_eye.encoding import SafetyEncoder, harm_scores
from lit_modules.falcon_eye.judges import refused
from lit_modules.falcon_eye.parsing import parse

Mode = Literal["generate", "score_only"]


@dataclass(frozen=True)
class Asking:
    """A model that is asked about samples.

    Args:
        model: of transformers, or with adapters around it; in evaluation mode where verdicts shall not be drawn.
        encoder: of its samples.
        mode: ``generate``: it writes answers, greedily, and gives scores where its prompt has judgements first;
            ``score_only``: scores alone, in one pass.
        max_new_tokens: of a written answer, at most.
        strict: whether answers are read as the authors read them: see `parse`.
        thresholds: of ``score_only``, by field the score from which on it is harmful; 1/2 where there is none.
    """

    model: Any
    encoder: SafetyEncoder
    mode: Mode = "generate"
    max_new_tokens: PositiveInt = 512
    strict: bool = False
    thresholds: tuple[tuple[str, FiniteFloat], ...] = ()

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            valid = get_args(Mode)
            raise UserError(f"mode: expected {' or '.join(valid)}, got {self.mode!r}{nearest(self.mode, valid)}")
        if self.mode == "score_only" and not self.scores:
            raise UserError("mode: score_only needs a prompt with judgments_first, got explanation_first")

    @property
    def scores(self) -> bool:
        """Whether there are scores: a judgement that follows an explanation has none before that is written."""
        return self.encoder.prompt.order == "judgments_first"

    def verdicts(self, samples: Sequence[SafetySample]) -> list[Verdict]:
        """A verdict a sample; what cannot be asked, such as one whose picture is unreadable, is that one's failure."""
        try:
            batch = self.encode(samples)
        except UserError as error:
            if len(samples) == 1:
                nothing: dict[str, bool | None] = dict.fromkeys(self.encoder.fields)
                return [Verdict(nothing, failure=str(error))]
            return [verdict for sample in samples for verdict in self.verdicts([sample])]
        return self.verdicts_on(batch)

    def encode(self, samples: Sequence[SafetySample]) -> TokenBatch:
        """The samples' questions, where the model is; UserError for what cannot be asked."""
        return self.encoder.encode(samples, torch.arange(len(samples)), targets=False).to(self._device)

    def verdicts_on(self, batch: TokenBatch) -> list[Verdict]:
        """A verdict for each sample of a batch of the encoder; what it holds of answers is not looked at."""
        question = self.encoder.questions(batch)
        scores = self.harm(question) if self.scores else None
        rows = [[]] * len(question) if scores is None else scores.tolist()
        by_field = [dict(zip(self.encoder.fields, row, strict=False)) for row in rows]
        if self.mode == "score_only":
            least = dict(self.thresholds)
            return [
                Verdict({name: score >= least.get(name, 0.5) for name, score in own.items()}, own) for own in by_field
            ]
        read = [self._read(text) for text in self.write(question)]
        return [replace(verdict, scores=own) for verdict, own in zip(read, by_field, strict=True)]

    def _read(self, text: str) -> Verdict:
        verdict = parse(text, self.strict)
        labels = {name: verdict.labels[name] for name in self.encoder.fields}
        return replace(verdict, labels=labels, refused=refused(text))

    @torch.no_grad()
    def harm(self, batch: TokenBatch) -> Tensor:
        """(N, F) float32 scores in [0, 1] by the encoder's fields: see `SafetyEncoder.judgements`."""
        longer, places = self.encoder.judgements(batch)
        keep = longer.input_ids.shape[1] - places[0]
        logits = self.model(**self.encoder.batch_inputs(longer), logits_to_keep=keep, use_cache=False).logits
        return harm_scores(logits[:, [place - places[0] for place in places]], self.encoder.label_ids).cpu()

    @torch.no_grad()
    def write(self, batch: TokenBatch) -> list[str]:
        """What the model answers, greedily; without special tokens."""
        question = self.encoder.questions(batch)
        backbone = self.encoder.backbone
        with uncompiled():  # a compiled layer would be compiled anew for every length
            ids = self.model.generate(
                **self.encoder.batch_inputs(question),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                eos_token_id=self.encoder.stop_ids,
                pad_token_id=backbone.pad_id,
            )
        written = ids[:, question.input_ids.shape[1] :]
        return list(backbone.tokenizer.batch_decode(written, skip_special_tokens=True))

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def language_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the language model inside a vision-language model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [(name, part) for name, part in model.named_modules() if isinstance(part, GradientCheckpointingLayer)]
    return [part for name, part in layers if "visual" not in name and "vision" not in name]
