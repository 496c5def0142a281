"""A vision-language model as a judge: zero-shot, trained, or exported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from leanlight.contracts import MissingExtraError, SafetySample, UserError, Verdict, sha256_file
from leanlight.contracts.ranges import PositiveInt
from lit_modules.falcon_eye.answering import Asking
from lit_modules.falcon_eye.backbone import Backbone, PretrainedVLM
from lit_modules.falcon_eye.encoding import SafetyEncoder
from lit_modules.falcon_eye.export import FACTS
from lit_modules.falcon_eye.prompt import Prompt
from lit_modules.frozen import frozen_module


class VLMJudge:
    """A judge that is a vision-language model. Satisfies `leanlight.contracts.Judge`.

    Args:
        asking: model, encoder, and how verdicts are asked for.
        name: how tables and pages call it.
        weights: sha256 of what its weights are; that of the backbone by default, which is right for one as it came.
        batch_size: samples that are asked about at a time.
    """

    def __init__(self, asking: Asking, name: str = "", weights: str = "", batch_size: PositiveInt = 8) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size: expected at least 1, got {batch_size}")
        backbone = asking.encoder.backbone
        self.asking, self.batch_size = asking, batch_size
        self.name, self.fields = name or backbone.name, asking.encoder.fields
        self.fingerprint = _digest(weights or backbone.digest, asking)

    def judge(self, samples: Sequence[SafetySample]) -> list[Verdict]:
        """A verdict for each sample, in order; a picture that cannot be read is that verdict's failure."""
        parts = [samples[start : start + self.batch_size] for start in range(0, len(samples), self.batch_size)]
        return [verdict for part in parts for verdict in self.asking.verdicts(part)]

    @classmethod
    def zero_shot(cls, backbone: Backbone, prompt: Prompt | None = None, **options: Any) -> VLMJudge:
        """A model as it came.

        Args:
            backbone: it, with its processor.
            prompt: how it is asked; `Prompt`'s own by default.
            options: ``mode``, ``max_new_tokens``, ``strict`` of `Asking`; ``name``, ``batch_size``.
        """
        return cls(*_asked(backbone.model, SafetyEncoder(backbone, prompt), options), **options)

    @classmethod
    def from_source(
        cls, source: Path | str, base: Path | str | None = None, device: str | None = None, **options: Any
    ) -> VLMJudge:
        """The judge in a run folder, a checkpoint, an exported folder, or any folder of a model.

        Args:
            source: where it lies.
            base: folder of the base, where an adapter's has moved.
            device: where it runs; a GPU by default if there is one.
            options: ``mode``, ``max_new_tokens``, ``strict`` of `Asking`; ``name``, ``batch_size``.

        Raises:
            UserError: there is no judge, or its base is another one.
        """
        path = Path(source)
        checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
        options.setdefault("name", path.stem if path.is_file() else path.name)
        if checkpoint.is_file():
            model, encoder, weights = _of_checkpoint(checkpoint, base, options)
        elif (path / FACTS).is_file():
            model, encoder, weights = _of_export(path, base, options)
        else:
            backbone = PretrainedVLM(str(path)).build()
            model, encoder, weights = backbone.model, SafetyEncoder(backbone), backbone.digest
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        (asking,) = _asked(model, encoder, options)
        return cls(asking, weights=weights, **options)


Found = tuple[Any, SafetyEncoder, str]


def _asked(model: Any, encoder: SafetyEncoder, options: dict[str, Any]) -> tuple[Asking]:
    """Take what `Asking` wants out of the options."""
    known = ("mode", "max_new_tokens", "strict", "thresholds")
    return (Asking(model, encoder, **{name: options.pop(name) for name in known if name in options}),)


def _of_checkpoint(path: Path, base: Path | str | None, options: dict[str, Any]) -> Found:
    from lit_modules.falcon_eye.module import SafetyJudge

    changes = {} if base is None else {"backbone": PretrainedVLM(str(base))}
    helps = "leanlight fit --config falcon_eye/shapes_small trains one"
    module = frozen_module(SafetyJudge, path, "judge", helps, **changes)
    _set_defaults(options, module.about())
    return module.network, module.encoder, sha256_file(path) + module.encoder.backbone.digest


def _of_export(folder: Path, base: Path | str | None, options: dict[str, Any]) -> Found:
    """A folder that `export_judge` wrote; its text may come from anywhere."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        prompt, encoding, adapter = Prompt(**facts["prompt"]), dict(facts["encoding"]), bool(facts["adapter"])
        digest = str(facts["base"]["digest"])
        _set_defaults(options, facts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"judge: {folder / FACTS} is damaged ({type(error).__name__}: {error})") from error
    if not adapter:
        backbone = PretrainedVLM(str(folder)).build()
        return backbone.model, SafetyEncoder(backbone, prompt, **encoding), backbone.digest
    backbone = PretrainedVLM(str(base or _base_of(folder))).build()
    if backbone.digest != digest:
        raise UserError(
            f"judge: the adapter in {folder} belongs to {facts['base']['name']} ({digest[:12]}…), not to "
            f"{backbone.name} ({backbone.digest[:12]}…)"
        )
    model = _peft().PeftModel.from_pretrained(backbone.model, str(folder))
    weights = sha256_file(folder / "adapter_model.safetensors") + digest
    return model, SafetyEncoder(backbone, prompt, **encoding), weights


def _set_defaults(options: dict[str, Any], facts: Mapping[str, Any]) -> None:
    """What a judge was trained to be asked with, where nothing else is wanted."""
    options.setdefault("max_new_tokens", int(facts["max_new_tokens"]))
    options.setdefault("strict", bool(facts["strict_parser"]))
    thresholds = {str(name): float(value) for name, value in facts["thresholds"].items()}
    options.setdefault("thresholds", tuple(sorted(thresholds.items())))


def _base_of(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise MissingExtraError("peft", "safety") from error
    return peft


def _digest(weights: str, asking: Asking) -> str:
    """sha256 of all that decides verdicts."""
    encoder = asking.encoder
    facts = [
        weights,
        asdict(encoder.prompt),
        encoder.settings,
        asking.mode,
        asking.max_new_tokens,
        asking.strict,
        asking.thresholds,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
