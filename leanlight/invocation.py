"""What stands on a command line: configs by name, runs to go on with or to start from, packages to trust."""

from __future__ import annotations

import csv
import io
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from leanlight.configs_path import find_configs
from leanlight.contracts.errors import UserError
from leanlight.runs import read_summary
from leanlight.yaml_files import load_yaml
from lit_modules.admission import named_packages, trusted_packages

_RESUMED = ("fit", "predict")
_MOST_VALUES = 100_000
_PLACES = ("--run.id", "--run.method", "--run.dataset", "--trainer.default_root_dir")  # name a run folder


@dataclass
class Invocation:
    """A command line of LightningCLI.

    Args:
        arguments: subcommand and options; configs stand first and are resolved to paths.
        run_dir: the run folder to go on in, or None for a new one.
        trusted: top-level packages that the user named, in configs of their own, on the command line or to trust.
        resumes: whether `run_dir` is a run to go on with.
        allow_changes: go on although the experiment is not the same any more.
    """

    arguments: list[str]
    run_dir: Path | None = None
    trusted: set[str] = field(default_factory=set)
    resumes: bool = False
    allow_changes: bool = False


def expand(argv: list[str]) -> Invocation:
    """Resolve config names, `--resume`, `--from` and `--trust` of a subcommand and its options."""
    command, args = argv[0], list(argv[1:])
    configs: list[str] = []  # first, in their order: a key on the command line stands above any config
    trusted = trusted_packages()
    names, args = take_all(args, "--config", "-c")
    for path in (path for name in names for path in find_configs(name)):
        content = read_config(path)
        if not lies_in_a_run(path):
            trusted |= named_packages(content)
        configs.append(f"--config={path}")
    packages, args = take_all(args, "--trust")
    trusted |= {package.split(".")[0] for package in packages}
    resume, args = take(args, "--resume")
    allow_changes, args = "--allow-changes" in args, [word for word in args if word != "--allow-changes"]
    if allow_changes and resume is None:
        raise UserError("--allow-changes: goes with --resume RUN_DIR")
    source, args = take(args, "--from")
    trusted |= named_packages([word.partition("=")[2] if word.startswith("--") else word for word in args])
    if resume is not None:
        if command not in _RESUMED:
            raise UserError(f"--resume: goes with {' and '.join(_RESUMED)}; {command} takes --from RUN_DIR")
        arguments = _resumed(command, Path(resume), [*configs, *args])
        return Invocation(arguments, Path(resume), trusted, resumes=True, allow_changes=allow_changes)
    if source is not None:
        if command == "fit":
            raise UserError("--from: goes with validate, test and predict; fit takes --resume RUN_DIR")
        arguments = _from_checkpoint(command, Path(source), "--from", [*configs, *args])
        return Invocation(arguments, _new_folder(Path(source), command), trusted)
    # First of all, so that a name in a config, as that of a run folder, stands above it.
    named = [f"--run.experiment={title}" for title in [_title(names)] if title]
    return Invocation([command, *named, *configs, *args], None, trusted)


def _new_folder(source: Path, command: str) -> Path:
    """Where a command works that starts from a run: inside of that."""
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1:  # a task cannot look whether a folder is there: another has made it
        return source / "-".join([command, "slurm", os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_STEP_ID", "0")])
    folder = source / command
    return folder if not folder.exists() else folder.with_name(f"{command}-{time.strftime('%Y%m%d-%H%M%S')}")


def _title(configs: list[str]) -> str:
    """Name of the last config that is more than an overlay of trainer or logger; empty for none."""
    paths = [path for name in configs for path in find_configs(name) if path.parent.name not in ("trainer", "logger")]
    return paths[-1].stem if paths else ""


def option(key: str, value: Any) -> str:
    """Write one override as a command line option; anything but text goes as JSON, which is YAML too."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


def take(args: list[str], *flags: str) -> tuple[str | None, list[str]]:
    """Remove the first ``FLAG VALUE`` or ``FLAG=VALUE`` from `args`; return its value, or None, and the rest."""
    for index, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if flag not in flags:
            continue
        if equals:
            return value, args[:index] + args[index + 1 :]
        if index + 1 == len(args):
            raise UserError(f"{flag}: expects a value")
        return args[index + 1], args[:index] + args[index + 2 :]
    return None, args


def take_all(args: list[str], *flags: str) -> tuple[list[str], list[str]]:
    """Remove every occurrence, as `take` does the first; return the values in their order, and the rest."""
    values = []
    value, args = take(args, *flags)
    while value is not None:
        values.append(value)
        value, args = take(args, *flags)
    return values, args


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config file; UserError when it is none."""
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    check_size(content, f"config {path}")
    if content is not None and not isinstance(content, dict):
        raise UserError(f"config {path}: expected keys such as model, data, trainer, got a {type(content).__name__}")
    for key, value in (content or {}).items():
        if not isinstance(key, str):
            raise UserError(f"config {path}: expected keys such as model, data, trainer, got {key!r}")
        if isinstance(value, list) or (key in ("trainer", "run") and not isinstance(value, (dict, NoneType))):
            raise UserError(f"config {path}: {key}: expected keys and values, got {str(value)[:80]}")
    return content or {}


def check_size(content: Any, where: str) -> None:
    """Refuse what is small as a file, but endless to walk through: YAML whose aliases repeat other aliases."""
    waiting, seen = [content], 0
    while waiting:
        value = waiting.pop()
        seen += 1
        if seen > _MOST_VALUES:
            raise UserError(f"{where}: more than {_MOST_VALUES:,} values, counting what aliases (*name) repeat")
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def lies_in_a_run(path: Path) -> bool:
    """Whether a config belongs to a run folder: it travels with a checkpoint, and may come from anywhere."""
    return (path.parent / "checkpoints").is_dir() or (path.parent / "summary.json").is_file()


def run_config(folder: Path, flag: str) -> Path:
    """The config of a run folder; UserError when it is none."""
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{flag}: {folder} is not a run folder (no config.yaml)")
    return config


def _resumed(command: str, folder: Path, args: list[str]) -> list[str]:
    for word in args:
        if (key := word.partition("=")[0]) in _PLACES:
            raise UserError(f"{key}: goes with a new run; --resume goes on in {folder}")
    config = run_config(folder, "--resume")
    if command == "fit":
        if not _last(folder).is_file() and not any(arg.startswith("--ckpt_path") for arg in args):
            _check_never_trained(folder)
            return [command, "--config", str(config), *args]
        return _from_checkpoint(command, folder, "--resume", args)
    if "predict" not in (read_summary(folder) or {}).get("command", []):
        raise UserError(f"--resume: {folder} is no run of predict; `leanlight predict --from {folder}` starts one")
    return [command, "--config", str(config), *args]


def _last(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def _check_never_trained(folder: Path) -> None:
    """A run that was killed before its first checkpoint starts anew; one whose checkpoint was removed does not."""
    metrics = folder / "metrics.csv"
    with open(metrics, newline="") if metrics.is_file() else io.StringIO() as file:
        progress = [
            value for row in csv.DictReader(file) for key, value in row.items() if (key or "").startswith("progress/")
        ]
    if any(value not in (None, "", "0") for value in progress):
        raise UserError(f"--resume: no checkpoint at {_last(folder)}, but the run had trained; start it anew")


def _from_checkpoint(command: str, folder: Path, flag: str, args: list[str]) -> list[str]:
    config, checkpoint = run_config(folder, flag), _last(folder)
    if any(arg.startswith("--ckpt_path") for arg in args):
        return [command, "--config", str(config), *args]
    if not checkpoint.is_file():
        raise UserError(f"{flag}: no checkpoint at {checkpoint}; the run stopped before its first one")
    return [command, "--config", str(config), *args, f"--ckpt_path={checkpoint}", "--weights_only=true"]
