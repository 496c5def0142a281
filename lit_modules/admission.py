"""Which classes a config or a checkpoint may name, and which numbers: decided before anything of theirs is imported.

A config travels with a checkpoint and may come from anywhere. jsonargparse refuses a class that an argument's type does
not admit, but it imports the class to find out; under this policy it imports nothing but the suite, the libraries it
stands on, installed method packages, and what the user named.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

from jsonargparse import _common, set_parsing_settings
from jsonargparse.typing import register_type

from leanlight.contracts.plugins import METHODS_GROUP
from leanlight.contracts.ranges import Range


def register_range(kind: type[Range]) -> None:
    """Let parsers read a type of numbers with a range; the values stay plain numbers."""
    register_type(kind, lambda number: number, kind.read, type_check=lambda value, kind: False)


for _kind in Range.__subclasses__():  # whoever makes a parser of the suite's classes imports this file
    register_range(_kind)

_SUITE = ("lit_modules", "datamodules", "callbacks", "leanlight.ops.corruptions.Corruption")
_LIBRARIES = (
    *("torch", "torchvision", "torchmetrics", "lightning", "pytorch_lightning", "spikingjelly", "timm"),
    *("diffusers", "transformers", "peft", "geoopt", "kornia", "torch_geometric", "sklearn"),
)
# Parts of these libraries that load or run code by name or path.
_REFUSED = (
    *("torch.hub", "torch.load", "torch.serialization", "torch.package", "torch.jit", "torch.ops", "torch.classes"),
    *("torch.utils.cpp_extension", "torch.multiprocessing", "torch.distributed", "torch.utils.model_zoo"),
    *("torch.utils.bottleneck", "torch.utils.collect_env", "torch.export.load", "lightning.fabric.cli"),
    *("lightning.pytorch.cli", "torch._C", "torch._dynamo", "torch._inductor"),
)
# What experiments name inside a refused part.
_ADMITTED = ("lightning.pytorch.cli.ReduceLROnPlateau", "torch.distributed.optim", "torch.distributed.fsdp")
TRUST = "LEANLIGHT_TRUST"  # environment: packages, separated by commas, that the user named; child processes inherit it


def method_packages() -> list[str]:
    """Top-level packages of installed methods."""
    return sorted({point.module.split(".")[0] for point in entry_points(group=METHODS_GROUP)})


def trusted_packages() -> set[str]:
    """What `TRUST` names."""
    return set(filter(None, os.environ.get(TRUST, "").split(",")))


@contextmanager
def only_admitted(trusted: Iterable[str] = ()) -> Iterator[None]:
    """Inside the block jsonargparse imports what is admitted and nothing else.

    Args:
        trusted: top-level packages beside those of the environment variable `TRUST`: what the user named, not a file
            that came from elsewhere.
    """
    before = dict(_common.parsing_settings)  # there is no public way back to a more open policy
    never = {name for name, allowed in before["import_path_verdicts"].items() if not allowed}
    allowed = [*_SUITE, *_LIBRARIES, *method_packages(), *({*trusted, *trusted_packages()} - never)]
    try:
        set_parsing_settings(import_path_denylist=["*", *_REFUSED], import_path_allowlist=[*allowed, *_ADMITTED])
        yield
    finally:
        _common.parsing_settings.update(before)


def named_packages(value: Any) -> set[str]:
    """Top-level packages of every dotted name among the strings of a nested value: what a user's config names."""
    if isinstance(value, dict):
        return set().union(*map(named_packages, value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(named_packages, value))
    if not isinstance(value, str) or "." not in value or not all(part.isidentifier() for part in value.split(".")):
        return set()
    return {value.split(".")[0]}
