"""Run a pipeline: each stage an ordinary run folder, finished stages reused by hash."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leanlight import runs
from leanlight.configs_path import config_root, find_configs
from leanlight.contracts.errors import UserError, nearest
from leanlight.contracts.files import sha256_file
from leanlight.results.launch import command, environment, option, run_in_foreground
from leanlight.results.pipeline_spec import PipelineSpec, Reference, Stage, references, substitute
from leanlight.results.reading import read_mapping
from leanlight.results.state import RunLock, decide

Say = Callable[[str], None]


def _say(text: str) -> None:
    print(text, flush=True)  # before the child's own lines, also where output is a file


_CHECKPOINTS = {"artifacts.checkpoint": "checkpoints/last.ckpt", "artifacts.best": "checkpoints/best.ckpt"}


class PipelineRunner:
    """Runs the stages of one pipeline in order.

    Args:
        spec: the pipeline.
        runs_root: folder of all runs.
        run_id: name of the pipeline's own summary under ``<runs_root>/pipelines``; by default the file's stem.
        say: where lines for the reader go.
    """

    def __init__(self, spec: PipelineSpec, runs_root: Path, run_id: str = "", say: Say = _say) -> None:
        self.spec, self.runs_root, self.say = spec, runs_root, say
        self.folder = runs_root / "pipelines" / (run_id or spec.stem)
        self.run_dirs: dict[str, Path] = {}
        self._stages: list[dict[str, Any]] = []
        self._begin = time.monotonic()

    def run(self, *, fresh: bool = False, start_at: str = "", rerun_stale: bool = False) -> int:
        """Run what is missing; return 0 when every stage has finished, else the exit code of the one that failed.

        fresh: repeat every stage. start_at: repeat this stage and those after it. rerun_stale: repeat stages whose code
        has changed since they ran.
        """
        names = [stage.name for stage in self.spec.stages]
        if start_at and start_at not in names:
            raise UserError(f"--from: no stage {start_at!r}{nearest(start_at, names)}; stages: {', '.join(names)}")
        repeat_from = 0 if fresh else names.index(start_at) if start_at else len(names)
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
        stage, files = self._connect(stage)
        arguments, identity = self._identify(stage, files)
        run_id = f"{self.spec.stem}-{stage.name}-{identity[:8]}"
        run_dir = self.runs_root / self.spec.method / self.spec.dataset / run_id
        self.run_dirs[stage.name] = run_dir
        lock = RunLock(self.runs_root, run_id)
        try:
            if not lock.acquire(wait=False):
                self.say(f"[{place}] {stage.name}: another process works on it; waiting")
                lock.acquire(wait=True)
            decision = decide(run_dir, identity, fresh=fresh, rerun_stale=rerun_stale)
            self.say(f"[{place}] {stage.name}: {decision.action} ({decision.why})  {run_dir}")
            code = 0
            if decision.action == "diverged":
                code = 1
            elif decision.action == "resume":
                code = run_in_foreground(command("fit", "--resume", str(run_dir)), environment(), lock)
            elif decision.action == "start":
                shutil.rmtree(run_dir, ignore_errors=True)
                code = self._start(stage, arguments, run_dir, identity, lock)
        finally:
            lock.release()
            summary = runs.read_summary(run_dir) or {}
            status = summary.get("status", "not started")
            self._stages.append({"name": stage.name, "run_dir": self._relative(run_dir), "status": status})
        self._stages[-1] |= {"config_hash": identity, "action": decision.action, "stale": decision.stale}
        if code == 0 and status != "finished":
            raise UserError(f"stage {stage.name}: ended without a finished summary.json in {run_dir}")
        return code

    def _start(self, stage: Stage, arguments: list[str], run_dir: Path, identity: str, lock: RunLock) -> int:
        if stage.command == "export":
            return self._export(stage, run_dir, identity, lock)
        run_id = ["--run.id", run_dir.name, option("trainer.default_root_dir", str(self.runs_root))]
        return run_in_foreground(command(stage.command, *arguments, *run_id), environment(), lock)

    def _export(self, stage: Stage, run_dir: Path, identity: str, lock: RunLock) -> int:
        """Export is no training run and writes no summary; the stage's folder gets one here."""
        source, begin = Path(stage.inputs["source"]), time.monotonic()
        arguments = command("export", str(source), "--output", str(run_dir / "artifacts" / "export"))
        code = run_in_foreground(arguments, environment(), lock)
        if code:
            return code
        origin = runs.read_summary(source if source.is_dir() else source.parent.parent) or {}
        code_hash, code_files = runs.code_version(origin.get("code_files") or [])
        commit, dirty = runs.commit()
        summary = {
            "status": "finished",
            "method": self.spec.method,
            "dataset": self.spec.dataset,
            "run_id": run_dir.name,
            "command": ["export"],
            "metrics": {},
            "config_hash": identity,
            "code_hash": code_hash,
            "code_files": code_files,
            "commit": commit,
            "dirty": dirty,
            "wall_s": round(time.monotonic() - begin, 3),
            "artifacts": runs.list_artifacts(run_dir),
            "machine": runs.machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        runs.write_summary(run_dir, summary)
        return 0

    # -- what a stage depends on

    def _connect(self, stage: Stage) -> tuple[Stage, dict[str, str]]:
        """Put the outputs of earlier stages into a stage; return it and the files it depends on, by name."""
        files: dict[str, str] = {}
        for reference in references([stage.inputs, stage.overrides], stage.name):
            found = self._output(reference)
            if isinstance(found, Path):
                files |= _files_of(f"{reference.stage}.{reference.output}", found)

        def lookup(reference: Reference) -> str | float:
            found = self._output(reference)
            return str(found) if isinstance(found, Path) else found

        inputs = substitute(stage.inputs, lookup)
        for name, path in inputs.items():
            if not Path(path).exists():
                raise UserError(f"stage {stage.name}: input {name!r}: nothing at {path}")
            if path not in files.values() and Path(path).is_file():
                files[name] = path
        connected = Stage(stage.name, stage.command, stage.config, substitute(stage.overrides, lookup), inputs)
        return connected, files

    def _output(self, reference: Reference) -> Path | float:
        run_dir = self.run_dirs[reference.stage]
        kind, _, what = reference.output.partition(".")
        if kind == "metrics":
            metrics = (runs.read_summary(run_dir) or {}).get("metrics", {})
            if what not in metrics:
                raise UserError(f"{reference}: stage {reference.stage} measured no {what!r}{nearest(what, metrics)}")
            return float(metrics[what])
        inside = _CHECKPOINTS.get(reference.output) or ("" if kind == "run_dir" else f"artifacts/{what}")
        path = run_dir / inside
        if not path.exists():
            raise UserError(f"{reference}: stage {reference.stage} left nothing at {path}")
        return path

    def _identify(self, stage: Stage, files: dict[str, str]) -> tuple[list[str], str]:
        """Return the arguments of a stage's command and its identity: files count by content, not by place."""
        if stage.command == "export":
            content = {"command": "export", "inputs": sorted(sha256_file(path) for path in files.values())}
            return [], runs.config_hash({"model": content})
        from leanlight.experiment import resolve  # loads torch, so only when a stage needs it

        arguments = ["--config", stage.config]
        arguments += [option(key, value) for key, value in stage.overrides.items()]
        arguments += [option("run.method", self.spec.method), option("run.dataset", self.spec.dataset)]
        if files:
            arguments.append(option("run.inputs", files))
        identity = runs.config_hash(resolve(stage.command, arguments), files)
        return arguments, identity

    # -- the pipeline's own summary

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.runs_root).as_posix()

    def _write(self, status: str) -> None:
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


def _files_of(name: str, path: Path) -> dict[str, str]:
    """The files behind a reference: itself, or what a folder of outputs holds (pictures and logs decide nothing)."""
    if path.is_file():
        return {name: str(path)}
    outputs = [path / "checkpoints", path / "artifacts"] if (path / "summary.json").is_file() else [path]
    found = sorted(file for folder in outputs for file in folder.rglob("*") if file.is_file())
    kept = [file for file in found if "media" not in file.relative_to(path).parts]
    if not kept:
        raise UserError(f"{name}: {path} holds no file")
    return {f"{name}/{file.relative_to(path).as_posix()}": str(file) for file in kept}


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
