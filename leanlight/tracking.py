"""Weights & Biases outside of a Trainer: whether it is online, and a selection as an artefact."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from leanlight import runs


def is_offline(mode: str) -> bool:
    """Whether a run of this mode, which is not ``disabled``, is kept on this machine."""
    return mode == "offline" or (mode == "auto" and not _has_key())


def _has_key() -> bool:
    """Whether W&B can log in without asking; WANDB_MODE stands above."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path.home() / ".netrc"
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")


def log_selection(features: Path, output: Path, record: Mapping[str, Any], mode: str) -> None:
    """Log a selection as a W&B run with an artefact, made of another one that stands for its features.

    Online W&B draws that line itself. Offline it knows no use of artefacts, so both are logged and the metadata of the
    selection name the features.

    Args:
        features: what was selected from.
        output: folder of the selection; the run's files lie in ``wandb`` of the run folder that it belongs to.
        record: what ``selection.json`` says.
        mode: as `leanlight.runs.RunSettings.wandb`, not ``disabled``.
    """
    import wandb

    source, place = runs.run_of(features.resolve()), runs.run_of(output.resolve())
    settings = _settings(source)
    offline = is_offline(mode)
    if offline:
        os.environ.setdefault("WANDB_SILENT", "true")  # it has no page to point to
    name = f"{source.name}-{output.name}" if place == source else place.name
    told = {key: value for key, value in record.items() if key not in ("details", "counts", "code_files")}
    run = wandb.init(
        project=settings.get("wandb_project", "leanlight"),
        name=name,
        dir=place if place != output.resolve() else output.parent,
        mode="offline" if offline else "online",
        group=settings.get("method"),
        job_type="select",
        config=told,
    )
    used = wandb.Artifact(_title(f"{source.name}-features"), type="features", metadata=_facts(record))
    description = source / "artifacts" / "predictions" / "predictions.json"
    if description.is_file():
        used.add_file(str(description))
    run.log_artifact(used) if offline else run.use_artifact(used)
    chosen = wandb.Artifact(_title(f"{name}-selection"), type="selection", metadata={**told, "source": used.name})
    for path in sorted(output.glob("selection.*")):
        chosen.add_file(str(path))
    run.log_artifact(chosen, aliases=["latest"])
    run.finish()


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record.get(key) for key in ("data", "weights", "features")}


def _title(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[-120:]


def _settings(run: Path) -> dict[str, Any]:
    """What a run folder says of project and method."""
    config, summary = run / "config.yaml", runs.read_summary(run) or {}
    given = (yaml.safe_load(config.read_text()) or {}).get("run") if config.is_file() else None
    return {key: value for key, value in {**(given or {}), "method": summary.get("method")}.items() if value}
