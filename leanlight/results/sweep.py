"""Run a sweep on this machine: Optuna chooses the settings, each trial is an ordinary run of `leanlight fit`."""

from __future__ import annotations

import csv
import math
import shlex
import signal
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

from leanlight.contracts.errors import UserError, nearest
from leanlight.experiment import dataset_of, method_of, resolve
from leanlight.invocation import option
from leanlight.locks import locked
from leanlight.results.display import CellProgress
from leanlight.results.launch import Child, Job, command, run_jobs, signal_group, visible_gpus, why_failed
from leanlight.results.state import clear, decide, resume_words
from leanlight.results.sweep_report import say_end, show, write_report
from leanlight.results.sweep_spec import SweepSpec
from leanlight.runs import config_hash, read_summary

_FAILURES = 3  # of one command, after which no new trial starts: there is something to mend


class _Grid(BaseSampler):
    """The combinations in their order, by the trial's number."""

    def __init__(self, spec: SweepSpec) -> None:
        self._points = list(product(*(parameter.choices for parameter in spec.parameters)))
        self._place = {parameter.key: place for place, parameter in enumerate(spec.parameters)}

    def __len__(self) -> int:
        return len(self._points)

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: FrozenTrial, param_name: str, param_distribution: Any) -> str:
        return self._points[trial.number][self._place[param_name]]


class Sweep:
    """A sweep in its folder, ``RUNS_ROOT/sweeps/NAME``; its runs lie where those of `leanlight fit` do.

    What has not finished, whatever ended it, is a running trial to Optuna: the next command goes on with it first.

    Args:
        spec: what to run.
        runs_root: folder of all runs.
        jobs: processes side by side.
    """

    def __init__(self, spec: SweepSpec, runs_root: Path, jobs: int) -> None:
        self.spec, self.root, self.jobs = spec, runs_root, jobs
        self.folder = runs_root / "sweeps" / spec.name
        grid = _Grid(spec) if spec.method == "grid" else None
        self.grid, self.total = grid, min(len(grid), spec.trials or len(grid)) if grid else spec.trials or 0
        self._trials: dict[str, Trial] = {}  # by the key of a job
        self._sizes: dict[str, int] = {}  # of metrics.csv when it was read, by the key of a job
        self._failed = 0

    def run(self) -> int:
        """Run what is missing; 0 when every trial has an end of its own, 1 when one failed."""
        self._check()
        with locked(self.folder):
            self.study = self._open()
            left = self.total - sum(trial.state.is_finished() for trial in self.study.trials)
            # Optuna warns of what is experimental in it.
            with CellProgress(max(left, 0), what="trials") as self.progress, warnings.catch_warnings(action="ignore"):
                if left > 0:
                    self.progress.say(f"sweep {self.spec.name}: {left} of {self.total} trials to run")
                try:
                    run_jobs(
                        self._pending(),
                        self.jobs,
                        visible_gpus() if self.jobs > 1 else (),
                        started=self.progress.started,
                        watched=self._watch,
                        ended=self._ended,
                    )
                except KeyboardInterrupt:
                    self.progress.say("interrupted; the same command goes on: what has finished is kept")
                    raise
                finally:
                    ranked = write_report(self.study, self.spec, self.folder)
            say_end(ranked, self.spec, self.folder, self.root)
        return int(any(not trial.state.is_finished() for trial in self.study.trials))

    def _check(self) -> None:
        """Refuse keys and values that the config does not take, before anything is written."""
        samples = [parameter.samples() for parameter in self.spec.parameters]
        for values in zip_longest(*samples):
            given = [each[0] if value is None else value for each, value in zip(samples, values, strict=True)]
            pairs = zip(self.spec.parameters, given, strict=True)
            resolved = resolve("fit", [*self.spec.command, *(option(p.key, value) for p, value in pairs)])
        self.offline = ["--run.wandb=offline"] if resolved["run"]["wandb"] == "auto" else []

    def _open(self) -> optuna.Study:
        spec, path = self.spec, self.folder / "study.db"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        first, eta = spec.pruning or (1, 2)
        goal = optuna.study.StudyDirection[spec.goal.upper()]
        pruner = optuna.pruners.SuccessiveHalvingPruner(first, eta) if spec.pruning else optuna.pruners.NopPruner()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            store, name = f"sqlite:///{path.resolve()}", spec.name
            study = optuna.create_study(
                storage=store, study_name=name, direction=goal, pruner=pruner, load_if_exists=True
            )
        except Exception as error:  # of a file of any content
            raise UserError(f"{path}: cannot be read as the study of a sweep ({type(error).__name__})") from error
        before = study.user_attrs.get("sweep") or {}
        if changed := [key for key, value in spec.identity.items() if before.get(key, value) != value]:
            if any(trial.state.is_finished() for trial in study.trials):
                raise UserError(
                    f"{changed[0]}: {self.folder} holds a sweep of that name with another; give this one another name"
                )
            optuna.delete_study(study_name=name, storage=store)  # nothing is lost: the file was mended
            study = optuna.create_study(storage=store, study_name=name, direction=goal, pruner=pruner)
        study.set_user_attr("sweep", spec.identity)
        return study

    # -- trials

    def _pending(self) -> Iterator[Job]:
        """Trials to go on with, then new ones, each chosen when there is a place for it."""
        for old in self.study.get_trials(states=(TrialState.RUNNING,)):
            if old.user_attrs.get("pruned"):  # the command ended before it could say so
                self.study.tell(old.number, state=TrialState.PRUNED)
            elif job := self._job(Trial(self.study, old._trial_id)):
                with locked(job.run_dir, partial(self.progress.say, f"{job.key}: still runs; waiting for it")):
                    pass
                yield job
        while (number := len(self.study.trials)) < self.total and self._failed < _FAILURES:
            # Anew for each trial, so that what is drawn does not depend on where a sweep was interrupted.
            random = RandomSampler(number) if self.spec.method == "random" else TPESampler(seed=number)
            self.study.sampler = self.grid or random
            if job := self._job(self.study.ask()):
                yield job

    def _job(self, trial: Trial) -> Job | None:
        """The run of a trial; None when the config does not take what was drawn."""
        given = {parameter.key: parameter.draw(trial) for parameter in self.spec.parameters}
        words = [*self.spec.command, *(option(*pair) for pair in given.items()), *self.offline]
        key = f"trial {trial.number}"
        trial.set_user_attr("command", shlex.join(["leanlight", "fit", *words]))
        try:
            resolved = resolve("fit", words)
        except UserError as error:
            trial.set_user_attr("why", str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            self.progress.say(f"{key}: {error}")
            return None
        run = resolved["run"]
        identity = config_hash(resolved, run["inputs"])
        name = f"{self.spec.name}-{trial.number:03d}-{identity[:8]}"
        method = run["method"] or method_of(resolved["model"]["class_path"])
        place = self.root / method / (run["dataset"] or dataset_of(resolved["data"])) / name
        trial.set_user_attr("run", str(place.relative_to(self.root)))
        self._trials[key] = trial

        def prepare() -> list[str] | None:
            action = decide(place, identity).action
            if action == "resume":
                return command(*resume_words(place))
            if action != "start":
                return None
            clear(place, self.root)
            return command("fit", *words, f"--run.id={name}", f"--trainer.default_root_dir={self.root}")

        return Job(key, place, self.folder / "logs" / f"{name}.log", prepare)

    def _watch(self, job: Job, process: Child) -> None:
        """Stop a trial that is behind the others, by Ctrl-C: it leaves a checkpoint."""
        path = job.run_dir / "metrics.csv"
        if self.spec.pruning is None or not path.is_file() or self._sizes.get(job.key) == path.stat().st_size:
            return
        self._sizes[job.key], trial = path.stat().st_size, self._trials[job.key]
        if "pruned" not in trial.user_attrs and self._report(job, trial):
            trial.set_user_attr("pruned", True)
            signal_group(process, signal.SIGINT)

    def _report(self, job: Job, trial: Trial) -> bool:
        """Tell Optuna the best of each validation so far; whether the trial shall be stopped."""
        values = self._values(job.run_dir)
        told = len(self.study.trials[trial.number].intermediate_values)
        best = max if self.spec.goal == "maximize" else min
        for step in range(told + 1, len(values) + 1):
            trial.report(best(values[:step]), step)
            if trial.should_prune():
                return True
        return False

    def _values(self, run_dir: Path) -> list[float]:
        """What the run's validations have measured."""
        path, metric = run_dir / "metrics.csv", self.spec.metric
        if not path.is_file():
            return []
        with open(path, newline="") as file:
            texts = [row.get(metric) for row in csv.DictReader(file) if None not in row.values()]
        worst = -math.inf if self.spec.goal == "maximize" else math.inf
        return [worst if math.isnan(float(text)) else float(text) for text in texts if text]

    def _ended(self, job: Job, code: int) -> None:
        trial = self._trials.pop(job.key)
        summary = read_summary(job.run_dir) or {}
        status, values = summary.get("status"), self._values(job.run_dir)
        if status == "finished" and not values:
            known = sorted(name for name in summary["metrics"] if name.startswith("val/"))
            raise UserError(
                f"metric.name: {job.run_dir} has no {self.spec.metric!r}{nearest(self.spec.metric, known)}; "
                f"of validation it has: {', '.join(known) or 'nothing'}"
            )
        best = (max if self.spec.goal == "maximize" else min)(values, default=math.nan)
        if status == "finished" and math.isfinite(best):
            trial.set_user_attr("last", values[-1])
            trial.set_user_attr("wall_s", summary.get("wall_s"))
            self.study.tell(trial, best, state=TrialState.COMPLETE)
        elif status in ("finished", "diverged"):
            trial.set_user_attr("why", summary.get("error") or f"{self.spec.metric} is not finite")
            self.study.tell(trial, state=TrialState.FAIL)
        elif trial.user_attrs.get("pruned"):
            self.study.tell(trial, state=TrialState.PRUNED)
        else:
            self._failed += 1
            why = why_failed(job, code)
            trial.set_user_attr("why", why.splitlines()[-1])
            self.progress.say(f"{why}\nlog: {job.log}")
        self.progress.ended(job, show(self.study.trials[trial.number], self.spec))
