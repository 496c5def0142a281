"""Write what a trained module exports, and hand it to the loggers that keep models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.common import writes_files
from callbacks.sending import send_artifact
from leanlight.contracts import isolated_rng, progress_of, sha256_file


class ExportArtifact(Callback):
    """Calls ``module.export(<run folder>/artifacts/export)`` when training has ended well, on rank zero.

    It is the state after the last step that is exported. In W&B the files become a version of an artefact of type
    ``model`` with the module's class, progress, newest metrics and the files' sha256 as metadata; MLflow gets them,
    too. A module without ``export`` is left alone.

    Args:
        aliases: names of this version of the artifact in W&B.
        enabled: False writes nothing: the runs of a table may be many and their networks large, and ``leanlight
            export RUN`` writes the same later.
        title: of the artefact, ``<title>-export``, the same in every run of an experiment, so that its aliases move
            on; by default what the command line makes of the config, else the module's class.
    """

    def __init__(self, aliases: Sequence[str] = ("latest",), enabled: bool = True, title: str | None = None) -> None:
        self.aliases, self.enabled, self.title = list(aliases), enabled, title

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        export = getattr(pl_module, "export", None)
        if not self.enabled or export is None or not writes_files(trainer):
            return
        folder = Path(trainer.default_root_dir) / "artifacts" / "export"
        folder.mkdir(parents=True, exist_ok=True)
        with isolated_rng():
            files = {file.relative_to(folder).as_posix(): file for file in map(Path, export(folder))}
        if files:
            title = f"{self.title or type(pl_module).__name__}-export"
            send_artifact(trainer.loggers, title, files, _metadata(trainer, pl_module, files), self.aliases)


def _metadata(trainer: Trainer, module: LightningModule, files: Mapping[str, Path]) -> dict[str, Any]:
    progress = progress_of(module)
    return {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "progress": {progress.unit: progress.value},
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "sha256": {name: sha256_file(file) for name, file in files.items()},
    }
