"""Write what a trained module exports, and hand it to W&B as a model artifact."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from callbacks.common import writes_files
from leanlight.contracts import isolated_rng, progress_of, sha256_file


class ExportArtifact(Callback):
    """Calls ``module.export(<run folder>/artifacts/export)`` when training has ended well, on rank zero.

    It is the state after the last step that is exported. Where a `WandbLogger` is, the files become an artifact of type
    ``model`` with the module's class, progress, newest metrics and the files' sha256 as metadata. A module without
    ``export`` is left alone.

    Args:
        aliases: names of this version of the artifact in W&B.
        enabled: False writes nothing: the runs of a table may be many and their networks large, and ``leanlight
            export RUN`` writes the same later.
    """

    def __init__(self, aliases: Sequence[str] = ("latest",), enabled: bool = True) -> None:
        self.aliases, self.enabled = list(aliases), enabled

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        export = getattr(pl_module, "export", None)
        if not self.enabled or export is None or not writes_files(trainer):
            return
        folder = Path(trainer.default_root_dir) / "artifacts" / "export"
        folder.mkdir(parents=True, exist_ok=True)
        with isolated_rng():
            files = {file.relative_to(folder).as_posix(): file for file in map(Path, export(folder))}
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and files:
                self._log_artifact(logger, files, _metadata(trainer, pl_module, files))

    def _log_artifact(self, logger: WandbLogger, files: Mapping[str, Path], metadata: dict[str, Any]) -> None:
        import wandb

        run = logger.experiment
        title = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{run.id}-export")
        artifact = wandb.Artifact(title, type="model", metadata=metadata)
        for name, file in files.items():
            artifact.add_file(str(file), name=name)
        run.log_artifact(artifact, aliases=self.aliases)


def _metadata(trainer: Trainer, module: LightningModule, files: Mapping[str, Path]) -> dict[str, Any]:
    progress = progress_of(module)
    return {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "progress": {progress.unit: progress.value},
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "sha256": {name: sha256_file(file) for name, file in files.items()},
    }
