"""Run a pipeline: each stage an ordinary run folder, finished stages reused by hash."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from leanlight import runs
from leanlight.configs_path import config_root, find_configs
from leanlight.contracts.errors import UserError, nearest
from leanlight.contracts.files import sweep_parts
from leanlight.invocation import option
from leanlight.locks import RunLock, locked
from leanlight.registry import MethodInfo
from leanlight.results.launch import command, environment, run_in_foreground
from leanlight.results.pipeline_spec import (
    PipelineSpec,
    Reference,
    Stage,
    load_pipeline,
    references,
    stage_commands,
    substitute,
)
from leanlight.results.reading import read_mapping
from leanlight.results.state import Decision, clear, decide, resume_words

Say = Callable[[str], None]


def _say(text: str) -> None:
    print(text, flush=True)  # before the child's own lines, also where output is a file


_CHECKPOINTS = {"artifacts.checkpoint": "checkpoints/last.ckpt", "artifacts.best": "checkpoints/best.ckpt"}
Resolved = dict[tuple[str, ...], dict[str, Any]]  # words of a command → its complete configuration
_ANY_METRIC = 0.5  # stands in for what is not measured yet: a share, a positive number


class PipelineRunner:
    """Runs the stages of one pipeline in order.

    Args:
        spec: the pipeline.
        runs_root: folder of all runs.
        run_id: name of the pipeline's own summary under ``<runs_root>/pipelines``; by default the file's stem.
        say: where lines for the reader go.
        resolved: configurations that were parsed before, and are added to: pipelines of one table share most stages.
    """

    def __init__(
        self, spec: PipelineSpec, runs_root: Path, run_id: str = "", say: Say = _say, resolved: Resolved | None = None
    ) -> None:
        self.spec, self.runs_root, self.say = spec, runs_root, say
        self.folder = runs_root / "pipelines" / runs.folder_name(run_id or spec.stem, "--id")
        self.run_dirs: dict[str, Path] = {}
        self._resolved: Resolved = {} if resolved is None else resolved
        self._stages: list[dict[str, Any]] = []
        self._begin = time.monotonic()
        before = runs.read_summary(self.folder) or {}
        # A summary of status finished stands until something of the pipeline runs anew.
        self._stands = before.get("status") == "finished" and before.get("config_hash") == pipeline_identity(spec)

    def run(self, *, fresh: bool = False, start_at: str = "", rerun_stale: bool = False) -> int:
        """Run what is missing; return 0 when every stage has finished, else the exit code of the one that failed.

        Args:
            fresh: repeat every stage.
            start_at: repeat this stage and those after it.
            rerun_stale: repeat stages whose code has changed since they ran.
        """
        names = [stage.name for stage in self.spec.stages]
        if start_at and start_at not in names:
            raise UserError(f"--from: no stage {start_at!r}{nearest(start_at, names)}; stages: {', '.join(names)}")
        self.check()
        repeat_from = 0 if fresh else names.index(start_at) if start_at else len(names)
        with locked(self.folder, lambda: self.say("another process runs this pipeline; waiting")):
            sweep_parts(self.folder)
            return self._run_stages(repeat_from, rerun_stale)

    def _run_stages(self, repeat_from: int, rerun_stale: bool) -> int:
        names = [stage.name for stage in self.spec.stages]
        for position, stage in enumerate(self.spec.stages):
            self._write("running")
            try:
                code = self._run_stage(stage, f"{position + 1}/{len(names)}", position >= repeat_from, rerun_stale)
            except KeyboardInterrupt:
                self._write("interrupted")
                self.say(f"interrupted in stage {stage.name}; the same command goes on from here")
                raise
            if code:
                self._write("failed")
                self.say(f"stage {stage.name} failed (exit code {code})")
                return code
        self._write("finished")
        return 0

    def _run_stage(self, stage: Stage, place: str, fresh: bool, rerun_stale: bool) -> int:
        stage, inputs = self.connect(stage)
        arguments, identity = self._identify(stage, inputs)
        run_id = f"{self.spec.stem}-{stage.name}-{identity[:8]}"
        run_dir = self._place(run_id)
        self.run_dirs[stage.name] = run_dir
        waiting = partial(self.say, f"[{place}] {stage.name}: another process works on it; waiting")
        try:
            with locked(run_dir, waiting) as lock:
                decision = decide(run_dir, identity, fresh=fresh, rerun_stale=rerun_stale)
                self.say(f"[{place}] {stage.name}: {decision.action} ({decision.why})  {run_dir}")
                if self._stands and decision.action != "reuse":
                    self._stands = False
                    self._write("running")
                code = self._act(decision, stage, arguments, run_dir, identity, lock)
        finally:
            summary = runs.read_summary(run_dir) or {}
            status = summary.get("status", "not started")
            self._stages.append({"name": stage.name, "run_dir": self._relative(run_dir), "status": status})
        self._stages[-1] |= {"config_hash": identity, "action": decision.action, "stale": decision.stale}
        if code == 0 and status != "finished":
            raise UserError(f"stage {stage.name}: ended without a finished summary.json in {run_dir}")
        return code

    def _act(
        self, decision: Decision, stage: Stage, arguments: list[str], run_dir: Path, identity: str, lock: RunLock
    ) -> int:
        if decision.action == "reuse":
            return 0
        if decision.action == "diverged":
            return 1
        if decision.action == "resume" and stage.trains:
            return run_in_foreground(command(*resume_words(run_dir)), environment(), lock)
        if decision.action == "start":
            clear(run_dir, self.runs_root)
        if not stage.trains:
            return self._run_stage_command(stage, arguments, run_dir, identity, lock)
        where = ["--run.id", run_dir.name, option("trainer.default_root_dir", str(self.runs_root))]
        return run_in_foreground(command(stage.command, *arguments, *where), environment(), lock)

    def _run_stage_command(
        self, stage: Stage, arguments: list[str], run_dir: Path, identity: str, lock: RunLock
    ) -> int:
        """Run a command that writes a folder but, being no run of a Trainer, no summary: the stage gets one here."""
        begin, output = time.monotonic(), run_dir / "artifacts" / stage.command
        called = stage_commands()[stage.command]
        origin = runs.read_summary(runs.run_of(Path(stage.inputs["source"]))) or {}
        code = {*(origin.get("code_files") or []), called.module.replace(".", "/") + ".py"}
        commit, dirty = runs.commit()

        def write(status: str, **more: Any) -> None:
            code_hash, code_files = runs.code_version(code)
            summary = {
                "status": status,
                "method": self.spec.method,
                "dataset": self.spec.dataset,
                "run_id": run_dir.name,
                "command": [stage.command],
                "metrics": {},
                "config_hash": identity,
                "code_hash": code_hash,
                "code_files": code_files,
                "commit": commit,
                "dirty": dirty,
                "wall_s": round(time.monotonic() - begin, 3),
                "machine": runs.machine(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            runs.write_summary(run_dir, summary | more)

        write("running")
        try:
            status = run_in_foreground(command(stage.command, *arguments, "--output", str(output)), environment(), lock)
        except KeyboardInterrupt:
            write("interrupted")
            raise
        if status:
            write("failed")
            return status
        record = json.loads((output / called.record).read_text()) if called.record else {}
        code |= set(record.get("code_files", []))
        numbers = {key: value for key, value in record.items() if type(value) in (int, float)}
        write("finished", metrics=numbers, artifacts=runs.list_artifacts(run_dir))
        return 0

    # -- before the first stage

    def check(self) -> None:
        """Parse the complete command of every stage, so that a mistake in the last is found before the first one runs.

        Where a stage takes an output of an earlier one, the path that output will have, or any number, stands in for
        it. Raises UserError; writes nothing.
        """
        for stage in self.spec.stages:
            for name, path in stage.inputs.items():
                if not list(references(path, stage.name)) and not Path(path).exists():
                    raise UserError(f"stage {stage.name}: input {name!r}: nothing at {path}")
            overrides, inputs = (substitute(part, self._stand_in) for part in (stage.overrides, stage.inputs))
            stage = replace(stage, overrides=overrides, inputs=inputs)
            try:
                arguments = self._arguments(stage, {})
                if stage.trains:
                    self._resolve(stage.command, arguments)
                else:
                    import_module(stage_commands()[stage.command].module).arguments(arguments)
            except UserError as error:
                raise UserError(f"stage {stage.name}: {error}") from None

    def _stand_in(self, reference: Reference) -> str | float:
        if reference.output.startswith("metrics."):
            return _ANY_METRIC
        return str(_inside(self._place(f"{self.spec.stem}-{reference.stage}"), reference))

    # -- what a stage depends on

    def connect(self, stage: Stage) -> tuple[Stage, dict[str, str]]:
        """Put the outputs of earlier stages into a stage; return it and the paths that it depends on, by name."""
        used: dict[str, str] = {}
        for reference in references([stage.inputs, stage.overrides], stage.name):
            output = self._output(reference)
            if isinstance(output, Path):
                used[f"{reference.stage}.{reference.output}"] = str(output)

        def lookup(reference: Reference) -> str | float:
            output = self._output(reference)
            return str(output) if isinstance(output, Path) else output

        inputs = substitute(stage.inputs, lookup)
        for name, path in inputs.items():
            if not Path(path).exists():
                raise UserError(f"stage {stage.name}: input {name!r}: nothing at {path}")
            if path not in used.values():
                used[name] = path
        return replace(stage, overrides=substitute(stage.overrides, lookup), inputs=inputs), used

    def _output(self, reference: Reference) -> Path | float:
        run_dir = self.run_dirs[reference.stage]
        if reference.output.startswith("metrics."):
            name = reference.output.removeprefix("metrics.")
            metrics = (runs.read_summary(run_dir) or {}).get("metrics", {})
            if name not in metrics:
                raise UserError(f"{reference}: stage {reference.stage} measured no {name!r}{nearest(name, metrics)}")
            return float(metrics[name])
        path = _inside(run_dir, reference)
        if not path.exists():
            raise UserError(f"{reference}: stage {reference.stage} left nothing at {path}")
        return path

    def _arguments(self, stage: Stage, inputs: dict[str, str]) -> list[str]:
        """Words after a stage's command, but for those that say where its run folder is."""
        overrides = [option(key, value) for key, value in stage.overrides.items()]
        if not stage.trains:
            return [stage.inputs["source"], *overrides]
        names = [option("run.method", self.spec.method), option("run.dataset", self.spec.dataset)]
        return ["--config", stage.config, *overrides, *names, *([option("run.inputs", inputs)] if inputs else [])]

    def _identify(self, stage: Stage, inputs: dict[str, str]) -> tuple[list[str], str]:
        """Return the arguments of a stage's command and its identity: inputs count by content, not by place."""
        arguments = self._arguments(stage, inputs)
        if stage.trains:
            resolved = self._resolve(stage.command, arguments)
        else:
            resolved = {"model": {"command": stage.command, "options": stage.overrides}}
        return arguments, runs.config_hash(resolved, inputs)

    def _resolve(self, name: str, arguments: list[str]) -> dict[str, Any]:
        """The complete configuration of a stage; one that depends on no other is parsed once for check and run."""
        from leanlight.experiment import resolve  # loads torch, so only when a stage needs it

        key = (name, *arguments)
        if key not in self._resolved:
            self._resolved[key] = resolve(name, arguments)
        return self._resolved[key]

    def _place(self, run_id: str) -> Path:
        return self.runs_root / self.spec.method / self.spec.dataset / run_id

    # -- the pipeline's own summary

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.runs_root).as_posix()

    def _write(self, status: str) -> None:
        if self._stands and status != "finished":
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        summaries = [runs.read_summary(run_dir) or {} for run_dir in self.run_dirs.values()]
        code_hash, code_files = runs.code_version({name for s in summaries for name in s.get("code_files", ())})
        summary = {
            "status": status,
            "pipeline": self.spec.stem,
            "config_hash": pipeline_identity(self.spec),
            "code_hash": "mixed" if any(stage.get("stale") for stage in self._stages) else code_hash,
            "code_files": code_files,
            "stages": self._stages,
            "wall_s": round(time.monotonic() - self._begin, 3),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        runs.write_summary(self.folder, summary)


def _inside(run_dir: Path, reference: Reference) -> Path:
    """Where a stage with this run folder leaves what a reference names."""
    kind, _, what = reference.output.partition(".")
    return run_dir / (_CHECKPOINTS.get(reference.output) or ("" if kind == "run_dir" else f"artifacts/{what}"))


def smallest_overrides(info: MethodInfo, runs_root: Path, say: Say = _say) -> dict[str, Any]:
    """Keys and values that a method's smallest config needs beside its own, such as files that earlier stages make.

    The stages are run, or reused where they have finished; nothing happens for a method whose config needs nothing.

    Args:
        info: the method.
        runs_root: folder of their runs; processes may share it.
        say: where lines for the reader go.

    Raises:
        UserError: the pipeline lacks the config, or one of its stages fails.
    """
    if not info.smallest_inputs:
        return {}
    spec = load_pipeline(info.smallest_inputs)
    found = [position for position, stage in enumerate(spec.stages) if stage.config == info.smallest]
    if not found:
        raise UserError(f"{info.smallest_inputs}: expected a stage with config {info.smallest}")
    earlier, stage = spec.stages[: found[-1]], spec.stages[found[-1]]
    runner = PipelineRunner(replace(spec, stages=earlier), runs_root, say=say)
    if code := runner.run():
        raise UserError(f"{info.smallest_inputs}: a stage before {stage.name} failed (exit code {code})")
    return runner.connect(stage)[0].overrides


def set_overrides(pairs: list[str]) -> dict[str, Any]:
    """Read ``stage.key=value`` options; values are read as YAML."""
    import yaml

    overrides = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--set: expected stage.key=value, got {pair!r}")
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            overrides[key] = text
    return overrides


def pipeline_identity(spec: PipelineSpec) -> str:
    """Hash of everything a pipeline and its configs say; the stages' own hashes are known only as it runs."""
    stages = [[s.name, s.command, s.overrides, s.inputs] for s in spec.stages]
    names = {stage.config for stage in spec.stages if stage.config}
    configs = {name: [read_mapping(path) for path in find_configs(name)] for name in names}
    defaults = read_mapping(config_root() / "defaults.yaml")
    return runs.config_hash({"model": [spec.method, spec.dataset, stages, configs, defaults]})
