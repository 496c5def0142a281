"""Vision-language models of transformers, as they are: from a folder or the hub, or tiny ones made on the spot."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from leanlight.contracts import MissingExtraError, UserError, isolated_rng, run_seed, sha256_file
from leanlight.contracts.ranges import PositiveInt, Seed
from lit_modules.nn.checks import first_line, require_positive

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]


@dataclass(frozen=True, eq=False)
class Backbone:
    """A vision-language model with what turns text and pictures into its inputs.

    Args:
        model: of transformers, in evaluation mode.
        processor: of transformers, with tokenizer, image processor and chat template.
        name: how people call it.
        digest: sha256 of what its weights are: an adapter fits no other.
    """

    model: nn.Module
    processor: Any
    name: str
    digest: str

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def image_processor(self) -> Any:
        return self.processor.image_processor

    @property
    def image_token_id(self) -> int:
        """Of the placeholder of which a picture takes one a patch that the language model sees."""
        return int(self.processor.image_token_id)

    @property
    def end_id(self) -> int:
        """Of the token that ends an answer."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """Of the token that fills rows; `end_id` where the tokenizer has none of its own."""
        pad = self.tokenizer.pad_token_id
        return self.end_id if pad is None else int(pad)

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as text, from which a `VLMSource` rebuilds it."""
        return _tokenizer_json(self.tokenizer)

    @property
    def takes_token_types(self) -> bool:
        """Whether the model tells placeholders from text by ``mm_token_type_ids``.

        Without them Qwen2.5-VL numbers the patches of a picture as if they were words, and says nothing.
        """
        return "mm_token_type_ids" in inspect.signature(type(self.model).forward).parameters


class VLMSource(ABC):
    """Where a backbone comes from."""

    @abstractmethod
    def build(self, texts: Iterable[str] | None = None, tokenizer: str | None = None) -> Backbone:
        """The backbone; random states stay as they were.

        Args:
            texts: to train a tokenizer on, where the source has none.
            tokenizer: `Backbone.tokenizer_json` of one that was trained before, instead of texts.
        """


@dataclass(frozen=True)
class PretrainedVLM(VLMSource):
    """A model for images and text to text, of any size: Qwen2.5-VL, or another whose pictures come with a grid.

    Args:
        path: folder as ``save_pretrained`` writes it, model and processor in one, or a name on the hub.
        dtype: of the weights: ``auto``, that of the files, ``float32``, ``bfloat16`` or ``float16``.
        attention: ``sdpa``, PyTorch's own; ``eager``; or ``flash_attention_2``, which needs the package flash-attn.
        revision: commit, tag or branch on the hub; None: its main branch.
    """

    path: str
    dtype: Dtype = "auto"
    attention: Attention = "sdpa"
    revision: str | None = None

    def build(self, texts: Iterable[str] | None = None, tokenizer: str | None = None) -> Backbone:
        """The backbone from its files; `texts` and `tokenizer` are not needed.

        Raises:
            UserError: no such folder or name, files that lack or do not fit, a processor that is not supported.
        """
        transformers = _transformers()
        folder = self._folder()
        try:
            with isolated_rng(), Quiet():
                processor = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
                _check_processor(processor, str(self.path))
                model, report = transformers.AutoModelForImageTextToText.from_pretrained(
                    folder,
                    dtype=self.dtype,
                    attn_implementation=self.attention,
                    local_files_only=True,
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            raise UserError(f"path: {self.path} cannot be loaded ({first_line(error)})") from error
        if missing := sorted(report["missing_keys"]):
            raise UserError(f"path: {self.path} lacks the weights {missing[0]}, and {len(missing) - 1} more")
        name = folder.name if Path(self.path).is_dir() else self.path
        return Backbone(model.eval(), processor, name, weights_digest(folder))

    def _folder(self) -> Path:
        """The folder itself, or what the hub's cache has of a name, fetched first if need be."""
        folder = Path(self.path).expanduser()
        if folder.is_dir():
            _check_files(folder)
            return folder
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", self.path):
            raise UserError(
                f"path: expected a folder with a vision-language model or its name on the hub, got {self.path}"
            )
        from huggingface_hub import snapshot_download

        try:
            # Never pickles: a file of weights that runs code has no way in.
            wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
            folder = Path(snapshot_download(self.path, revision=self.revision, allow_patterns=wanted))
        except Exception as error:  # of the hub, or of any layer of the network
            raise UserError(
                f"path: there is no folder {self.path}, and the hub gives no model of that name ({first_line(error)})"
            ) from error
        _check_files(folder)
        return folder


@dataclass(frozen=True)
class TinyVLM(VLMSource):
    """A Qwen2.5-VL with random weights and a tokenizer of its own, so that all runs without a download.

    As it stands it has 0.2 M parameters: it shows that the code is right, and nothing about safety.

    Args:
        hidden: width of the language model; `heads` divides it, and width of a head is a multiple of 4, at least 8.
        intermediate: width of the hidden layer of its MLPs.
        layers: of the language model.
        heads: of its attention, for queries.
        kv_heads: for keys and values; it divides `heads`.
        positions: tokens that it was made for.
        vision_hidden: width of the vision tower; a multiple of 4 a head.
        vision_intermediate: width of the hidden layer of its MLPs.
        vision_layers: of the tower; the last sees the whole picture, the others windows of 56 x 56 pixels.
        vision_heads: of its attention.
        vocab_size: most tokens of the tokenizer, at least 264: all bytes and the special ones.
        seed: of the weights; None: that of the run.
    """

    hidden: PositiveInt = 64
    intermediate: PositiveInt = 128
    layers: PositiveInt = 2
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    positions: PositiveInt = 2048
    vision_hidden: PositiveInt = 32
    vision_intermediate: PositiveInt = 64
    vision_layers: PositiveInt = 2
    vision_heads: PositiveInt = 2
    vocab_size: PositiveInt = 700
    seed: Seed | None = None

    def __post_init__(self) -> None:
        require_positive(**{name: value for name, value in asdict(self).items() if name != "seed"})
        for name, width, heads in (
            ("hidden", self.hidden, self.heads),
            ("vision_hidden", self.vision_hidden, self.vision_heads),
        ):
            if width % (4 * heads) or width < 8 * heads:
                raise UserError(f"{name}: expected a multiple of 4 for each of {heads} heads, at least 8, got {width}")
        if self.heads % self.kv_heads:
            raise UserError(f"kv_heads: expected a divisor of heads {self.heads}, got {self.kv_heads}")
        if self.vocab_size < _SMALLEST_VOCABULARY:
            raise UserError(f"vocab_size: expected at least {_SMALLEST_VOCABULARY}, got {self.vocab_size}")

    def build(self, texts: Iterable[str] | None = None, tokenizer: str | None = None) -> Backbone:
        """The backbone, with a tokenizer trained on `texts`, or rebuilt.

        Raises:
            UserError: neither texts nor a tokenizer.
        """
        transformers = _transformers()
        if tokenizer is None:
            if texts is None:
                raise UserError("backbone: a tiny model needs texts to train its tokenizer on, got none")
            tokenizer = _trained_tokenizer(texts, self.vocab_size)
        processor = _tiny_processor(tokenizer)
        seed = run_seed(self.seed)
        with isolated_rng(seed):
            model = transformers.Qwen2_5_VLForConditionalGeneration(self._config(processor.tokenizer))
        settings = json.dumps([{**asdict(self), "seed": seed}, _tokenizer_json(processor.tokenizer)])
        return Backbone(model.eval(), processor, "tiny", hashlib.sha256(settings.encode()).hexdigest())

    def _config(self, tokenizer: Any) -> Any:
        ids = tokenizer.convert_tokens_to_ids
        half = self.hidden // self.heads // 2
        height = (
            half - half // 4
        ) // 2  # of the rotations of a head, a quarter for time, the rest for rows and columns
        sections = [half // 4, height, half - half // 4 - height]
        return _transformers().Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": self.hidden,
                "intermediate_size": self.intermediate,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "num_key_value_heads": self.kv_heads,
                "max_position_embeddings": self.positions,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
                "bos_token_id": None,
                "eos_token_id": tokenizer.eos_token_id,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={
                "depth": self.vision_layers,
                "hidden_size": self.vision_hidden,
                "intermediate_size": self.vision_intermediate,
                "num_heads": self.vision_heads,
                "window_size": 56,
                "out_hidden_size": self.hidden,
                "fullatt_block_indexes": [self.vision_layers - 1],
            },
            image_token_id=ids("<|image_pad|>"),
            video_token_id=ids("<|video_pad|>"),
            vision_start_token_id=ids("<|vision_start|>"),
            vision_end_token_id=ids("<|vision_end|>"),
        )


def weights_digest(folder: Path) -> str:
    """sha256 of the config and of all files of weights in a folder, whatever they are called."""
    files = sorted(sha256_file(path) for path in folder.glob("*.safetensors"))
    return hashlib.sha256("\n".join([sha256_file(folder / "config.json"), *files]).encode()).hexdigest()


def as_utf8(text: str) -> str:
    """Text with halves of surrogate pairs, which JSON lets through and no tokenizer takes, as question marks."""
    return text.encode("utf-8", "replace").decode()


def _transformers() -> Any:
    """The package, which takes seconds to import; MissingExtraError without it."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtraError("transformers", "safety") from error
    return transformers


class Quiet:
    """Keeps transformers from printing while it loads and saves; what matters becomes an error."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self.before[0])
        if self.before[1]:
            logging.enable_progress_bar()


def _check_files(folder: Path) -> None:
    """Raise UserError naming what a folder lacks of a model and its processor."""
    wanted = {"config.json": ["config.json"], "tokenizer.json": ["tokenizer.json"]}
    wanted["preprocessor_config.json"] = ["preprocessor_config.json", "processor_config.json"]
    missing = [name for name, any_of in wanted.items() if not any((folder / file).is_file() for file in any_of)]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing += [shard for shard in shards if not (folder / shard).is_file()]
    elif not any(folder.glob("*.safetensors")):
        missing.append("model.safetensors")
    if missing:
        raise UserError(
            f"path: expected the files of a vision-language model in {folder}, it lacks {', '.join(missing)}"
        )


def _check_processor(processor: Any, path: str) -> None:
    """Raise UserError unless text and pictures can be told apart in what a processor gives."""
    inputs = getattr(getattr(processor, "image_processor", None), "model_input_names", [])
    if not {"pixel_values", "image_grid_thw"} <= set(inputs):
        raise UserError(
            f"path: {type(processor).__name__}, the processor of {path}, is not supported: expected one whose pictures "
            f"come as pixel_values and image_grid_thw, as in the Qwen-VL family, got {', '.join(inputs) or 'none'}"
        )
    token = getattr(processor, "image_token", None)
    if token is None or token not in processor.tokenizer.get_added_vocab():
        raise UserError(f"path: expected an image token in the tokenizer of {path}, it has no {token or 'such token'}")
    if not processor.tokenizer.is_fast:
        raise UserError(f"path: expected a tokenizer of the tokenizers library in {path}, it has none")
    if processor.tokenizer.eos_token_id is None:
        raise UserError(f"path: expected a tokenizer with a token that ends an answer in {path}, it has none")
    if not processor.chat_template:
        raise UserError(f"path: expected a chat template in {path}, such as chat_template.jinja, it has none")


_SPECIAL_TOKENS = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
_SMALLEST_VOCABULARY = 256 + len(_SPECIAL_TOKENS)
# The layout of Qwen2.5-VL's turns, in which a system turn comes first if none is given.
_CHAT_TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- for part in message.content -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def _tokenizer_json(tokenizer: Any) -> str:
    """A tokenizer as text, without the padding that a call may have left in it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps({**state, "truncation": None, "padding": None})


def _trained_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """JSON of Qwen's tokenizer, trained anew; few texts give fewer tokens than asked for."""
    from tokenizers import pre_tokenizers, trainers

    tokenizer = _transformers().Qwen2Tokenizer().backend_tokenizer  # empty, but parts text into words as Qwen does
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(as_utf8, texts), trainer)
    return str(tokenizer.to_str())


def _tiny_processor(tokenizer: str) -> Any:
    from tokenizers import Tokenizer

    transformers = _transformers()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer), eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(),
        tokenizer=fast,
        video_processor=transformers.Qwen2VLVideoProcessor(),
        chat_template=_CHAT_TEMPLATE,
    )
