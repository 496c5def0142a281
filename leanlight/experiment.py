"""Experiments: a configuration becomes trainer, model and data, from the command line and from Python alike."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from traceback import walk_tb
from typing import Any, NamedTuple

import jsonargparse
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

import callbacks
from callbacks.bar import progress_callback
from callbacks.sending import attempt, keep_from_stopping, warn
from leanlight import runs
from leanlight.announce import Opening, closing
from leanlight.checks import check_config
from leanlight.contracts import CollectsPredictions, UserError, atomic_write, is_damaged, sweep_parts
from leanlight.invocation import Invocation, expand, option, read_config, run_config
from leanlight.locks import locked
from leanlight.loggers import RunCSVLogger, RunMLFlowLogger, RunTensorBoardLogger, RunWandbLogger
from leanlight.messages import memory_errors, one_line, quiet_lightning, with_prefix
from leanlight.objects import admitted_object, check_optimizers
from leanlight.parser import LeanlightParser, restrict
from leanlight.predictions import read_predictions
from leanlight.recorder import PythonRun, RunRecorder
from leanlight.registry import config_root
from leanlight.standard import STANDARD_CALLBACKS
from leanlight.tracking import close_wandb, open_logger, open_wandb, tell_lineage
from lit_modules.admission import TRUST, only_admitted
from lit_modules.hparams import rebuild

_RUN_DIR = "LEANLIGHT_RUN_DIR"  # tells processes that a DDP launch starts where the run of rank zero lives


class Experiment(NamedTuple):
    """What `build` returns. The run folder is ``trainer.default_root_dir``."""

    trainer: pl.Trainer
    model: pl.LightningModule
    data: pl.LightningDataModule


class LeanlightCLI(LightningCLI):
    """One subcommand of LightningCLI: parses its configuration and builds trainer, model and data.

    Args:
        call: the command line.
        parse_only: stop after the configuration is complete and checked.
    """

    def __init__(self, call: Invocation, parse_only: bool = False) -> None:
        self.call, self.only, self.parse_only = call, call.arguments[0], parse_only
        options = {"default_config_files": [str(config_root() / "defaults.yaml")]}
        jsonargparse.set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        # What the user named stays trusted: in `setup`, where a teacher's checkpoint is read, and in child processes.
        os.environ[TRUST] = ",".join(sorted(call.trusted))
        with _as_user_errors(), only_admitted():
            super().__init__(
                args=call.arguments,
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
        for key, name in STANDARD_CALLBACKS.items():
            parser.add_lightning_class_args(getattr(callbacks, name), key)
        if self.only == "predict":
            parser.add_class_arguments(callbacks.PredictionWriter, "predictions", skip={"resume", "checkpoint"})
        restrict(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        self._dump_config()
        self.resolved: dict[str, Any] = self.config_dump
        check_config(self.resolved)
        check_optimizers(self.resolved["model"], "model")
        self.before: dict[str, Any] = {}
        self.changes: dict[str, list[Any]] = {}
        self.other_weights = False
        if self.call.resumes and not self.parse_only:
            self._compare()

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Name → sha256 of the stage inputs; UserError where there is nothing."""
        return {name: runs.content_digest(path) for name, path in (self.resolved["run"]["inputs"] or {}).items()}

    def _compare(self) -> None:
        """Find what has changed in a run that is gone on with; UserError when it decides numbers and is not allowed."""
        assert self.call.run_dir is not None
        self.before = runs.read_summary(self.call.run_dir) or {}
        config = read_config(run_config(self.call.run_dir, "--resume"))
        known = {**self.inputs, **(self.before.get("inputs") or {})}
        self.other_weights = self.only == "predict" and config.get("ckpt_path") != self.resolved.get("ckpt_path")
        inputs = (config.get("run") or {}).get("inputs") or {}
        then = runs.identity(config, {path: known[name] for name, path in inputs.items() if name in known}, whole=True)
        self.changes = runs.changes(then, runs.identity(self.resolved, self._digests(), whole=True))
        refused = [
            f"{key}: {old} in the run, {new} here"
            for key, (old, new) in self.changes.items()
            if not runs.computed_elsewhere(key)
        ]
        if refused and not self.call.allow_changes:
            more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
            raise UserError(
                f"{'; '.join(refused[:3])}{more}: no longer the same experiment; leave it out, or go on with "
                "--allow-changes, which is recorded"
            )

    def _digests(self) -> dict[str, str]:
        """Path of a stage input → sha256 of its content."""
        return {path: self.inputs[name] for name, path in (self.resolved["run"]["inputs"] or {}).items()}

    @property
    def has_finished(self) -> bool:
        """Whether nothing is left to do for a run that shall be gone on with."""
        changed = self.changes or self.other_weights or self.before.get("resumed")
        return self.before.get("status") == "finished" and not changed

    def _parse_ckpt_path(self) -> None:
        """Check that a checkpoint fits the model; the configuration, not the checkpoint, says what to build."""
        path = self.resolved.get("ckpt_path")
        if self.parse_only or not path:
            return
        if not Path(path).is_file():
            raise UserError(
                f"ckpt_path: no file at {path}; `--resume RUN_DIR` goes on with a run, --from takes its model"
            )
        saved = read_checkpoint(Path(path), "ckpt_path").get("hyper_parameters", {})
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
        with construction_errors(self.resolved):
            super().instantiate_classes()
        self.model._log_hyperparams = self.datamodule._log_hyperparams = False  # W&B gets the whole config once

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        self.settings = self._get(self.config_init, "run")
        _allow_tf32(self.settings.tf32)
        identity = runs.identity_hash(runs.identity(self.resolved, self._digests()))
        self.method = self.settings.method or method_of(self.resolved["model"]["class_path"])
        self.dataset = self.settings.dataset or dataset_of(self.resolved["data"])
        root = Path(self.resolved["trainer"]["default_root_dir"] or "runs")
        inherited = os.environ.get(_RUN_DIR) if os.environ.get("LOCAL_RANK", "0") != "0" else None
        place = root / self.method / self.dataset
        nodes = self.resolved["trainer"]["num_nodes"]
        chosen = self.call.run_dir or place / (self.settings.id or runs.new_run_id(identity, place, nodes))
        # Of a launch the first process chooses: others would look when its folder may be there already.
        self.run_dir = Path(inherited) if inherited else runs.told_by_rank_zero(chosen.resolve())
        self.title = self.settings.experiment or self.dataset
        self.recorder = RunRecorder(
            self.run_dir,
            self.only,
            self.method,
            self.dataset,
            self.resolved,
            identity,
            inputs=self.inputs,
            before=self.before,
            changes=self.changes,
            allow_changes=self.call.allow_changes,
            on_changes=self.save_config,
        )
        config = dict(self._get(self.config_init, "trainer"))
        return self._instantiate_trainer({**config, **self._standard(config), **kwargs}, [])

    def _standard(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Trainer arguments of the suite: folder, loggers, callbacks, atomic checkpoints."""
        users = _listed(config.get("callbacks"))
        loggers = [logger for logger in _listed(config.get("logger")) if not isinstance(logger, bool)]
        # ThroughputMonitor first: the time that other callbacks take counts as outside the step.
        throughput, *others, resume = (self._get(self.config_init, key) for key in STANDARD_CALLBACKS)
        for callback in others:
            if isinstance(callback, callbacks.ExportArtifact) and callback.title is None:
                callback.title = f"{self.method}-{self.title}"
        added = [throughput, *users, *others, *self._best(config), self.recorder]
        added.append(Opening(f"{self.method}: {self.title}", self.run_dir))
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in users):
            added.append(progress_callback())
        if self.only == "predict":
            writer = self._get(self.config_init, "predictions")
            writer.resume = True  # a new run folder is empty: only a resumed one has anything to go on with
            path = self.resolved.get("ckpt_path")
            writer.checkpoint = path if path and Path(path).is_file() else None
            added.append(writer)
        return {
            "default_root_dir": str(self.run_dir),
            "logger": [RunCSVLogger(self.run_dir), *loggers],
            "callbacks": [*added, resume],
            "plugins": [*_listed(config.get("plugins")), callbacks.AtomicCheckpointIO()],
            "enable_model_summary": bool(config.get("enable_model_summary")),
        }

    def _best(self, config: Mapping[str, Any]) -> list[callbacks.BestCheckpoint]:
        """For a module that says what it is judged by."""
        metric = getattr(self.model, "primary_metric", None)
        if self.only != "fit" or config.get("limit_val_batches") == 0 or metric is None:
            return []
        return [callbacks.BestCheckpoint(metric.name, metric.mode)]

    # -- running

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing yet: `Session` runs what was built."""

    def start(self) -> None:
        """What LightningCLI would have done by itself."""
        super()._run_subcommand(self.only)

    def config_text(self) -> str:
        """The complete configuration as YAML, as it stands in a run folder."""
        saved = self.config[self.only].clone()
        saved.pop("config", None)
        return self._parser(self.only).dump(saved, skip_none=False, skip_validation=True)

    def save_config(self, changes: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write config.yaml into the run folder, unless there is one; with changes in any case, and what they were."""
        path = self.run_dir / "config.yaml"
        if path.exists() and not changes:
            return
        lines = [
            f"# changed on {change['date']}: {key}: {json.dumps(old)} -> {json.dumps(new)}\n"
            for change in changes
            for key, (old, new) in change["keys"].items()
        ]
        atomic_write(path, "".join(lines) + self.config_text())


class Session:
    """Runs what a `LeanlightCLI` built, in its run folder.

    Args:
        cli: trainer, model, data and configuration.
    """

    def __init__(self, cli: LeanlightCLI) -> None:
        self.cli, self.trainer, self.run_dir = cli, cli.trainer, cli.run_dir
        self._made: list[Path] = []  # parents of the run folder that were not there before
        self._opened = False

    def run(self) -> None:
        """Run the subcommand, after a fit also the test; nothing of a run that has finished."""
        if self.cli.has_finished:
            self._say_finished()
            return
        with self._cleaned_up_on_bad_input():
            ensure = getattr(self.cli.datamodule, "ensure_available", None)
            if ensure is not None:
                ensure()
            self._warn_of_fresh_weights()
            with self._locked():
                try:
                    self._open()
                    with self.cli.recorder.recording(self.trainer):
                        with restoring_errors(self.cli.resolved):
                            self.cli.start()
                            if self.cli.only == "fit":
                                self._test()
                        if self.cli.only == "predict":
                            self._collect()
                except BaseException:
                    close_wandb(self.trainer.loggers, exit_code=1)
                    raise
                self._tell_best()
                if self.cli.only in ("fit", "predict") and self.trainer.is_global_zero:
                    tell_lineage(self.trainer.loggers, self.run_dir, self.cli.resolved["run"]["inputs"] or {})
                close_wandb(self.trainer.loggers, exit_code=0)
        self._say_where()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process writes into the run folder: the first of a launch, while it lives."""
        if not self.trainer.is_global_zero:
            yield
            return
        self._made = [parent for parent in self.run_dir.parents if not parent.exists()]
        with locked(self.run_dir):
            yield

    @rank_zero_only
    def _warn_of_fresh_weights(self) -> None:
        """A pre-trained network may be measured as it comes, so this is no error."""
        trains = any(parameter.requires_grad for parameter in self.cli.model.parameters())
        if self.cli.only in ("validate", "test") and trains and not self.cli.resolved.get("ckpt_path"):
            warn(
                "ckpt_path: none given, so weights are measured that no run has trained; --from RUN_DIR takes those of "
                "a run"
            )

    def _open(self) -> None:
        if self.trainer.is_global_zero:
            if not self.cli.call.resumes and self.run_dir.exists():
                raise UserError(
                    f"run.id: {self.run_dir} exists already; choose another --run.id, or go on with --resume RUN_DIR"
                )
            if self.cli.call.resumes:
                self._take_over()
            try:
                (self.run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
                self._opened = True
                self.cli.save_config()
            except OSError as error:
                where = f"trainer.default_root_dir: cannot write {self.run_dir}"
                raise UserError(f"{where} ({error.strerror or error})") from error
            os.environ[_RUN_DIR] = str(self.run_dir)
        self._add_loggers()

    def _take_over(self) -> None:
        """What only the owner of the folder may look at or remove, and may have changed while this process started."""
        if (runs.read_summary(self.run_dir) or {}) != self.cli.before:
            raise UserError(f"--resume: another process has just worked in {self.run_dir}; run the command again")
        sweep_parts(self.run_dir)
        if self.cli.only == "fit" and not self.cli.resolved.get("ckpt_path"):
            for path in self.run_dir.iterdir():  # killed before its first checkpoint: nothing counts but what was asked
                if path.name not in ("config.yaml", "wandb"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.trainer.loggers = [
            RunCSVLogger(self.run_dir) if isinstance(x, RunCSVLogger) else x for x in self.trainer.loggers
        ]

    def _add_loggers(self) -> None:
        """Begin what tracks the run beside metrics.csv; what cannot begin is left out."""
        settings, title = self.cli.settings, self.cli.title
        if self.cli.resolved["trainer"]["fast_dev_run"]:
            return
        name = settings.id or f"{title}-s{self.cli.resolved['seed_everything']}-{self.run_dir.name}"
        own = [keep_from_stopping(x) for x in self.trainer.loggers if not isinstance(x, RunCSVLogger)]
        added = []
        if settings.wandb != "disabled" and not any(isinstance(x, pl.loggers.WandbLogger) for x in own):
            added.append(open_wandb(settings.wandb, self.run_dir, partial(self._wandb, name)))
        if settings.tensorboard:
            added.append(open_logger("TensorBoard", partial(RunTensorBoardLogger, self.run_dir)))
        if settings.mlflow:
            made = partial(RunMLFlowLogger, self.run_dir, settings.wandb_project, name)
            added.append(open_logger("MLflow", made))
        self.trainer.loggers = [*self.trainer.loggers, *(logger for logger in added if logger is not None)]

    def _wandb(self, name: str, offline: bool) -> RunWandbLogger:
        settings = self.cli.settings
        return RunWandbLogger(
            name=name,
            id=f"{self.cli.method}-{self.cli.dataset}-{self.run_dir.name}"[-120:],
            save_dir=self.run_dir,
            project=settings.wandb_project,
            offline=offline,
            group=self.cli.method,
            job_type=self.cli.only,
            tags=[self.cli.dataset, *settings.tags],
            notes=settings.notes or None,
            resume="allow",
        )

    def _test(self) -> None:
        which = self.cli.settings.test
        if which == "none" or self.cli.resolved["trainer"]["fast_dev_run"] or self.trainer.interrupted:
            return
        if not has_test(self.cli.model):
            return
        best = self.run_dir / "checkpoints" / "best.ckpt"
        if which == "best" and not best.is_file():
            raise UserError("run.test: best, but there is no best.ckpt because no validation ran; use last")
        if which == "best":
            check_whole(best, "run.test")
        self.trainer.test(
            self.cli.model,
            datamodule=self.cli.datamodule,
            ckpt_path=str(best) if which == "best" else None,
            weights_only=True,
            verbose=False,
        )

    @rank_zero_only
    def _collect(self) -> None:
        """Let a module make one artefact of all that it predicted; not of a part, as after Ctrl-C or in a trial."""
        trainer, module, limit = self.trainer, self.cli.model, self.trainer.limit_predict_batches
        if not isinstance(module, CollectsPredictions) or trainer.interrupted or type(limit) is int or limit < 1:
            return
        folder = self.run_dir / "artifacts" / getattr(module, "collected_in", "bank")
        folder.mkdir(parents=True, exist_ok=True)
        told = module.collect(partial(read_predictions, self.run_dir), folder)
        numbers = {f"predict/{name}": float(value) for name, value in told.items()}
        self.cli.recorder.metrics |= numbers
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=0)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by a connector, out of mypy's sight
            if isinstance(callback, callbacks.MediaLogger):
                callback.on_predict_end(trainer, self.cli.model)  # again: only now its pictures show the whole

    @contextmanager
    def _cleaned_up_on_bad_input(self) -> Iterator[None]:
        """Bad input found before the first step leaves no run folder behind."""
        try:
            with memory_errors():
                yield
        except (UserError, MisconfigurationException) as error:
            if self._opened and not self.cli.call.resumes and not self.cli.recorder.started:
                shutil.rmtree(self.run_dir, ignore_errors=True)
                with suppress(OSError):  # another run has come beside it
                    for parent in self._made:
                        parent.rmdir()
            raise with_prefix(error, self.cli.resolved) from error

    @rank_zero_only
    def _tell_best(self) -> None:
        """Tell W&B the best validation of the whole run, resumed or not, for its lists and sweeps."""
        metric = getattr(self.cli.model, "primary_metric", None)
        table = next(logger for logger in self.trainer.loggers if isinstance(logger, RunCSVLogger))
        if metric is None or self.cli.only != "fit" or (best := table.best(metric.name, metric.mode)) is None:
            return
        for logger in self.trainer.loggers:
            if isinstance(logger, RunWandbLogger):
                attempt(logger, "metrics", logger.tell_best, metric.name, best)

    @rank_zero_only
    def _say_finished(self) -> None:
        longer = "; --trainer.max_epochs=N --allow-changes makes it longer" if self.cli.only == "fit" else ""
        print(f"this run has finished, nothing is left to do{longer}\nrun: {self.run_dir}")

    @rank_zero_only
    def _say_where(self) -> None:
        print(closing(self.cli.recorder.metrics, self.cli.method, self.run_dir))


# -- from Python


def build(config: str | Sequence[str], overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Trainer, model and data of a config, as ``leanlight fit --config`` makes them.

    ``trainer.fit(model, data)`` then trains in a new run folder, ``trainer.default_root_dir``, with the suite's
    callbacks; `load` and every command take that folder. W&B is left out.

    Args:
        config: name or path of a config, or several that are laid over one another.
        overrides: dotted key → value, as on the command line, e.g. ``{"trainer.max_epochs": 1}``.

    Raises:
        UserError: an unknown config, key or value.
    """
    quiet_lightning()
    names = [config] if isinstance(config, str) else list(config)
    options = [word for name in names for word in ("--config", name)]
    cli = LeanlightCLI(expand(["fit", *options, *(option(*pair) for pair in (overrides or {}).items())]))
    python_run = PythonRun(cli.recorder, cli.save_config)
    cli.trainer.callbacks.insert(0, python_run)  # type: ignore[attr-defined]  # set by a connector, out of mypy's sight
    return Experiment(cli.trainer, cli.model, cli.datamodule)


def load(
    run: Path | str,
    checkpoint: str = "last",
    trust: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> pl.LightningModule:
    """A finished run's model in evaluation mode on the CPU, or that of a checkpoint file.

    Args:
        run: run folder, or a checkpoint file.
        checkpoint: ``last`` or ``best`` of a run folder.
        trust: packages outside the suite that the run may name; what it names is imported and runs.
        overrides: dotted arguments of the model that shall differ, e.g. ``{"network.init_args.weights": path}``.

    Raises:
        UserError: no such checkpoint, or it names a class that is not admitted.
    """
    source = Path(run)
    path = source / "checkpoints" / f"{checkpoint}.ckpt" if source.is_dir() else source
    if not path.is_file():
        raise UserError(f"source: no checkpoint at {path}")
    saved = read_checkpoint(path, "source")
    config = path.parent.parent / "config.yaml"
    if config.is_file():
        named = read_config(config).get("model")
    else:
        arguments = dict(saved.get("hyper_parameters") or {})
        named = {"class_path": arguments.pop("_class_path", None), "init_args": arguments}
        named["init_args"].pop("_instantiator", None)
    if not isinstance(named, dict) or not isinstance(named.get("class_path"), str):
        raise UserError(f"source: {path} does not say which module wrote it")
    for key, value in (overrides or {}).items():
        _set(named, f"init_args.{key}", value)
    model = _instantiate(pl.LightningModule, named, path, trust)
    try:
        model.on_load_checkpoint(saved)
        model.load_state_dict(saved["state_dict"])
    except UserError:
        raise
    except Exception as error:  # of a file of any content
        raise UserError(f"source: {path} does not fit {named['class_path']}: {_misfit(error)}") from error
    return model.eval()


def _set(content: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` where a dotted key leads in nested dictionaries."""
    *way, last = key.split(".")
    for step in way:
        inside = content.get(step)
        if not isinstance(inside, dict):
            raise UserError(f"{key}: the run has no {step!r} there")
        content = inside
    content[last] = value


def load_data(run: Path | str, overrides: Mapping[str, Any] | None = None, trust: Sequence[str] = ()) -> Any:
    """The DataModule of a run folder, not set up.

    Args:
        run: run folder.
        overrides: arguments of the DataModule that shall differ.
        trust: as in `load`.
    """
    path = run_config(Path(run), "source")
    named = read_config(path).get("data")
    if not isinstance(named, dict) or not isinstance(named.get("class_path"), str):
        raise UserError(f"source: {path} names no data")
    changed = {**(named.get("init_args") or {}), **(overrides or {})}
    return _instantiate(pl.LightningDataModule, {**named, "init_args": changed}, path, trust)


def _instantiate(kind: type, named: Mapping[str, Any], where: Path, trust: Sequence[str]) -> Any:
    """The one way from a config that came with a run to an object: what it names must be admitted, and a `kind`."""

    def module(config: Any) -> pl.LightningModule:
        package, _, name = config.class_path.rpartition(".")
        return rebuild(getattr(import_module(package), name), named.get("init_args") or {})

    try:
        return admitted_object(kind, "source", named, trust, module if kind is pl.LightningModule else None)
    except (jsonargparse.ArgumentError, ValueError, TypeError, ImportError) as error:
        raise UserError(f"{where}: {one_line(str(error), None)}") from error


def check_whole(path: Path, argument: str) -> None:
    """Refuse a checkpoint that is not what was written, and name the one before it."""
    spare = path.with_name("previous.ckpt")
    if not is_damaged(path, "last.ckpt" if path == spare else ""):
        return
    help = "start the run anew"
    if path.name == "last.ckpt" and spare.is_file() and not is_damaged(spare, path.name):
        help = f"the one before it is whole: {'--ckpt_path=' if argument == 'ckpt_path' else ''}{spare}"
    raise UserError(f"{argument}: {path} is damaged: its sha256 is not that of what was written; {help}")


def read_checkpoint(path: Path, argument: str) -> dict[str, Any]:
    """Content of a checkpoint, nothing of it executed; UserError naming `argument` when it is none or damaged."""
    check_whole(path, argument)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of a file of any content
        raise UserError(f"{argument}: {path} is not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(saved, dict):
        raise UserError(f"{argument}: {path} is not a checkpoint but a {type(saved).__name__}")
    named = saved.get("hyper_parameters") or {}
    if not isinstance(named, dict) or not isinstance(named.get("_class_path", ""), str):
        raise UserError(f"{argument}: {path} is no checkpoint of the suite: its hyper_parameters do not name a class")
    return saved


@contextmanager
def restoring_errors(resolved: Mapping[str, Any]) -> Iterator[None]:
    """What fails while a checkpoint is put into model, optimisers and loops is a checkpoint that does not fit."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of a file of any content
        frames = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
        if not any("checkpoint_connector" in code.co_filename and "restore" in code.co_name for code in frames):
            raise
        where = f"ckpt_path: {resolved.get('ckpt_path') or 'the checkpoint'}"
        raise UserError(f"{where} does not fit {resolved['model']['class_path']}: {_misfit(error)}") from error


def _misfit(error: Exception) -> str:
    """Why a checkpoint does not fit, in short."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    return (others[0] if first.startswith("Error(s) in loading") and others else first).strip()[:200]


# -- what a configuration says


def resolve(subcommand: str, args: list[str]) -> dict[str, Any]:
    """Complete configuration of ``leanlight SUBCOMMAND ARGS`` without building anything. Raises UserError."""
    return LeanlightCLI(expand([subcommand, *args]), parse_only=True).resolved


def has_test(model: pl.LightningModule) -> bool:
    """Whether a module measures itself on test data."""
    return type(model).test_step is not pl.LightningModule.test_step


def method_of(class_path: str) -> str:
    """Folder name of a model: its package in lit_modules, else the class's own name in lower case."""
    parts = class_path.split(".")
    return parts[1] if parts[0] == "lit_modules" and len(parts) > 2 else parts[-1].lower()


def dataset_of(data: Mapping[str, Any]) -> str:
    """Folder name of a data set: what the DataModule calls `dataset`, else its class's name in lower case."""
    named = (data.get("init_args") or {}).get("dataset")
    return str(named) if named else str(data["class_path"]).rsplit(".", 1)[-1].lower()


def _allow_tf32(allowed: bool) -> None:
    """Whether GPUs may round what they multiply in float32; PyTorch by itself lets cuDNN's convolutions do so."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


@contextmanager
def construction_errors(resolved: Mapping[str, Any]) -> Iterator[None]:
    """Bad values that a class of the configuration refuses are the user's errors, however deep they were wrapped."""
    try:
        with memory_errors():
            yield
    except (UserError, ValueError, TypeError, ImportError, MisconfigurationException) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        text = f"config: {' '.join(str(error).split())}"
        if "No supported gpu backend" in text:
            text = "trainer.accelerator: gpu, but PyTorch finds none on this machine; use cpu, or leave the overlay out"
        raise with_prefix(cause or UserError(text), resolved) from error


@contextmanager
def _as_user_errors() -> Iterator[None]:
    try:
        yield
    except OmegaConfBaseException as error:
        raise UserError(f"config: {' '.join(str(error).split())}") from error
    except jsonargparse.ArgumentError as error:
        raise UserError(one_line(str(error), None)) from error
