"""From samples to what a vision-language model takes, so that no text of a sample can pass for more than text.

The wording of the question, each text of a sample and the answer are tokenised apart. Texts of samples go through a
tokenizer that knows no special tokens, and placeholders of pictures are put in as ids: whatever a text says, it opens
no turn, ends none and adds no picture. That it may *claim* anything in plain words remains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from leanlight.contracts import (
    IGNORED,
    SAFETY_FIELDS,
    SafetySample,
    TokenBatch,
    UserError,
    learned_positions,
    nearest,
)
from leanlight.contracts.ranges import PositiveInt
from lit_modules.falcon_eye.backbone import Backbone, as_utf8
from lit_modules.falcon_eye.prompt import END_OF_TEXT, PictureSlot, Prompt, Text
from lit_modules.nn.checks import first_line, require_positive

AnswerEnd = Literal["im_end", "pad", "both"]
_WIDEST, _NARROWED = 200, 180  # side ratios: what Qwen's image processor still takes, what others are brought to
_AT_ONCE = 1024  # samples that are measured together


@dataclass(frozen=True)
class _Slot:
    """A place in a template: of the picture, or of a text by its field."""

    field: str


@dataclass(frozen=True)
class _Row:
    """A sample as tokens.

    Args:
        ids: question, and answer if any.
        answer: how many of them are the answer.
        cut: tokens of its texts that had no room.
    """

    ids: list[int]
    answer: int
    cut: int


class SafetyEncoder:
    """Samples as batches of tokens and patches, for one model and one prompt.

    What does not fit into `max_length` is cut off the end of the longer of instruction and response until both are
    equally long, then off both; `cut` counts it. Placeholders, the question's wording and the answer stay whole.

    Args:
        backbone: the model with its processor.
        prompt: how samples become questions and answers.
        max_length: most tokens of question, picture and answer together.
        min_pixels: area to which smaller pictures are enlarged.
        max_pixels: area to which larger ones are shrunk; the authors' gives at most 165 tokens a picture.
        answer_eos: what ends an answer in training: ``im_end``, the token that ends the model's turns; ``pad``, the one
            that fills rows, as the authors have it; or ``both``, one after the other.
        fields: of `SAFETY_FIELDS`, in their order, those that are judged: the lines that answers have in training.

    Raises:
        UserError: sizes that make no sense, or a processor or chat template of a layout that is not supported.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt: Prompt | None = None,
        max_length: PositiveInt = 8192,
        min_pixels: PositiveInt = 56 * 56,
        max_pixels: PositiveInt = 360 * 360,
        answer_eos: AnswerEnd = "im_end",
        fields: Sequence[str] = SAFETY_FIELDS,
    ) -> None:
        require_positive(max_length=max_length, min_pixels=min_pixels)
        if max_pixels < min_pixels:
            raise UserError(f"max_pixels: expected at least min_pixels {min_pixels}, got {max_pixels}")
        if answer_eos not in get_args(AnswerEnd):
            valid = get_args(AnswerEnd)
            raise UserError(
                f"answer_eos: expected one of {', '.join(valid)}, got {answer_eos}{nearest(answer_eos, valid)}"
            )
        self.backbone, self.prompt, self.max_length = backbone, prompt or Prompt(), max_length
        self.fields = tuple(fields)
        ends = {"im_end": [backbone.end_id], "pad": [backbone.pad_id], "both": [backbone.end_id, backbone.pad_id]}
        self._answer_eos, self._end_ids = answer_eos, ends[answer_eos]
        #: Tokens at which generation stops, whichever of them a model was trained with.
        self.stop_ids = list(dict.fromkeys(ends["both"]))
        self._pixels = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        self._text = _PlainTokenizer(backbone)
        self._end_of_text = self._text.ids([END_OF_TEXT])[0]
        self._templates: dict[bool, list[list[int] | _Slot]] = {}
        self._patch_counts: dict[str, int] = {}
        self._read_layout()

    @property
    def pad_id(self) -> int:
        """Of the token that fills rows."""
        return self.backbone.pad_id

    @property
    def settings(self) -> dict[str, Any]:
        """What it was made with beside backbone and prompt, by argument."""
        fixed = {"max_length": self.max_length, "answer_eos": self._answer_eos, "fields": list(self.fields)}
        return {**self._pixels, **fixed}

    def question(self) -> str:
        """The whole turn of a sample with a picture as text, with ``{instruction}`` and ``{response}`` in their places.

        For users of other programs. Put texts there only where no text can hold special tokens.
        """
        rendered = self._rendered(SafetySample("", "", "", image=_AnyPicture()))
        return re.sub(_mark("([a-z]+)"), lambda found: self._filling(found[1]), rendered)

    def _filling(self, field: str) -> str:
        return self.prompt.system if field == "system" else f" {{{field}}}{END_OF_TEXT}"

    def lengths(self, samples: Sequence[SafetySample], targets: bool) -> Tensor:
        """(N,) int64 tokens that each sample takes, with or without its answer, without padding.

        Raises:
            UnreadablePictureError: a picture that cannot be measured. Each is decoded once, then its size is known.
        """
        return torch.tensor([len(row.ids) for row in self._measured(samples, targets)], dtype=torch.long)

    def cut(self, samples: Sequence[SafetySample], targets: bool) -> Tensor:
        """(N,) int64 tokens of instruction and response that `encode` leaves out of each sample, 0 where all fits."""
        return torch.tensor([row.cut for row in self._measured(samples, targets)], dtype=torch.long)

    def encode(self, samples: Sequence[SafetySample], index: Tensor, targets: bool) -> TokenBatch:
        """Samples as a batch: with targets padded on the right, for training; without on the left, to be continued.

        Args:
            samples: N of them.
            index: (N,) int64, their positions in the split.
            targets: whether the answers that a judge shall learn follow the questions. Labels are -100 but on them and
                on the token that ends them.

        Raises:
            UserError: a sample that does not fit even without its texts, or has no label to learn.
            UnreadablePictureError: a picture that cannot be decoded.
        """
        return self._batch(samples, index, self._answers(samples, targets), targets)

    def questions(self, batch: TokenBatch) -> TokenBatch:
        """The questions of a batch without the answers behind them, padded on the left, to be continued."""
        if batch.labels is None:
            return batch
        asked = (batch.attention_mask == 1) & (batch.labels == IGNORED)
        longest = int(asked.sum(1).max())
        order = asked.long().argsort(dim=1, stable=True)[:, -longest:]  # questions move to the ends of their rows
        real = asked.gather(1, order)
        return replace(
            batch,
            input_ids=batch.input_ids.gather(1, order).where(real, self.pad_id),
            attention_mask=real.long(),
            labels=None,
            token_types=batch.token_types.gather(1, order) * real,
        )

    def judgements(self, batch: TokenBatch) -> tuple[TokenBatch, list[int]]:
        """Questions and the beginning of their answer up to the last judgement, for scores without generation.

        One forward pass scores all fields: rows are padded on the left, so positions are the same for all of them, and
        ``logits_to_keep`` spares the model those before the first. The judgements in the answer's beginning say Benign
        for every sample. So the score of the first field is the model's own, and those of the later ones are
        conditional: *had all before been found benign, how likely is harm here?* They rank samples under one condition
        for all of them. What the model says when it is free to say Harmful before may differ; read that off an answer.

        Args:
            batch: of `encode`, with or without targets.

        Returns:
            The batch, without labels, and by field that is judged the position whose logits predict the judgement.
            `harm_scores` turns them into scores.

        Raises:
            UserError: a prompt whose judgements follow an explanation, which only generation gives.
        """
        if self.prompt.order == "explanation_first":
            raise UserError("order: scores without generation need judgments_first, got explanation_first")
        beginning, places, _ = self._judgements
        asked = self.questions(batch)
        said = torch.tensor(beginning, device=asked.input_ids.device).expand(len(asked), -1)
        first = asked.input_ids.shape[1] - 1
        longer = replace(
            asked,
            input_ids=torch.cat([asked.input_ids, said], 1),
            attention_mask=torch.cat([asked.attention_mask, torch.ones_like(said)], 1),
            token_types=torch.cat([asked.token_types, torch.zeros_like(said)], 1),
        )
        return longer, [first + place for place in places]

    @property
    def label_ids(self) -> Tensor:
        """(F, 2) int64, by field the first token in which the words Harmful and Benign differ."""
        return torch.tensor(self._judgements[2])

    def batch_inputs(self, batch: TokenBatch) -> dict[str, Tensor]:
        """What ``model(**inputs)`` and ``model.generate(**inputs)`` take; patches of all pictures follow each other."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self.backbone.takes_token_types:
            inputs["mm_token_type_ids"] = batch.token_types
        if batch.labels is not None:
            inputs["labels"] = batch.labels
        shown = [item for item, patches in enumerate(batch.pixel_values) if len(patches)]
        if shown:
            inputs["pixel_values"] = torch.cat(batch.pixel_values)
            inputs["image_grid_thw"] = batch.grid if len(shown) == len(batch) else batch.grid[shown]
        return inputs

    def _batch(
        self, samples: Sequence[SafetySample], index: Tensor, answers: Sequence[list[int]], targets: bool
    ) -> TokenBatch:
        """Rows padded to the longest, and pictures."""
        patches, grid = self._pictures(samples)
        placeholders = (grid.prod(1) // self._merged).tolist()
        rows = list(self._rows(samples, placeholders, answers))
        # Padding on the left is padding on the right of rows from their end. PyTorch's own way has no decomposition,
        # and so fails where operations are counted.
        ends = [torch.tensor(row.ids if targets else row.ids[::-1]) for row in rows]
        ids = pad_sequence(ends, batch_first=True, padding_value=self.pad_id)
        ids = ids if targets else ids.flip(1)
        length = torch.tensor([len(row.ids) for row in rows])[:, None]
        position = torch.arange(ids.shape[1]) - (0 if targets else ids.shape[1] - length)
        real = (position >= 0) & (position < length)
        labels = None
        if targets:  # by position: the token that fills rows may be the one that ends answers
            answer = real & (position >= length - torch.tensor([row.answer for row in rows])[:, None])
            labels = torch.where(answer, ids, IGNORED)
        token_types = (ids == self.backbone.image_token_id).long()
        learned = 0 if labels is None else learned_positions(labels)
        return TokenBatch(ids, real.long(), labels, token_types, patches, grid, index, learned)

    def _measured(self, samples: Sequence[SafetySample], targets: bool) -> Iterator[_Row]:
        for start in range(0, len(samples), _AT_ONCE):
            part = samples[start : start + _AT_ONCE]
            yield from self._rows(part, [self._placeholders(sample) for sample in part], self._answers(part, targets))

    def _answers(self, samples: Sequence[SafetySample], targets: bool) -> list[list[int]]:
        """Of each sample the answer with its end, without targets nothing."""
        if not targets:
            return [[]] * len(samples)
        return [ids + self._end_ids for ids in self._text.ids([self.prompt.target(sample) for sample in samples])]

    def _rows(
        self, samples: Sequence[SafetySample], placeholders: Sequence[int], answers: Sequence[list[int]]
    ) -> Iterator[_Row]:
        """Of each sample its tokens: template, placeholders, texts cut to what fits, answer."""
        texts = [{piece.field: piece.text for piece in self.prompt.user_texts(sample)} for sample in samples]
        ids = iter(self._text.ids([text for of_sample in texts for text in of_sample.values()]))
        for sample, of_sample, count, answer in zip(samples, texts, placeholders, answers, strict=True):
            template = self._template(sample)
            filled = {field: next(ids) for field in of_sample}
            fixed = sum(len(part) for part in template if not isinstance(part, _Slot)) + count + len(answer)
            cut = self._fit(filled, self.max_length - fixed, sample)
            filled["picture"] = [self.backbone.image_token_id] * count
            row: list[int] = []
            for part in template:
                row += filled[part.field] if isinstance(part, _Slot) else part
            yield _Row(row + answer, len(answer), cut)

    def _fit(self, texts: dict[str, list[int]], room: int, sample: SafetySample) -> int:
        """Cut texts, in place, to `room` tokens in all; how many are lost. Each keeps its end of line."""
        end = self._end_of_text
        needed = len(texts) * len(end)
        if room < needed:
            least = self.max_length - room + needed
            raise UserError(
                f"max_length: sample {sample.id!r} takes at least {least} tokens even without its texts, got "
                f"{self.max_length}; raise it, or lower max_pixels"
            )
        lost = max(sum(map(len, texts.values())) - room, 0)
        for position, field in enumerate(sorted(texts, key=lambda field: len(texts[field]))) if lost else ():
            # From the shorter to the longer, each has its share of what is left, so that a short one stays whole.
            share = room // (len(texts) - position)
            if len(texts[field]) > share:
                texts[field] = texts[field][: share - len(end)] + end
            room -= len(texts[field])
        return lost

    def _template(self, sample: SafetySample) -> list[list[int] | _Slot]:
        """The question of samples like this one as ids and slots; there are two, with and without a picture."""
        shown = self.prompt.shows_picture(sample)
        if shown not in self._templates:
            self._templates[shown] = self._read_template(self._rendered(sample), shown)
        return self._templates[shown]

    def _rendered(self, sample: SafetySample) -> str:
        """The question in the model's chat template, with marks where texts go."""
        pictures: list[dict[str, str]] = []
        words = ""  # one text, as templates may put something between several
        for piece in self.prompt.pieces(sample):
            if isinstance(piece, PictureSlot):
                pictures.append({"type": "image"})
            else:
                words += piece.text if isinstance(piece, Text) else _mark(piece.field)
        user = {"role": "user", "content": [*pictures, _said(words)]}
        render = self.backbone.processor.apply_chat_template
        try:
            if self.prompt.system == "default":
                return str(render([user], add_generation_prompt=True))
            if self.prompt.system != "none":
                system = {"role": "system", "content": [_said(_mark("system"))]}
                return str(render([system, user], add_generation_prompt=True))
            # Templates put a system turn of their own before the first question, so this one comes second.
            before = [{"role": "user", "content": [_said("?")]}, {"role": "assistant", "content": [_said("!")]}]
            whole, beginning = str(render([*before, user], add_generation_prompt=True)), str(render(before))
        except Exception as error:  # of a template of any content
            raise UserError(f"backbone: its chat template cannot be used ({first_line(error)})") from error
        if not whole.startswith(beginning):
            raise UserError("system: the chat template of this model does not let a turn stand alone, expected default")
        return whole.removeprefix(beginning)

    def _read_template(self, rendered: str, shown: bool) -> list[list[int] | _Slot]:
        """A rendered question as ids and slots."""
        image_token = self.backbone.processor.image_token
        parts = re.split(f"({_mark('[a-z]+')}|{re.escape(image_token)})", rendered)
        template: list[list[int] | _Slot] = []
        for part in parts:
            if part == image_token:
                template.append(_Slot("picture"))
            elif found := re.fullmatch(_mark("([a-z]+)"), part):
                template.append(self._text.ids([self.prompt.system])[0] if found[1] == "system" else _Slot(found[1]))
            elif part:
                template.append(list(self.backbone.tokenizer(part, add_special_tokens=False)["input_ids"]))
        slots = sorted(part.field for part in template if isinstance(part, _Slot))
        texts = [] if self.prompt.modality == "image_only" else ["instruction", "response"]
        if slots != sorted(texts + ["picture"] * shown):
            raise UserError(
                f"backbone: expected a chat template that shows a picture as one {image_token} and text as it is, "
                f"it shows {', '.join(slots) or 'neither'}"
            )
        return template

    def _pictures(self, samples: Sequence[SafetySample]) -> tuple[tuple[Tensor, ...], Tensor]:
        """By sample, its patches and its grid; nothing and zeros where it shows no picture."""
        shown = [place for place, sample in enumerate(samples) if self.prompt.shows_picture(sample)]
        patches = [self._no_patches] * len(samples)
        grid = torch.zeros(len(samples), 3, dtype=torch.long)
        if shown:
            values, grid[shown] = self._processed([samples[place].image.pixels() for place in shown])  # type: ignore[union-attr]
            for place, own in zip(shown, values.split(grid[shown].prod(1).tolist()), strict=True):
                patches[place] = own
        return tuple(patches), grid

    def _processed(self, pictures: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Patches of (3, H, W) uint8 pictures, one after the other, and their grids; those of one size go together."""
        area = {"shortest_edge": self._pixels["min_pixels"], "longest_edge": self._pixels["max_pixels"]}
        output = self.backbone.image_processor(
            images=[self._widened(pixels) for pixels in pictures],
            size=area,  # areas, in spite of their names
            return_tensors="pt",
            input_data_format="channels_first",
            disable_grouping=False,
        )
        return output["pixel_values"], output["image_grid_thw"]

    def _read_layout(self) -> None:
        """Learn from a blank picture what patches are like, so that a processor of another layout is found at once."""
        images = self.backbone.image_processor
        try:
            self._factor, self._merged = images.patch_size * images.merge_size, images.merge_size**2
            values, grid = self._processed([torch.zeros(3, 56, 56, dtype=torch.uint8)])
            if values.ndim == 2 and len(values) == int(grid.prod()):
                self._no_patches = values[:0]
                return
            got = f"pixel_values {tuple(values.shape)} for a grid {grid.tolist()}"
        except Exception as error:  # of a processor of any kind
            got = first_line(error)
        raise UserError(f"backbone: expected an image processor that gives rows of patches and their grid, got {got}")

    def _widened(self, pixels: Tensor) -> Tensor:
        """A picture at least as large as a patch, and not so narrow that the image processor refuses it."""
        size = self._smallest(*pixels.shape[1:])
        if size == tuple(pixels.shape[1:]):
            return pixels
        resized = F.interpolate(pixels[None].float(), size, mode="bilinear", antialias=True)[0]
        return resized.round().clamp(0, 255).byte()

    def _smallest(self, height: int, width: int) -> tuple[int, int]:
        """The size to which a picture is brought before the image processor resizes it; nearly always its own."""
        height, width = max(height, self._factor), max(width, self._factor)
        if height > _WIDEST * width:
            height = _NARROWED * width
        elif width > _WIDEST * height:
            width = _NARROWED * height
        return height, width

    def _placeholders(self, sample: SafetySample) -> int:
        """Tokens that a sample's picture takes."""
        if not self.prompt.shows_picture(sample):
            return 0
        picture = sample.image
        assert picture is not None
        if picture.sha256 not in self._patch_counts:
            size = self._smallest(*picture.pixels().shape[1:])
            count = self.backbone.image_processor.get_number_of_image_patches(*size, self._pixels)
            self._patch_counts[picture.sha256] = int(count) // self._merged
        return self._patch_counts[picture.sha256]

    @cached_property
    def _judgements(self) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        """The beginning of an answer up to its last judgement, the places of all, and what may stand there."""
        benign = dict.fromkeys(self.fields, False)
        variants = [benign, *({**benign, field: True} for field in self.fields)]
        base, *others = self._text.ids([self.prompt.judgements(labels) for labels in variants])
        places = [
            next(place for place, (ours, theirs) in enumerate(zip(base, other, strict=False)) if ours != theirs)
            for other in others
        ]
        pairs = [(other[place], base[place]) for other, place in zip(others, places, strict=True)]
        return base[: places[-1]], places, pairs


def harm_scores(logits: Tensor, label_ids: Tensor) -> Tensor:
    """(N, F) scores P(Harmful) / (P(Harmful) + P(Benign)) in [0, 1], float32.

    Args:
        logits: (N, F, V) at the positions of `SafetyEncoder.judgements`.
        label_ids: (F, 2), of `SafetyEncoder.label_ids`.
    """
    chosen = logits.gather(2, label_ids.to(logits.device).expand(len(logits), -1, -1)).float()
    return (chosen[..., 0] - chosen[..., 1]).sigmoid()


class _PlainTokenizer:
    """A tokenizer that takes every text for text.

    ``split_special_tokens=True`` of transformers is not enough: it leaves tokens that were added without being special,
    and some of these, such as Qwen's ``<tool_call>``, steer a model too. So this is a copy without added tokens.

    Args:
        backbone: whose tokenizer it is.

    Raises:
        UserError: one that makes a special token of plain text even so.
    """

    def __init__(self, backbone: Backbone) -> None:
        from tokenizers import Tokenizer

        state = json.loads(backbone.tokenizer_json)
        added = state["added_tokens"]
        state.update(added_tokens=[], post_processor=None)
        self._tokenizer = Tokenizer.from_str(json.dumps(state))
        for token, ids in zip(added, self.ids([token["content"] for token in added]), strict=True):
            if token["id"] in ids and (token["special"] or token["id"] == backbone.image_token_id):
                raise UserError(f"backbone: its tokenizer takes the text {token['content']!r} for a special token")

    def ids(self, texts: list[str]) -> list[list[int]]:
        """Of each text its tokens; one call for all."""
        encoded = self._tokenizer.encode_batch([as_utf8(text) for text in texts], add_special_tokens=False)
        return [encoding.ids for encoding in encoded]


class _AnyPicture:
    """Stands for a picture where only its being there matters."""

    name, sha256 = "picture", ""

    def pixels(self) -> Tensor:
        return torch.zeros(3, 56, 56, dtype=torch.uint8)


def _mark(field: str) -> str:
    """What stands for a text in a template: characters that no template and no wording holds."""
    return f"\ue000{field}\ue001"


def _said(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
