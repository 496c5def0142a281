"""What begins and ends the tracking of a run, so that no tracker stops it; and a selection as an artefact of W&B."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from leanlight import runs
from leanlight.contracts.errors import MissingExtraError

if TYPE_CHECKING:  # `leanlight select` starts without Lightning
    from lightning.pytorch.loggers import Logger, WandbLogger

# Seconds that W&B waits for its server at the start, before it takes a table, and at the end; its own defaults are 90,
# 19, and for ever. What it has not sent by then lies in the run folder, and without an error nobody would know. It
# writes what it is told into its file there each second: by its own default each 15, and a process that is killed, or
# gives up waiting, would leave a file without the last rows.
_PATIENCE = {
    "WANDB_INIT_TIMEOUT": "20",
    "WANDB_HTTP_TIMEOUT": "10",
    "WANDB_FINISH_TIMEOUT": "60",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
    "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",
}
_HOMES = {
    "WANDB_CACHE_DIR": ".cache/wandb",
    "WANDB_DATA_DIR": ".local/share/wandb",
    "WANDB_CONFIG_DIR": ".config/wandb",
}


def open_logger(name: str, make: Callable[[], Logger]) -> Logger | None:
    """A logger that has begun and cannot stop the run; None, with one line of warning, where it cannot begin.

    Args:
        name: what users call it.
        make: makes it.

    Raises:
        MissingExtraError: its package is not installed.
    """
    from callbacks.sending import keep_from_stopping, warn

    try:
        logger = make()
        _ = logger.experiment  # type: ignore[attr-defined]  # every logger here has one, made on first use
        return keep_from_stopping(logger)
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or name.lower(), "tracking") from error
    except Exception as error:  # of any library, network or disk
        warn(f"{name} is left out of this run ({_reason(error)})")
        return None


def open_wandb(mode: str, directory: Path, make: Callable[[bool], WandbLogger]) -> Logger | None:
    """The W&B logger of a run, begun: online if it shall be, else offline, else None, with one line of warning.

    Args:
        mode: as `leanlight.runs.RunSettings.wandb`, not ``disabled``.
        directory: the run folder.
        make: makes the logger; its argument says whether it is offline.
    """
    from callbacks.sending import keep_from_stopping, warn

    prepare_wandb(directory)
    problems: list[str] = []
    for offline in (True,) if is_offline(mode) else (False, True):
        try:
            logger = make(offline)
            _ = logger.experiment  # begins the run
        except Exception as error:  # of W&B, the network or the disk
            problems.append(_reason(error))
            _forget_wandb()
            continue
        if problems:
            upload = f"wandb sync '{directory / 'wandb'}'/offline-run-*"
            warn(f"W&B cannot be reached ({problems[0]}): the run is kept offline; later: {upload}")
        return keep_from_stopping(logger)
    warn(f"W&B is left out of this run ({'; offline: '.join(problems)})")
    return None


def prepare_wandb(directory: Path) -> None:
    """Settings of W&B for this process: no lines of its own, limited patience, places that can be written.

    What the user has set stands.

    Args:
        directory: where W&B shall keep what it keeps in the home folder by default, should that be read-only.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # the run says itself where its page is
    for name, seconds in _PATIENCE.items():
        os.environ.setdefault(name, seconds)
    for name, place in _HOMES.items():
        if name not in os.environ and not _can_be_made(place):
            os.environ[name] = str(directory / "wandb" / name.split("_")[1].lower())


def _forget_wandb() -> None:
    """After a failure: W&B's own process holds the run's id, and a dead one would be a traceback when Python ends."""
    with suppress(Exception):  # a run that has begun half, and would be taken for the next one
        import wandb

        if wandb.run is not None:
            wandb.run.finish(exit_code=1)
    with suppress(Exception, SystemExit):  # W&B ends Python with the code of its own process
        wandb.teardown()


def _can_be_made(place: str) -> bool:
    """Whether a folder of the home folder is there and can be written, or can be made."""
    try:
        folder = Path.home() / place
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK)
    except (OSError, RuntimeError):  # no home at all
        return False


def close_wandb(loggers: Sequence[Logger], exit_code: int) -> None:
    """End the W&B run of a run; one line of warning tells what could not be sent in time.

    Args:
        loggers: of the trainer.
        exit_code: 0 for a run that ended well.
    """
    from lightning.pytorch.loggers import WandbLogger

    from callbacks.sending import gets_nothing, warn

    for logger in loggers:
        run = getattr(logger, "_experiment", None) if isinstance(logger, WandbLogger) else None
        if run is None:
            continue
        try:
            run.finish(exit_code=exit_code)
        except TimeoutError:
            warn(f"W&B has not taken everything; later: wandb sync '{Path(run.dir).parent}'")
        except Exception as error:  # its process may be gone
            if not gets_nothing(logger):
                warn(f"W&B did not end well ({_reason(error)}); what it has lies in {Path(run.dir).parent}")
            _forget_wandb()


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines()[:1]
    return ": ".join([type(error).__name__, *first])


def is_offline(mode: str) -> bool:
    """Whether a run of this mode, which is not ``disabled``, is kept on this machine."""
    return mode == "offline" or (mode == "auto" and not _has_key())


def _has_key() -> bool:
    """Whether W&B can log in without asking; WANDB_MODE stands above."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    own = os.environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(own).netloc] if own else ["api.wandb.ai", "api.forge.coreweave.com"]
    try:
        known = (Path.home() / ".netrc").read_text(errors="ignore").split()
    except (OSError, RuntimeError):  # none, or no home
        return False
    return any(host in known for host in hosts)


def log_selection(features: Path, output: Path, record: Mapping[str, Any], mode: str) -> None:
    """As `_log_selection`; when W&B fails, one line of warning, for the selection is there."""
    try:
        _log_selection(features, output, record, mode)
    except Exception as error:  # of W&B, the network or the disk
        print(f"leanlight: warning: the selection is not in W&B ({_reason(error)})", file=sys.stderr)


def _log_selection(features: Path, output: Path, record: Mapping[str, Any], mode: str) -> None:
    """Log a selection as a W&B run with an artefact, made of another one that stands for its features.

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
    prepare_wandb(place)
    name = _selection_name(output)
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
    _use(run, used)
    if runs.read_summary(source):
        _use(run, _run_artifact(source))
    run.log_artifact(_selection(output, {**told, "source": used.name}), aliases=["latest"])
    run.finish()


def tell_lineage(loggers: Sequence[Logger], run_dir: Path, inputs: Mapping[str, str]) -> None:
    """Tell W&B what a finished run was made of and what later ones read, so that it draws data, teacher, student.

    Data and runs are artefacts without content: sha256 alone. Who reads a run's files names by them the very version
    that the run has logged. Offline runs have it in their files, and the lines are there after `wandb sync`.

    Args:
        loggers: of the trainer.
        run_dir: the run folder.
        inputs: its ``run.inputs``.
    """
    from lightning.pytorch.loggers import WandbLogger

    from callbacks.sending import attempt

    for logger in loggers:
        if isinstance(logger, WandbLogger):
            attempt(logger, "tables and artefacts", _tell_lineage, logger, run_dir, inputs)


def _tell_lineage(logger: WandbLogger, run_dir: Path, inputs: Mapping[str, str]) -> None:
    run, summary = logger.experiment, runs.read_summary(run_dir) or {}
    if data := summary.get("data"):
        _use(run, _stand_in(f"data-{data['name']}", "dataset", {key: data[key] for key in ("fingerprint", "counts")}))
    for name, path in inputs.items():
        place = Path(path).resolve()
        folder = place if place.is_dir() else place.parent
        if (folder / "selection.json").is_file():
            _use(run, _selection(folder, {}))
        elif runs.read_summary(made := runs.run_of(place)):
            _use(run, _run_artifact(made))
        else:
            _use(run, _stand_in(f"input-{name}", "input", {"sha256": (summary.get("inputs") or {}).get(name)}))
    run.log_artifact(_run_artifact(run_dir), aliases=["latest"])


def _use(run: Any, artifact: Any) -> None:
    """Make an artefact, if it is new, an input of a run.

    ``use_artifact`` would wait for the server and knows no offline run; what it calls does neither.
    """
    run._log_artifact(artifact, is_user_created=True, use_after_commit=True)


def _stand_in(title: str, kind: str, content: Mapping[str, Any]) -> Any:
    """An artefact whose version is decided by what `content` says."""
    import wandb

    artifact = wandb.Artifact(_title(title), type=kind, metadata=dict(content))
    with artifact.new_file("content.json", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, sort_keys=True))
    return artifact


def _run_artifact(folder: Path) -> Any:
    summary, settings = runs.read_summary(folder) or {}, _settings(folder)
    title = f"{summary.get('method')}-{settings.get('experiment') or summary.get('dataset')}-run"
    files = {item["path"]: item["sha256"] for item in summary.get("artifacts") or []}
    return _stand_in(title, "run", {"run": summary.get("run_id"), "files": files})


def _selection_name(output: Path) -> str:
    place = runs.run_of(output.resolve())
    return output.name if place == output.resolve() else f"{place.name}-{output.name}"


def _selection(output: Path, metadata: Mapping[str, Any]) -> Any:
    """The artefact of a selection, the same for who made it and who reads it."""
    import wandb

    artifact = wandb.Artifact(_title(f"{_selection_name(output)}-selection"), type="selection", metadata=dict(metadata))
    for path in sorted(output.glob("selection.*")):
        artifact.add_file(str(path))
    return artifact


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record.get(key) for key in ("data", "weights", "features")}


def _title(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)[-120:]


def _settings(run: Path) -> dict[str, Any]:
    """What a run folder says of project and method."""
    config, summary = run / "config.yaml", runs.read_summary(run) or {}
    given = (yaml.safe_load(config.read_text()) or {}).get("run") if config.is_file() else None
    return {key: value for key, value in {**(given or {}), "method": summary.get("method")}.items() if value}
