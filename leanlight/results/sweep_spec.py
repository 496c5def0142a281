"""Read the sweep files of W&B, so that they run without it; whatever is not understood is one line that names it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from leanlight.configs_path import find_config
from leanlight.contracts.errors import UserError
from leanlight.contracts.ranges import FiniteFloat, PositiveFloat, PositiveInt
from leanlight.invocation import take_all
from leanlight.results.reading import Reader, read_mapping, unique
from leanlight.runs import folder_name

if TYPE_CHECKING:
    from optuna.trial import Trial

_KEYS = "program command method metric parameters early_terminate run_cap name description project entity"
_RESERVED = ("run.id", "trainer.default_root_dir", "resume", "from")
_PROGRAM = ("${env}", "/usr/bin/env", "${interpreter}", "python", "python3", "-m")  # may stand before leanlight
_LARGEST_GRID = 10_000
_FEW = 20  # values of a parameter, which are all tried on the config before anything runs
_DISTRIBUTIONS = {"constant": "value", "categorical": "values"} | {
    name: f"min max {'q' * name.startswith('q_')}"
    for name in (
        *("int_uniform", "uniform", "q_uniform", "log_uniform", "q_log_uniform", "log_uniform_values"),
        *("q_log_uniform_values", "inv_log_uniform", "inv_log_uniform_values"),
    )
}  # → the keys that describe it


@dataclass(frozen=True)
class Parameter:
    """What a sweep may set one key of the config to: one of a few values, or a number from a range.

    Args:
        key: dotted, as on the command line.
        choices: text → value; empty for a range.
        low: smallest number that is drawn.
        high: largest one.
        log: whether its logarithm is drawn evenly.
        whole: whether it is an integer.
        step: values are the multiples of it that are nearest to what is drawn; 0 for what is drawn itself.
    """

    key: str
    choices: Mapping[str, Any]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    step: float = 0.0

    def draw(self, trial: Trial) -> Any:
        """The value in a trial: as Optuna chooses now, or has chosen before."""
        if self.choices:
            return self.choices[trial.suggest_categorical(self.key, list(self.choices))]
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high))
        return self._rounded(trial.suggest_float(self.key, self.low, self.high, log=self.log))

    def value(self, drawn: Any) -> Any:
        """The value that what Optuna keeps stands for."""
        return self.choices[drawn] if self.choices else self._rounded(drawn)

    def _rounded(self, drawn: float) -> float | int:
        if self.whole or not self.step:
            return int(drawn) if self.whole else drawn
        number = float(f"{round(drawn / self.step) * self.step:.12g}")  # 0.3, not 0.30000000000000004
        return int(number) if self.step.is_integer() else number

    def samples(self) -> list[Any]:
        """Values that show whether the config takes it: all of a few, else the first and the last."""
        values = list(self.choices.values()) or [self._rounded(self.low), self._rounded(self.high)]
        return values if len(values) <= _FEW else [values[0], values[-1]]

    def on_grid(self, where: str) -> Parameter:
        """The same as a choice of all its values; UserError where they are not few."""
        step = 1.0 if self.whole else self.step
        if self.choices:
            return self
        if not step or self.log or (count := int((self.high - self.low) / step + 1e-9)) >= _LARGEST_GRID:
            raise UserError(f"{where}: {self.key}: a grid needs values, int_uniform or q_uniform, and not too many")
        return replace(self, choices=_choices([self._rounded(self.low + i * step) for i in range(count + 1)]))


@dataclass(frozen=True)
class SweepSpec:
    """A whole sweep.

    Args:
        name: of its folder; those of its runs begin with it.
        method: ``grid``, ``random`` or ``bayes``, which is a tree-structured Parzen estimator.
        metric: logged name, of validation data.
        goal: ``minimize`` or ``maximize``.
        command: words after ``leanlight fit``, without the parameters.
        parameters: in order of the file.
        trials: how many; None for a grid without a limit.
        pruning: (validations of a trial before it may be stopped, η: of how many one goes on), or None.
    """

    name: str
    method: str
    metric: str
    goal: str
    command: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    trials: int | None
    pruning: tuple[int, int] | None

    @property
    def identity(self) -> dict[str, str]:
        """What two sweeps must share so that one goes on with the other."""
        return {key: json.dumps(value, default=str) for key, value in asdict(self).items() if key != "trials"}


def load_sweep(name: str, extra: Sequence[str] = (), trials: int | None = None) -> SweepSpec:
    """Read and check a sweep file; UserError names the first thing that is wrong.

    Args:
        name: a path, or a config's name such as ``sweeps/classifier_lr``.
        extra: further words of ``leanlight fit``, for every trial.
        trials: instead of the file's ``run_cap``.
    """
    path = find_config(name)
    top = Reader(read_mapping(path), path.name, _KEYS)
    method, where = top.choice("method", ("grid", "random", "bayes")), f"{path.name}: parameters"
    parameters = _parameters(top.get("parameters", dict), where)
    unique([parameter.key for parameter in parameters], where, "key")
    if not parameters:
        raise UserError(f"{where} is empty; name at least one key of the config")
    if method == "grid":
        parameters = [parameter.on_grid(where) for parameter in parameters]
        if (size := math.prod(len(parameter.choices) for parameter in parameters)) > _LARGEST_GRID:
            raise UserError(f"{where}: {size} combinations are too many for a grid; use method: random")
    trials = trials or top.ranged("run_cap", PositiveInt)
    if method != "grid" and trials is None:
        raise UserError(f"{path.name}: run_cap is missing, how many trials to run; or say --trials N")
    metric = Reader(top.get("metric", dict), f"{path.name}: metric", "name goal")
    measured = metric.get("name", str).removeprefix("best/")  # W&B's summary calls the best of a run so
    if not measured.startswith("val/"):
        raise UserError(f"{metric.where}: name must be a metric of validation data, val/..., got {measured!r}")
    title = re.sub(r"[^A-Za-z0-9_.-]+", "-", top.get("name", str, path.stem)).strip("-.")
    return SweepSpec(
        name=folder_name(title, f"{path.name}: name"),
        method=method,
        metric=measured,
        goal=metric.choice("goal", ("minimize", "maximize"), "minimize"),
        command=(*_command(top), *extra),
        parameters=tuple(parameters),
        trials=trials,
        pruning=_pruning(top),
    )


def _command(top: Reader) -> list[str]:
    """Words after ``leanlight fit``, without the overlay that goes online: W&B's own sweeps need it."""
    where, program = f"{top.where}: command", top.choice("program", ("leanlight",), "leanlight")
    words = [program if word == "${program}" else str(word) for word in top.get("command", list)]
    while words and words[0] in _PROGRAM:
        words = words[1:]
    if words[:2] != ["leanlight", "fit"] or "${args}" not in words:
        raise UserError(f"{where} must be leanlight fit ... ${{args}}, got {' '.join(words)!r}")
    words = [word for word in words[2:] if word != "${args}"]
    for word in words:
        if "${" in word:
            raise UserError(f"{where}: {word!r} is not understood; parameters stand at ${{args}}")
        _check_free(word.removeprefix("--").partition("=")[0], where)
    configs, rest = take_all(words, "--config", "-c")
    kept = [name for name in configs if not name.removesuffix(".yaml").endswith("logger/wandb_online")]
    return [*(f"--config={name}" for name in kept), *rest]


def _check_free(key: str, where: str) -> None:
    if key in _RESERVED:
        raise UserError(f"{where}: {key} is set by the sweep")


def _parameters(content: Mapping[Any, Any], where: str, prefix: str = "") -> list[Parameter]:
    found = []
    for key, inside in content.items():
        dotted = f"{prefix}{key}"
        if isinstance(inside, dict) and "parameters" in inside:
            nested = Reader(inside, f"{where}: {dotted}", "parameters").get("parameters", dict)
            found += _parameters(nested, where, f"{dotted}.")
        else:
            _check_free(dotted, where)
            found.append(
                _parameter(dotted, Reader(inside, f"{where}: {dotted}", "distribution value values min max q"))
            )
    return found


def _parameter(key: str, given: Reader) -> Parameter:
    whole = all(type(given.content.get(end)) is int for end in ("min", "max"))
    usual = "int_uniform" if whole else "uniform" if "min" in given.content else "constant"
    name = given.choice("distribution", _DISTRIBUTIONS, "categorical" if "values" in given.content else usual)
    reader = Reader(given.content, f"{given.where} ({name})", f"distribution {_DISTRIBUTIONS[name]}")
    if not _DISTRIBUTIONS[name].startswith("min"):
        values = reader.get("values", list) if name == "categorical" else [reader.content.get("value", ...)]
        choices = _choices(values)
        if values == [...] or not 0 < len(choices) == len(values):
            raise UserError(f"{reader.where}: expected value, different values, or min and max")
        return Parameter(key, choices)
    low, high, step = (reader.ranged(end, FiniteFloat) for end in ("min", "max", "q"))
    if low is None or high is None or low >= high:
        raise UserError(f"{reader.where}: expected min below max, got {low} and {high}")
    if name.removeprefix("q_").removeprefix("inv_") == "log_uniform":  # its ends are exponents
        low, high = (math.exp(min(end, 700)) for end in ((-high, -low) if name.startswith("inv") else (low, high)))
    if (log := "log" in name) and not 0 < low < high:
        raise UserError(f"{reader.where}: min must be above 0, got {low}")
    if name == "int_uniform" and not (float(low).is_integer() and float(high).is_integer()):
        raise UserError(f"{reader.where}: min and max must be whole numbers, got {low} and {high}")
    if name.startswith("q_"):
        step = reader.ranged("q", PositiveFloat) or 1.0
    return Parameter(key, {}, float(low), float(high), log, name == "int_uniform", float(step or 0.0))


def _choices(values: Sequence[Any]) -> dict[str, Any]:
    return {value if isinstance(value, str) else json.dumps(value, default=str): value for value in values}


def _pruning(top: Reader) -> tuple[int, int] | None:
    if "early_terminate" not in top.content:
        return None
    reader = Reader(top.get("early_terminate", dict), f"{top.where}: early_terminate", "type min_iter max_iter s eta")
    reader.choice("type", ("hyperband",))
    eta, first, last, brackets = (reader.ranged(key, PositiveInt) for key in ("eta", "min_iter", "max_iter", "s"))
    if eta == 1 or (first is None) == (last is None):
        raise UserError(f"{reader.where}: expected min_iter, or max_iter and s, and eta of at least 2")
    eta = eta or 3
    return first or max(1, last // eta ** (brackets or 1)), eta
