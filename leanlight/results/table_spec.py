"""A result table as its YAML file describes it: rows, seeds, metrics, the paper's figures, claims."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from leanlight.configs_path import config_root, find_config
from leanlight.contracts.errors import UserError, nearest
from leanlight.results.expression import Expression, parse_expression
from leanlight.results.pipeline_spec import SEEDS, PipelineSpec, load_pipeline
from leanlight.results.reading import Reader, read_mapping, unique
from leanlight.runs import folder_name

Scale = Literal["small", "paper"]
_METRIC = re.compile(r"((train|val|test|summary|progress)|stages/(?P<stage>[\w\-]+))(/[\w.\-]+)+")


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: ``value * scale`` with `digits` decimals and `unit`.

    Args:
        label: its name in the table.
        higher_is_better: which way is good.
        unit: of the shown number.
        scale: factor from the logged to the shown number.
        digits: decimals.
        optional: a run may lack it.
        column: it has a column and bars of its own; without, it serves curves and claims alone.
    """

    label: str
    higher_is_better: bool
    unit: str = ""
    scale: float = 1.0
    digits: int = 3
    optional: bool = False
    column: bool = True


@dataclass(frozen=True)
class PaperFigure:
    """What the paper prints.

    Args:
        value: in the shown unit.
        setting: under which it was measured; it is compared only with a row of the same setting.
        source: table or figure of the paper.
    """

    value: float
    setting: dict[str, Any]
    source: str


@dataclass(frozen=True)
class Row:
    """One line of the table: a config, or one stage of a pipeline, with overrides.

    Args:
        name: how claims call it.
        label: how it is shown.
        method: folder of its runs under the runs root.
        config: name of its config or pipeline.
        overrides: keys of the config, or ``stage.key`` → values.
        setting: what a reader must know to compare (ipc, keep_ratio, T, epochs, …).
        paper: metric → the paper's figure.
        pipeline: the pipeline that `config` names, if it does.
        stage: of the pipeline, whose summary counts.
        seeds: those of the table at which the row runs.
        replicas: how many of them, one after another in number, one run advances together, where its model can.
    """

    name: str
    label: str
    method: str
    config: str
    overrides: dict[str, Any]
    setting: dict[str, Any]
    paper: dict[str, PaperFigure]
    pipeline: PipelineSpec | None = None
    stage: str = ""
    seeds: tuple[int, ...] = ()
    replicas: int = 1

    def runs(self) -> list[tuple[int, ...]]:
        """The seeds of each of its runs."""
        runs: list[tuple[int, ...]] = []
        for seed in sorted(self.seeds):
            if runs and runs[-1][-1] == seed - 1 and len(runs[-1]) < self.replicas:
                runs[-1] = (*runs[-1], seed)
            else:
                runs.append((seed,))
        return runs


@dataclass(frozen=True)
class Claim:
    """A statement that holds when the expression exceeds `margin` over seeds.

    Args:
        id: its name in the results.
        text: the statement.
        scope: whose claim it is, the paper's or this suite's at reduced scale.
        expr: arithmetic over rows and metrics.
        margin: what the expression must exceed.
        min_seeds: with fewer the claim is not tested.
    """

    id: str
    text: str
    scope: Literal["paper", "reduced"]
    expr: Expression
    margin: float
    min_seeds: int


@dataclass(frozen=True)
class Headline:
    """What an overview says of the table in one line.

    Args:
        metric: of the table.
        rows: names of those whose figures stand there, the method first, then what it is measured against.
    """

    metric: str
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """A performance profile: of each group of rows, the share of runs whose `metric` is above a threshold.

    Args:
        metric: of the table.
        groups: label → names of rows, one a task (a game, a data set), so that groups can be compared over all tasks.
    """

    metric: str
    groups: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class TableCurve:
    """Means over a number, a line a group of rows: one metric over the rows' settings, or several metrics of each row.

    Args:
        title: above the figure.
        x: the number: a key of `Row.setting`, or what the numbers of `at` count, e.g. severity.
        metric: of the table, drawn at the setting of each row; None with `at`.
        at: number → the metric of the table that stands there, with which each row has all points; or empty.
        groups: label → names of rows, the points of its line.
    """

    title: str
    x: str
    metric: str | None
    at: dict[float, str]
    groups: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class TableSpec:
    """A whole table.

    Args:
        name: as on the command line, for the published command.
        stem: its file name without suffix; run folders and the results file begin with it.
        method: whose table it is, and by default the folder of its runs.
        dataset: folder of its runs under the method's.
        scale: whether the paper's own experiment or one of reduced size.
        title: heading.
        note: what a reader must know.
        seeds: a row runs at each, unless it names some of them.
        checkpoint: which weights are tested.
        metrics: logged name → how it is shown.
        rows: in order.
        claims: in order.
        headline: what an overview shows; None: the first row and the best of the others by the first metric.
        profile: the performance profile to draw, if any.
        curves: means to draw over a number, a figure each.
    """

    name: str
    stem: str
    method: str
    dataset: str
    scale: Scale
    title: str
    note: str
    seeds: tuple[int, ...]
    checkpoint: Literal["last", "best"]
    metrics: dict[str, Metric]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = field(default=())
    headline: Headline | None = None
    profile: Profile | None = None
    curves: tuple[TableCurve, ...] = ()


def load_table(name: str) -> TableSpec:
    """Read and check the table `name` (a path or a config's name); UserError names the first thing that is wrong."""
    path = find_config(name)
    keys = "method dataset scale title note seeds replicas checkpoint metrics rows claims headline profile curves"
    top = Reader(read_mapping(path), path.name, keys)
    metrics = {
        str(key): _metric(str(key), value, f"{path.name}: metrics {key}")
        for key, value in top.get("metrics", dict).items()
    }
    if not metrics:
        raise UserError(f"{path.name}: metrics is empty; name at least one")
    if not any(metric.column for metric in metrics.values()):
        raise UserError(f"{path.name}: metrics: at least one must have a column")
    method = top.folder("method")
    items = top.get("rows", list)
    if not items:
        raise UserError(f"{path.name}: rows is empty; name at least one")
    seeds = _seeds(top)
    replicas = _replicas(top, 1)
    rows = tuple(
        _row(item, f"{path.name}: rows[{i}]", method, metrics, seeds, replicas) for i, item in enumerate(items)
    )
    names = [row.name for row in rows]
    unique(names, f"{path.name}: rows")
    claims = tuple(
        _claim(item, f"{path.name}: claims[{i}]", names, metrics) for i, item in enumerate(top.get("claims", list, []))
    )
    unique([claim.id for claim in claims], f"{path.name}: claims")
    curves = tuple(
        _curve(item, f"{path.name}: curves[{i}]", rows, metrics) for i, item in enumerate(top.get("curves", list, []))
    )
    unique([curve.title for curve in curves], f"{path.name}: curves", "title")
    return TableSpec(
        name=_short_name(path, name),
        stem=folder_name(path.stem, f"{path.name}: file name"),
        method=method,
        dataset=top.folder("dataset"),
        scale=top.choice("scale", ("small", "paper")),  # type: ignore[arg-type]
        title=top.get("title", str),
        note=top.get("note", str, ""),
        seeds=seeds,
        checkpoint=top.choice("checkpoint", ("last", "best"), "last"),  # type: ignore[arg-type]
        metrics=metrics,
        rows=rows,
        claims=claims,
        headline=_headline(top.content["headline"], f"{path.name}: headline", names, metrics)
        if "headline" in top.content
        else None,
        profile=_profile(top.content["profile"], f"{path.name}: profile", names, metrics)
        if "profile" in top.content
        else None,
        curves=curves,
    )


def _short_name(path: Path, given: str) -> str:
    """The name that finds this table on any machine: never an absolute path."""
    root = config_root().resolve()
    if path.resolve().is_relative_to(root):
        return path.resolve().relative_to(root).with_suffix("").as_posix()
    return path.name if Path(given).is_absolute() else given


def _seeds(top: Reader) -> tuple[int, ...]:
    seeds = top.get("seeds", list)
    if not seeds or any(type(seed) is not int or seed not in SEEDS for seed in seeds):
        raise UserError(f"{top.where}: seeds must be a list of whole numbers from 0 to {SEEDS[-1]}, got {seeds!r}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{top.where}: seeds {seeds} names a seed twice")
    return tuple(seeds)


def _replicas(reader: Reader, default: int) -> int:
    replicas: int = reader.get("replicas", int, default)
    if replicas < 1:
        raise UserError(f"{reader.where}: replicas must be at least 1, got {replicas}")
    return replicas


def _metric(name: str, content: Any, where: str) -> Metric:
    if not _METRIC.fullmatch(name):
        raise UserError(
            f"{where}: is not the name of a metric; expected train/, val/, test/ or summary/ and a name, or "
            "stages/STAGE/ and a name"
        )
    reader = Reader(content, where, "label higher_is_better unit scale digits optional column")
    digits = reader.get("digits", int, 3)
    if not 0 <= digits <= 9:
        raise UserError(f"{where}: digits must be 0 to 9, got {digits}")
    scale = reader.number("scale", 1.0)
    if scale <= 0:
        raise UserError(f"{where}: scale must be above 0, got {scale}")
    return Metric(
        label=reader.get("label", str),
        higher_is_better=reader.get("higher_is_better", bool),
        unit=reader.get("unit", str, ""),
        scale=scale,
        digits=digits,
        optional=reader.get("optional", bool, False),
        column=reader.get("column", bool, True),
    )


def _row(
    content: Any, where: str, method: str, metrics: Mapping[str, Metric], seeds: tuple[int, ...], replicas: int
) -> Row:
    reader = Reader(content, where, "name label method config pipeline stage overrides setting paper seeds replicas")
    name = reader.name()
    reader.where = where = f"{where} {name}"
    if ("config" in reader.content) == ("pipeline" in reader.content):
        raise UserError(f"{where}: expected either config or pipeline")
    pipeline = load_pipeline(reader.config("pipeline")) if "pipeline" in reader.content else None
    stage = ""
    if pipeline is not None:
        stages = [each.name for each in pipeline.stages]
        stage = reader.get("stage", str)
        if stage not in stages:
            raise UserError(f"{where}: stage {stage!r} is not in {reader.content['pipeline']}{nearest(stage, stages)}")
    elif "stage" in reader.content:
        raise UserError(f"{where}: stage belongs to a pipeline, this row has a config")
    replicas = _replicas(reader, replicas)
    if pipeline is not None and replicas > 1:
        raise UserError(f"{where}: replicas must be 1 for a pipeline, whose runs have one seed each, got {replicas}")
    _check_stages(metrics, pipeline, where)
    overrides = reader.get("overrides", dict, {})
    _check_overrides(overrides, pipeline, where)
    paper = reader.get("paper", dict, {})
    for metric in paper:
        if metric not in metrics:
            raise UserError(f"{where}: paper names no metric of this table: {metric!r}{nearest(str(metric), metrics)}")
    own = _seeds(reader) if "seeds" in reader.content else seeds
    if strange := set(own) - set(seeds):
        raise UserError(f"{where}: seeds must be some of the table's {list(seeds)}, got {min(strange)}")
    return Row(
        name=name,
        label=reader.get("label", str, name),
        method=reader.folder("method", method),
        config=reader.config() if pipeline is None else reader.get("pipeline", str),
        overrides=overrides,
        setting=reader.get("setting", dict, {}),
        paper={str(key): _paper(value, f"{where}: paper {key}") for key, value in paper.items()},
        pipeline=pipeline,
        stage=stage,
        seeds=own,
        replicas=replicas,
    )


def _check_stages(metrics: Mapping[str, Metric], pipeline: PipelineSpec | None, where: str) -> None:
    """A metric of another stage must be one of the row's own pipeline, unless the metric is optional."""
    stages = [stage.name for stage in pipeline.stages] if pipeline else []
    for name, metric in metrics.items():
        match = _METRIC.fullmatch(name)
        wanted = match["stage"] if match else None
        if wanted is not None and wanted not in stages and not metric.optional:
            lacks = f"its pipeline has no stage {wanted!r}{nearest(wanted, stages)}" if pipeline else "it has no stages"
            raise UserError(f"{where}: metric {name}: {lacks}; say optional: true if the row shall go without")


def _check_overrides(overrides: Mapping[Any, Any], pipeline: PipelineSpec | None, where: str) -> None:
    for key in overrides:
        if not isinstance(key, str):
            raise UserError(f"{where}: overrides: {key!r} is not a key such as model.init_args.lr")
        if pipeline is not None:
            pipeline.split_key(key, f"{where}: overrides")
        elif key in RESERVED:
            raise UserError(f"{where}: overrides: {key} is set by the table (seeds, replicas, checkpoint, runs root)")


REPLICAS = "model.init_args.replicas"
RESERVED = frozenset(
    {"seed_everything", REPLICAS, "run.id", "run.test", "run.method", "run.dataset", "trainer.default_root_dir"}
)


def _paper(content: Any, where: str) -> PaperFigure:
    reader = Reader(content, where, "value setting source")
    return PaperFigure(reader.number("value"), reader.get("setting", dict, {}), reader.get("source", str))


def _claim(content: Any, where: str, rows: Collection[str], metrics: Collection[str]) -> Claim:
    reader = Reader(content, where, "id text scope expr margin min_seeds")
    identifier = reader.name("id")
    reader.where = where = f"{where} {identifier}"
    min_seeds = reader.get("min_seeds", int, 3)
    if min_seeds < 2:
        raise UserError(f"{where}: min_seeds must be at least 2 (one seed has no interval), got {min_seeds}")
    return Claim(
        id=identifier,
        text=reader.get("text", str),
        scope=reader.choice("scope", ("paper", "reduced")),  # type: ignore[arg-type]
        expr=parse_expression(reader.get("expr", str), rows, metrics, where),
        margin=reader.number("margin", 0.0),
        min_seeds=min_seeds,
    )


def _headline(content: Any, where: str, rows: Collection[str], metrics: Collection[str]) -> Headline:
    reader = Reader(content, where, "metric rows")
    return Headline(reader.choice("metric", metrics), _some(reader.get("rows", list), f"{where}: rows", rows))


def _profile(content: Any, where: str, rows: Collection[str], metrics: Collection[str]) -> Profile:
    reader = Reader(content, where, "metric groups")
    return Profile(reader.choice("metric", metrics), _groups(reader, rows))


def _curve(content: Any, where: str, rows: Collection[Row], metrics: Mapping[str, Metric]) -> TableCurve:
    reader = Reader(content, where, "title x metric at groups rows")
    if ("metric" in reader.content) == ("at" in reader.content):
        raise UserError(f"{where}: expected either metric or at")
    if "groups" in reader.content and "rows" in reader.content:
        raise UserError(f"{where}: expected groups or rows, not both")
    metric = reader.choice("metric", metrics) if "metric" in reader.content else None
    names = [row.name for row in rows]
    if "groups" in reader.content:
        groups = _groups(reader, names)
    else:
        labels = {row.name: row.label for row in rows}
        lines = _some(reader.get("rows", list, names), f"{where}: rows", names)
        unique([labels[name] for name in lines], f"{where}: rows", "label")
        groups = {labels[name]: (name,) for name in lines}
    x = reader.get("x", str)
    if metric is not None:
        _check_settings(x, {name for line in groups.values() for name in line}, rows, where)
    at = {} if metric is not None else _at(reader, metrics)
    title = reader.get("title", str) if metric is None else reader.get("title", str, metrics[metric].label)
    return TableCurve(title, x, metric, at, groups)


def _check_settings(x: str, drawn: Collection[str], rows: Collection[Row], where: str) -> None:
    for row in rows:
        value = row.setting.get(x)
        if row.name in drawn and not _is_number(value):
            raise UserError(f"{where}: setting {x!r} of row {row.name} must be a finite number, got {value!r}")


def _at(reader: Reader, metrics: Mapping[str, Metric]) -> dict[float, str]:
    """The key `at`: number → metric; all in one unit, since they share an axis."""
    where, at = f"{reader.where}: at", reader.get("at", dict)
    if not at:
        raise UserError(f"{where} is empty; name at least one number and its metric")
    for place, name in at.items():
        if not _is_number(place):
            raise UserError(f"{where}: expected finite numbers, got {place!r}")
        if not isinstance(name, str) or name not in metrics:
            raise UserError(f"{where}: {place} names no metric of this table: {name!r}{nearest(str(name), metrics)}")
    units = {(metrics[name].unit, metrics[name].scale): name for name in at.values()}
    if len(units) > 1:
        raise UserError(f"{where}: {' and '.join(list(units.values())[:2])} differ in unit or scale")
    return at


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _groups(reader: Reader, rows: Collection[str]) -> dict[str, tuple[str, ...]]:
    """The key `groups`: label → names of rows."""
    where = reader.where
    groups: dict[str, tuple[str, ...]] = {}
    for label, names in reader.get("groups", dict).items():
        groups[str(label)] = _some(names, f"{where}: groups {label!r}", rows)
    if not groups:
        raise UserError(f"{where}: groups is empty; name at least one")
    return groups


def _some(names: Any, where: str, rows: Collection[str]) -> tuple[str, ...]:
    """At least one name of a row."""
    if not isinstance(names, list) or not names:
        raise UserError(f"{where} must be a list of rows, got {names!r}")
    for name in names:
        if name not in rows:
            raise UserError(f"{where}: no row {name!r}{nearest(str(name), rows)}")
    return tuple(names)
