"""Which weights of a vision-language model train: all of them, or low-rank changes of some layers (LoRA, by peft)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn

from leanlight.contracts import MissingExtraError, UserError
from leanlight.contracts.ranges import PositiveInt, Share

Targets = Literal["attention", "attention+mlp", "attention+mlp+merger", "attention+mlp+vision"]

# Patterns of whole names. Those of the language model are held to it: vision MLPs have layers of the same last name.
_ATTENTION = r".*language_model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj"
_MLP = r".*language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj"
_MERGER = r".*visual\.merger\.mlp\.(0|2)"
_VISION = r".*visual\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(gate|up|down)_proj)"
_PATTERNS: dict[str, tuple[str, ...]] = {
    "attention": (_ATTENTION,),
    "attention+mlp": (_ATTENTION, _MLP),
    "attention+mlp+merger": (_ATTENTION, _MLP, _MERGER),
    "attention+mlp+vision": (_ATTENTION, _MLP, _MERGER, _VISION),
}


class Tuning(ABC):
    """A rule for what trains of a pre-trained model."""

    @abstractmethod
    def adapt(self, model: nn.Module) -> nn.Module:
        """Freeze what does not train, in place, and return the model that is called from now on."""


@dataclass(frozen=True)
class FullTuning(Tuning):
    """Train all weights.

    Args:
        vision: whether the vision tower and its merger train, too; LLaMA-Factory and ms-swift leave them as they are.
    """

    vision: bool = True

    def adapt(self, model: nn.Module) -> nn.Module:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.vision or "visual." not in name)
        return model


@dataclass(frozen=True)
class LoRATuning(Tuning):
    """Train low-rank changes of linear layers: h = W x + (α/r) B A dropout(x), with B = 0 at first (Hu et al. 2022).

    The authors' settings are rank 128 and alpha 4, which is a scale of 1/32: at their learning rate of 1e-5 this moves
    slowly, and they train for eight epochs. Their later recipe, and most of the field, has rank 8 and alpha 16.

    Args:
        rank: r of the change, at least 1.
        alpha: α; the change is multiplied with α/r. Positive.
        dropout: share of the layers' inputs set to 0 in training, in [0, 1).
        targets: which layers: those of the language model's attention, also of its MLP, of the merger that leads from
            pictures to it, or of the vision tower as well.
    """

    rank: PositiveInt = 128
    alpha: PositiveInt = 4
    dropout: Share = 0.05
    targets: Targets = "attention"

    def __post_init__(self) -> None:
        for name, value in (("rank", self.rank), ("alpha", self.alpha)):
            if value < 1:
                raise UserError(f"tuning.{name}: expected at least 1, got {value}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"tuning.dropout: expected a share in [0, 1), got {self.dropout}")
        if self.targets not in _PATTERNS:
            raise UserError(f"tuning.targets: expected one of {', '.join(get_args(Targets))}, got {self.targets!r}")

    @property
    def scale(self) -> float:
        """α/r, by which the change is multiplied."""
        return self.alpha / self.rank

    def adapt(self, model: Any) -> nn.Module:
        try:
            from peft import LoraConfig, get_peft_model
        except ModuleNotFoundError as error:
            raise MissingExtraError("peft", "safety") from error
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="|".join(_PATTERNS[self.targets]),
        )
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UserError(
                f"tuning.targets: expected layers that a {type(model).__name__} has, got {self.targets}"
            ) from error
