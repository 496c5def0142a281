"""What a method can be run with, said by its module and checked in one place before anything is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Precision = Literal["32-true", "bf16-mixed", "16-mixed"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


@dataclass(frozen=True)
class Allows:
    """Settings of the trainer that a method works with; the class attribute ``allows`` of its module.

    Args:
        precision: values of ``trainer.precision``.
        why: the reason why not the others, as the error for them ends; needed where `precision` is not all.
        sharded: whether weights may be spread over devices (FSDP, DeepSpeed, ModelParallel), so that no process holds
            them whole outside of its steps.
    """

    precision: tuple[Precision, ...] = PRECISIONS
    why: str = ""
    sharded: bool = False
