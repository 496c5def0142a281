"""`leanlight fit|validate|test|predict`: LightningCLI with configs by name, run folders and standard callbacks."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

import callbacks
from leanlight import runs
from leanlight.cli.allocator import keep_freed_memory
from leanlight.cli.messages import one_line
from leanlight.configs_path import config_root, find_config
from leanlight.contracts import UserError
from leanlight.loggers import RunCSVLogger, RunWandbLogger
from leanlight.recorder import RunRecorder

# Added to every run under these keys: configurable (`--nan_guard.check_every_n_steps=9`), but no YAML list drops them.
# ExactResume stands last, so that what it saves is the state after all other callbacks have acted.
STANDARD_CALLBACKS = {
    "throughput": callbacks.ThroughputMonitor,
    "spike_statistics": callbacks.SpikeStatistics,
    "energy": callbacks.EnergyMeter,
    "media": callbacks.MediaLogger,
    "export_artifact": callbacks.ExportArtifact,
    "disk_guard": callbacks.DiskGuard,
    "nan_guard": callbacks.NaNGuard,
    "exact_resume": callbacks.ExactResume,
}
_RUN_DIR = "LEANLIGHT_RUN_DIR"  # tells processes that a DDP launch starts where the run of rank zero lives


class LeanlightParser(LightningArgumentParser):
    """Parser whose errors are UserErrors of one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        if not self.exit_on_error:  # inner parsers try alternatives of a type: their errors are not final
            return super().error(message, ex)
        raise UserError(one_line(message, self)) from ex


class LeanlightCLI(LightningCLI):
    """One subcommand of LightningCLI, wrapped in a run folder.

    Args:
        args: subcommand and its options, configs already resolved to paths.
        run_dir: an existing run folder to go on in, or None for a new one.
        parse_only: stop after the configuration is complete and checked.
    """

    def __init__(self, args: list[str], run_dir: Path | None = None, parse_only: bool = False) -> None:
        self.only, self.given_run_dir, self.parse_only = args[0], run_dir, parse_only
        own = " [--resume RUN_DIR]" if self.only == "fit" else " [--from RUN_DIR]"
        options = {
            "default_config_files": [str(config_root() / "defaults.yaml")],
            "usage": f"leanlight {self.only} --config NAME [--config OVERLAY ...] [--KEY=VALUE ...]{own}",
        }
        jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        super().__init__(
            args=args,
            parser_class=LeanlightParser,
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "leanlight", self.only: options},
            save_config_callback=None,
            subclass_mode_model=True,
            subclass_mode_data=True,
            model_class=pl.LightningModule,
            datamodule_class=pl.LightningDataModule,
            auto_configure_optimizers=False,
        )

    # -- parsing

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        return {self.only: LightningCLI.subcommands()[self.only]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(runs.RunSettings, "run")
        for key, callback in STANDARD_CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        self._dump_config()
        self.resolved: dict[str, Any] = self.config_dump
        check_monitors(self.resolved)

    def _parse_ckpt_path(self) -> None:
        """Check that a checkpoint fits the model; the configuration, not the checkpoint, says what to build."""
        path = self.resolved.get("ckpt_path")
        if self.parse_only or not path or path in ("last", "best"):
            return
        if not Path(path).is_file():
            raise UserError(f"ckpt_path: no file at {path}")
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get("hyper_parameters", {})
        except Exception as error:
            raise UserError(f"ckpt_path: {path} is not a readable checkpoint ({type(error).__name__})") from error
        expected, found = self.resolved["model"]["class_path"], saved.get("_class_path")
        if found and found.rsplit(".", 1)[-1] != expected.rsplit(".", 1)[-1]:
            raise UserError(f"ckpt_path: {path} holds a {found}, but model.class_path is {expected}")

    def _set_seed(self) -> None:
        if not self.parse_only:
            super()._set_seed()

    # -- building

    def instantiate_classes(self) -> None:
        if self.parse_only:
            return
        with _construction_errors():
            super().instantiate_classes()
        self.model._log_hyperparams = self.datamodule._log_hyperparams = False  # W&B gets the whole config once

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        settings = self._get(self.config_init, "run")
        identity = runs.config_hash(self.resolved, settings.inputs)
        self.method = settings.method or method_of(self.resolved["model"]["class_path"])
        self.dataset = settings.dataset or dataset_of(self.resolved["data"])
        root = Path(self.resolved["trainer"]["default_root_dir"] or "runs")
        inherited = os.environ.get(_RUN_DIR) if "LOCAL_RANK" in os.environ else None
        chosen = self.given_run_dir or (Path(inherited) if inherited else None)
        self.run_dir = (
            chosen or root / self.method / self.dataset / (settings.id or runs.new_run_id(identity))
        ).resolve()
        self.fresh = chosen is None
        self.recorder = RunRecorder(self.run_dir, self.only, self.method, self.dataset, self.resolved, identity)
        config = dict(self._get(self.config_init, "trainer"))
        return self._instantiate_trainer({**config, **self._standard(config), **kwargs}, [])

    def _standard(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Trainer arguments of the suite: folder, loggers, callbacks, atomic checkpoints."""
        users = _listed(config.get("callbacks"))
        loggers = [logger for logger in _listed(config.get("logger")) if not isinstance(logger, bool)]
        # ThroughputMonitor first: the time that other callbacks take counts as outside the step.
        throughput, *others, resume = (self._get(self.config_init, key) for key in STANDARD_CALLBACKS)
        added = [throughput, *users, *others, *self._best(config), self.recorder]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, RichProgressBar) for c in users):
            added.append(RichProgressBar(leave=sys.stdout.isatty()))
        if self.only == "predict":
            added.append(callbacks.PredictionWriter(resume=True))
        return {
            "default_root_dir": str(self.run_dir),
            "logger": [RunCSVLogger(self.run_dir), *loggers],
            "callbacks": [*added, resume],
            "plugins": [*_listed(config.get("plugins")), callbacks.AtomicCheckpointIO()],
            "enable_model_summary": bool(config.get("enable_model_summary")),
        }

    def _best(self, config: Mapping[str, Any]) -> list[ModelCheckpoint]:
        if self.only != "fit" or config.get("limit_val_batches") == 0:
            return []
        metric = self.model.primary_metric
        return [
            ModelCheckpoint(
                dirpath=self.run_dir / "checkpoints",
                filename="best",
                monitor=metric.name,
                mode=metric.mode,
                save_on_train_epoch_end=False,
                enable_version_counter=False,
            )
        ]

    # -- running

    def _run_subcommand(self, subcommand: str) -> None:
        if self.parse_only:
            return
        with self._cleaned_up_on_bad_input():
            ensure = getattr(self.datamodule, "ensure_available", None)
            if ensure is not None:
                ensure()
            self._open_run_dir()
            with self.recorder.recording(self.trainer):
                super()._run_subcommand(subcommand)
                if subcommand == "fit":
                    self._test_after_fit()
        self._say_where()

    @rank_zero_only
    def _say_where(self) -> None:
        shown = {
            k: v for k, v in self.recorder.metrics.items() if k.startswith(("val/", "test/")) and k.count("/") == 1
        }
        print(
            "\n".join([*(f"{name:<24} {value:.4f}" for name, value in sorted(shown.items())), f"run: {self.run_dir}"])
        )

    @contextmanager
    def _cleaned_up_on_bad_input(self) -> Iterator[None]:
        """Bad input found before the first step leaves no run folder behind."""
        try:
            yield
        except (UserError, MisconfigurationException) as error:
            if self._opened and self.fresh and not self.recorder.started:
                shutil.rmtree(self.run_dir, ignore_errors=True)
                for parent in self._made:
                    parent.rmdir()
            if isinstance(error, UserError):
                raise
            raise UserError(" ".join(str(error).split())) from error

    _opened = False

    def _open_run_dir(self) -> None:
        if self.trainer.is_global_zero:
            if self.fresh and self.run_dir.exists():
                raise UserError(
                    f"run.id: {self.run_dir} exists already; choose another --run.id, or go on with --resume"
                )
            self._made = [parent for parent in self.run_dir.parents if not parent.exists()]
            try:
                (self.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
                self._opened = True
                self._save_config()
            except OSError as error:
                where = f"trainer.default_root_dir: cannot write {self.run_dir}"
                raise UserError(f"{where} ({error.strerror or error})") from error
            os.environ[_RUN_DIR] = str(self.run_dir)
        self._add_wandb()

    def _save_config(self) -> None:
        path = self.run_dir / "config.yaml"
        if not path.exists():
            saved = self.config[self.only].clone()
            saved.pop("config", None)
            self._parser(self.only).save(saved, str(path), skip_none=False, skip_validation=True, multifile=False)

    def _add_wandb(self) -> None:
        settings = self._get(self.config_init, "run")
        if settings.wandb == "disabled" or any(isinstance(x, pl.loggers.WandbLogger) for x in self.trainer.loggers):
            return
        offline = settings.wandb == "offline" or (settings.wandb == "auto" and not _wandb_key())
        if offline:
            os.environ.setdefault("WANDB_SILENT", "true")  # it has no page to point to
        logger = RunWandbLogger(
            name=self.run_dir.name,
            id=f"{self.method}-{self.dataset}-{self.run_dir.name}"[-120:],
            save_dir=self.run_dir,
            project=settings.wandb_project,
            offline=offline,
            group=self.method,
            job_type=self.only,
            tags=[self.dataset, *settings.tags],
            notes=settings.notes or None,
            resume="allow",
        )
        self.trainer.loggers = [*self.trainer.loggers, logger]

    def _test_after_fit(self) -> None:
        which = self._get(self.config_init, "run").test
        if which == "none" or self.resolved["trainer"]["fast_dev_run"] or self.trainer.interrupted:
            return
        best = self.run_dir / "checkpoints" / "best.ckpt"
        if which == "best" and not best.is_file():
            raise UserError("run.test: best, but there is no best.ckpt because no validation ran; use last")
        self.trainer.test(
            self.model,
            datamodule=self.datamodule,
            ckpt_path=str(best) if which == "best" else None,
            weights_only=True,
            verbose=False,
        )


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _wandb_key() -> bool:
    """Whether W&B can log in without asking; WANDB_MODE stands above."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return False
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path.home() / ".netrc"
    return netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="ignore")


def method_of(class_path: str) -> str:
    """Folder name of a model: its package in lit_modules, else the class's own name in lower case."""
    parts = class_path.split(".")
    return parts[1] if parts[0] == "lit_modules" and len(parts) > 2 else parts[-1].lower()


def dataset_of(data: Mapping[str, Any]) -> str:
    """Folder name of a data set: what the DataModule calls `dataset`, else its class's name in lower case."""
    named = (data.get("init_args") or {}).get("dataset")
    return str(named) if named else str(data["class_path"]).rsplit(".", 1)[-1].lower()


def check_monitors(config: Any, where: str = "") -> None:
    """Refuse any `monitor` that looks at test data: nothing is selected or stopped on test."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            here = f"{where}.{key}" if where else str(key)
            if key == "monitor" and str(value).startswith("test"):
                raise UserError(f"{here}: {value!r} would select on test data; monitor a val/ metric instead")
            check_monitors(value, here)
    elif isinstance(config, list):
        for index, value in enumerate(config):
            check_monitors(value, f"{where}[{index}]")


def _take(args: list[str], *flags: str) -> tuple[str | None, list[str]]:
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


def expand(argv: list[str]) -> tuple[list[str], Path | None]:
    """Resolve config names, `--resume` and `--from`; return arguments for LightningCLI and the folder to go on in."""
    command, args = argv[0], list(argv[1:])
    configs: list[str] = []  # first, in their order: a key on the command line stands above any config
    name, args = _take(args, "--config", "-c")
    while name is not None:
        configs.append(f"--config={_readable_config(name)}")
        name, args = _take(args, "--config", "-c")
    resume, args = _take(args, "--resume")
    source, args = _take(args, "--from")
    if resume is not None:
        if command != "fit":
            raise UserError(f"--resume: goes with fit; {command} takes --from RUN_DIR")
        return _from_run(command, resume, "--resume", [*configs, *args]), Path(resume)
    if source is not None:
        if command == "fit":
            raise UserError("--from: goes with validate, test and predict; fit takes --resume RUN_DIR")
        target = Path(source) / command
        target = target if not target.exists() else target.with_name(f"{command}-{time.strftime('%Y%m%d-%H%M%S')}")
        return _from_run(command, source, "--from", [*configs, *args]), target
    return [command, *configs, *args], None


def _readable_config(name: str) -> str:
    path = find_config(name)
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config {path}: not valid YAML: {' '.join(str(error).split())}") from error
    if content is not None and not isinstance(content, dict):
        raise UserError(f"config {path}: expected keys such as model, data, trainer, got a {type(content).__name__}")
    return str(path)


def _from_run(command: str, folder: str, flag: str, args: list[str]) -> list[str]:
    config, checkpoint = Path(folder) / "config.yaml", Path(folder) / "checkpoints" / "last.ckpt"
    if not config.is_file():
        raise UserError(f"{flag}: {folder} is not a run folder (no config.yaml)")
    if any(arg.startswith("--ckpt_path") for arg in args):
        return [command, "--config", str(config), *args]
    if not checkpoint.is_file():
        raise UserError(f"{flag}: no checkpoint at {checkpoint}; the run stopped before its first one, start it anew")
    return [command, "--config", str(config), *args, f"--ckpt_path={checkpoint}", "--weights_only=true"]


@contextmanager
def _construction_errors() -> Iterator[None]:
    """Bad values that a class of the configuration refuses are the user's errors, however deep they were wrapped."""
    try:
        yield
    except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        raise cause or UserError(f"config: {' '.join(str(error).split())}") from error


@contextmanager
def _as_user_errors() -> Iterator[None]:
    try:
        yield
    except OmegaConfBaseException as error:
        raise UserError(f"config: {' '.join(str(error).split())}") from error
    except jsonargparse.ArgumentError as error:
        raise UserError(one_line(str(error), None)) from error


def resolve(subcommand: str, args: list[str]) -> dict[str, Any]:
    """Complete configuration of ``leanlight SUBCOMMAND ARGS`` without building anything. Raises UserError."""
    arguments, run_dir = expand([subcommand, *args])
    with _as_user_errors():
        return LeanlightCLI(arguments, run_dir, parse_only=True).resolved


def main(argv: list[str]) -> int:
    """Run a subcommand; 0 done, 130 interrupted. Raises UserError for bad input."""
    keep_freed_memory()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)  # device lists and advertisements, on every start
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own module beside the config is importable
    arguments, run_dir = expand(argv)
    with _as_user_errors():
        try:
            LeanlightCLI(arguments, run_dir)
        except SystemExit as error:  # Lightning ends an interrupted fit this way
            if error.code in (0, None):
                return 0
            raise KeyboardInterrupt from error
    return 0
