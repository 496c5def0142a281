"""Stands in for `leanlight.experiment.resolve`: options as a flat mapping."""

from __future__ import annotations

from typing import Any

from leanlight.contracts.errors import UserError

_IDENTITY_FREE = {
    "run.id",
    "run.method",
    "run.dataset",
    "run.inputs",
    "run.test",
    "trainer.default_root_dir",
    "seed_everything",
}


def options(words: list[str]) -> dict[str, str]:
    """``--key=value`` and ``--key value`` as a mapping."""
    found, rest = {}, list(words)
    while rest:
        key, equals, value = rest.pop(0).removeprefix("--").partition("=")
        found[key] = value if equals else rest.pop(0)
    return found


def resolve(subcommand: str, args: list[str]) -> dict[str, Any]:
    found = options(args)
    if "unknown" in found:
        raise UserError("unknown: not a key of the model")
    return {
        "model": {key: value for key, value in found.items() if key not in _IDENTITY_FREE},
        "data": {},
        "trainer": {},
        "seed_everything": int(found.get("seed_everything", 0)),
        "run": {"test": found.get("run.test")},
    }
