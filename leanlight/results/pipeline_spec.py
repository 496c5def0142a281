"""A pipeline as its YAML file describes it: ordered stages whose inputs are outputs of earlier ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from leanlight.configs_path import find_config
from leanlight.contracts.errors import UserError, nearest
from leanlight.registry import Command, commands
from leanlight.results.reading import Reader, read_mapping, unique
from leanlight.runs import folder_name

TRAININGS = ("fit", "validate", "test", "predict")
_REFERENCE = re.compile(r"\$\{stages\.([^}]*)\}")
_OUTPUTS = ("artifacts.", "metrics.", "run_dir")
_SET_BY_RUNNER = frozenset(
    {"run.id", "run.method", "run.dataset", "run.inputs", "trainer.default_root_dir"}
    | {"config", "resume", "from", "output"}  # options that name a folder to work in
)
SEEDS = range(2**32)  # what the generators of numpy and torch both take


def stage_commands() -> dict[str, Command]:
    """Commands that make something of what an earlier stage left, without a config or a Trainer, by name.

    They are called as ``leanlight NAME SOURCE --output FOLDER [--KEY=VALUE ...]``. One that finds finished parts of its
    work in ``FOLDER/.parts`` goes on with them, and removes that folder in the end.
    """
    return {name: command for name, command in commands().items() if command.stage}


@dataclass(frozen=True)
class Reference:
    """``${stages.<stage>.<output>}``: output is run_dir, artifacts.<what> or metrics.<name>."""

    stage: str
    output: str

    def __str__(self) -> str:
        return f"${{stages.{self.stage}.{self.output}}}"


@dataclass(frozen=True)
class Stage:
    """One step.

    Args:
        name: how references and messages call it.
        command: one of `TRAININGS` or of `stage_commands`.
        config: path or name of its config; empty for one of `stage_commands`.
        overrides: keys of the config, or options of the command → values.
        inputs: name → file or folder of an earlier stage, or any path.
    """

    name: str
    command: str
    config: str
    overrides: dict[str, Any]
    inputs: dict[str, str]

    @property
    def trains(self) -> bool:
        """Whether it is a run with a config, not one of `stage_commands`."""
        return self.command in TRAININGS


@dataclass(frozen=True)
class PipelineSpec:
    """A whole pipeline.

    Args:
        stem: the file's name without suffix; run folders begin with it.
        method: folder of the stages' run folders under the runs root.
        dataset: folder under the method.
        title: what the pipeline does.
        note: what a reader must know.
        stages: in order.
    """

    stem: str
    method: str
    dataset: str
    title: str
    note: str
    stages: tuple[Stage, ...]

    def split_key(self, key: str, where: str) -> tuple[str, str]:
        """Split ``stage.key`` of an override; UserError when the stage is unknown or the key is missing."""
        stage, _, rest = key.partition(".")
        names = [each.name for each in self.stages]
        if stage not in names:
            raise UserError(f"{where}: {key}: no stage {stage!r}{nearest(stage, names)}; expected stage.key")
        if not rest:
            raise UserError(f"{where}: {key}: names no key of stage {stage!r}; expected stage.key")
        return stage, rest

    def with_overrides(self, overrides: Mapping[str, Any], where: str) -> PipelineSpec:
        """Return a copy with ``stage.key`` overrides added, checked like the file's own."""
        extra: dict[str, dict[str, Any]] = {stage.name: {} for stage in self.stages}
        for key, value in overrides.items():
            stage, rest = self.split_key(key, where)
            extra[stage][rest] = value
        stages = tuple(replace(s, overrides={**s.overrides, **extra[s.name]}) for s in self.stages)
        check_stages(stages, where)
        return replace(self, stages=stages)

    def with_seed(self, seed: int) -> PipelineSpec:
        """Return a copy that runs with `seed`; a stage that names its own keeps it, one that draws nothing has none."""
        seeds = [{key: seed} if (key := _seed_key(stage)) else {} for stage in self.stages]
        stages = (replace(s, overrides={**own, **s.overrides}) for s, own in zip(self.stages, seeds, strict=True))
        return replace(self, stages=tuple(stages))


def _seed_key(stage: Stage) -> str:
    """The override that sets a stage's seed; empty when it has none."""
    if stage.trains:
        return "seed_everything"
    options = import_module(stage_commands()[stage.command].module).parser().format_usage()
    return "seed" if "--seed" in options else ""


def load_pipeline(name: str) -> PipelineSpec:
    """Read and check the pipeline `name` (a path or a config's name); UserError names the first thing that is wrong."""
    path = find_config(name)
    top = Reader(read_mapping(path), path.name, "method dataset title note stages")
    items = top.get("stages", list)
    if not items:
        raise UserError(f"{path.name}: stages is empty; name at least one")
    stages = tuple(_stage(item, f"{path.name}: stages[{i}]") for i, item in enumerate(items))
    unique([stage.name for stage in stages], f"{path.name}: stages")
    check_stages(stages, path.name)
    return PipelineSpec(
        stem=folder_name(path.stem, f"{path.name}: file name"),
        method=top.folder("method"),
        dataset=top.folder("dataset"),
        title=top.get("title", str, path.stem),
        note=top.get("note", str, ""),
        stages=stages,
    )


def _stage(content: Any, where: str) -> Stage:
    reader = Reader(content, where, "name command config overrides inputs")
    name = reader.name()
    reader.where = where = f"{where} {name}"
    command = reader.choice("command", (*TRAININGS, *stage_commands()), "fit")
    inputs = reader.get("inputs", dict, {})
    for key, value in inputs.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise UserError(f"{where}: inputs must map names to paths, got {key!r}: {value!r}")
    overrides = reader.get("overrides", dict, {})
    if command not in TRAININGS:
        if "config" in reader.content or set(inputs) != {"source"}:
            raise UserError(
                f"{where}: {command} takes no config and one input: inputs: {{source: '${{stages.STAGE.run_dir}}'}}"
            )
        return Stage(name, command, "", overrides, dict(inputs))
    return Stage(name, command, reader.config(), overrides, dict(inputs))


def check_stages(stages: tuple[Stage, ...], where: str) -> None:
    """Raise UserError for an override the runner owns and for a reference to a stage that is unknown or later."""
    names = [stage.name for stage in stages]
    for position, stage in enumerate(stages):
        place = f"{where}: stage {stage.name}"
        for key in stage.overrides:
            if not isinstance(key, str) or key in _SET_BY_RUNNER:
                raise UserError(f"{place}: overrides: {key} is set by the pipeline itself")
        for reference in references([stage.overrides, stage.inputs], place):
            if reference.stage not in names:
                raise UserError(f"{place}: {reference}: no stage {reference.stage!r}{nearest(reference.stage, names)}")
            if names.index(reference.stage) >= position:
                raise UserError(f"{place}: {reference}: stage {reference.stage!r} does not come before {stage.name!r}")


def references(value: Any, where: str) -> Iterator[Reference]:
    """Yield every reference inside a nested value; UserError for one that names no output."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from references(item, where)
    elif isinstance(value, list):
        for item in value:
            yield from references(item, where)
    elif isinstance(value, str):
        for match in _REFERENCE.finditer(value):
            yield _parse(match[1], where)


def _parse(body: str, where: str) -> Reference:
    stage, _, output = body.partition(".")
    complete = output == "run_dir" or any(output.startswith(o) and len(output) > len(o) for o in _OUTPUTS[:2])
    if not complete or ".." in Path(output.removeprefix("artifacts.")).parts:
        raise UserError(
            f"{where}: ${{stages.{body}}}: expected ${{stages.STAGE.run_dir}}, .artifacts.checkpoint, .artifacts.best, "
            ".artifacts.NAME or .metrics.NAME"
        )
    return Reference(stage, output)


def substitute(value: Any, lookup: Callable[[Reference], str | float]) -> Any:
    """Replace every reference in a nested value; a value that is nothing but a metric reference becomes the number."""
    if isinstance(value, Mapping):
        return {key: substitute(item, lookup) for key, item in value.items()}
    if isinstance(value, list):
        return [substitute(item, lookup) for item in value]
    if not isinstance(value, str):
        return value
    if whole := _REFERENCE.fullmatch(value):
        return lookup(_parse(whole[1], "stages"))
    return _REFERENCE.sub(lambda match: str(lookup(_parse(match[1], "stages"))), value)
