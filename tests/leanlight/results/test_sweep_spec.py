"""Sweep files: what W&B's distributions mean, and what is refused."""

import math

import pytest
import yaml

from leanlight.contracts.errors import UserError
from leanlight.results.sweep_spec import load_sweep

BASE = {
    "program": "leanlight",
    "command": ["leanlight", "fit", "--config", "classifier/digits_small", "${args}"],
    "method": "random",
    "run_cap": 3,
    "metric": {"name": "val/accuracy", "goal": "maximize"},
    "parameters": {"a.lr": {"values": [1, 2]}},
}


def load(tmp_path, **changes):
    path = tmp_path / "s.yaml"
    content = {key: value for key, value in {**BASE, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return load_sweep(str(path))


def parameter(tmp_path, **content):
    (found,) = load(tmp_path, parameters={"lr": content}).parameters
    return found


def drawn(parameter, count=300):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(0))
    return sorted(parameter.draw(study.ask()) for _ in range(count))


E = math.e


@pytest.mark.parametrize(
    ("content", "low", "middle", "high"),
    [
        ({"min": 0.0, "max": 4.0}, 0, 2, 4),
        ({"distribution": "uniform", "min": 1, "max": 3}, 1, 2, 3),
        ({"min": "1e-4", "max": 1.0, "distribution": "log_uniform_values"}, 1e-4, 1e-2, 1),
        ({"min": -2, "max": 2, "distribution": "log_uniform"}, E**-2, 1, E**2),
        ({"min": 1, "max": 3, "distribution": "inv_log_uniform"}, E**-3, E**-2, E**-1),
        ({"min": 0.01, "max": 1.0, "distribution": "inv_log_uniform_values"}, 0.01, 0.1, 1),
    ],
)
def test_a_range_is_drawn_as_wandb_defines_it(tmp_path, content, low, middle, high):
    values = drawn(parameter(tmp_path, **content))
    spread = (lambda value: math.log(value)) if "log" in content.get("distribution", "") else float
    assert low <= values[0] < values[-1] <= high
    assert spread(values[len(values) // 2]) == pytest.approx(spread(middle), abs=0.1 * (spread(high) - spread(low)))


@pytest.mark.parametrize(
    ("content", "allowed"),
    [
        ({"min": 2, "max": 5}, [2, 3, 4, 5]),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"distribution": "q_uniform", "min": 16, "max": 64, "q": 16}, [16, 32, 48, 64]),
        ({"distribution": "q_log_uniform_values", "min": 1, "max": 4}, [1, 2, 3, 4]),
        ({"distribution": "q_log_uniform", "min": 0, "max": math.log(4), "q": 2}, [2, 4]),
        ({"values": ["relu", None, [8, 16], 0.5]}, ["relu", None, [8, 16], 0.5]),
        ({"value": {"a": 1}}, [{"a": 1}]),
    ],
)
def test_whole_quantised_and_named_values_are_all_drawn_and_no_others(tmp_path, content, allowed):
    found = parameter(tmp_path, **content)
    values = drawn(found) if all(isinstance(value, (int, float)) for value in allowed) else found.samples()
    assert sorted(map(str, allowed)) == sorted({str(value) for value in values})


@pytest.mark.parametrize(
    ("content", "points"),
    [
        ({"min": 1, "max": 3}, [1, 2, 3]),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0.25}, [0, 0.25, 0.5, 0.75, 1]),
        ({"values": [3, 1]}, [3, 1]),
    ],
)
def test_a_grid_has_every_value_of_what_has_few(tmp_path, content, points):
    (found,) = load(tmp_path, method="grid", parameters={"lr": content}).parameters
    assert found.samples() == points


def test_nested_parameters_are_dotted_keys(tmp_path):
    inner = {"parameters": {"lr": {"value": 1}, "deep": {"parameters": {"x": {"value": 2}}}}}
    keys = [parameter.key for parameter in load(tmp_path, parameters={"a.b": inner, "c": {"value": 3}}).parameters]
    assert keys == ["a.b.lr", "a.b.deep.x", "c"]


@pytest.mark.parametrize(
    ("given", "pruning"),
    [
        ({"type": "hyperband", "min_iter": 3}, (3, 3)),
        ({"type": "hyperband", "min_iter": 2, "eta": 4}, (2, 4)),
        ({"type": "hyperband", "max_iter": 27, "s": 2}, (3, 3)),  # W&B's brackets: 9 and 3
    ],
)
def test_hyperband_begins_at_the_lowest_bracket_of_wandb(tmp_path, given, pruning):
    assert load(tmp_path, early_terminate=given).pruning == pruning


@pytest.mark.parametrize("name", ["classifier_lr", "classifier_spiking", "hid", "spike_nvpt", "tical"])
def test_the_sweeps_of_the_suite_are_read_and_go_offline(name):
    spec = load_sweep(f"sweeps/{name}", trials=2)
    assert spec.metric.startswith("val/")
    assert not any("wandb" in word for word in spec.command)
    assert spec.command[0].startswith("--config=")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "greedy"}, "method"),
        ({"job": "x"}, "job"),
        ({"metric": {"name": "test/accuracy", "goal": "maximize"}}, "test/accuracy"),
        ({"metric": {"name": "best/test/accuracy"}}, "test/accuracy"),
        ({"metric": {"name": "train/loss"}}, "train/loss"),
        ({"metric": {"name": "val/loss", "goal": "max"}}, "goal"),
        ({"metric": {"name": "val/loss", "target": 0.1}}, "target"),
        ({"metric": None}, "metric"),
        ({"run_cap": None}, "run_cap"),
        ({"run_cap": 0}, "run_cap"),
        ({"name": "../up"}, None),
        ({"name": "..."}, "name"),
        ({"program": "train.py"}, "program"),
        ({"command": ["python", "train.py", "${args}"]}, "train.py"),
        ({"command": ["leanlight", "reproduce", "x", "${args}"]}, "reproduce"),
        ({"command": ["leanlight", "fit", "--config", "classifier/digits_small"]}, "${args}"),
        ({"command": ["leanlight", "fit", "${args_json}", "${args}"]}, "${args_json}"),
        ({"command": ["leanlight", "fit", "--run.id=a", "${args}"]}, "run.id"),
        ({"command": ["leanlight", "fit", "--resume", "a", "${args}"]}, "resume"),
        ({"parameters": {}}, "parameters"),
        ({"parameters": {"run.id": {"values": ["a"]}}}, "run.id"),
        ({"parameters": {"lr": 3}}, "lr"),
        ({"parameters": {"lr": {}}}, "lr"),
        ({"parameters": {"lr": {"values": []}}}, "lr"),
        ({"parameters": {"lr": {"values": [1, 1]}}}, "lr"),
        ({"parameters": {"lr": {"values": [1], "probabilities": [1]}}}, "probabilities"),
        ({"parameters": {"lr": {"min": 1}}}, "lr"),
        ({"parameters": {"lr": {"min": 2, "max": 1}}}, "lr"),
        ({"parameters": {"lr": {"min": 0.1, "max": float("inf")}}}, "max"),
        ({"parameters": {"lr": {"min": 0.1, "max": 1, "q": 0.1}}}, "q"),
        ({"parameters": {"lr": {"distribution": "normal", "min": 0, "max": 1}}}, "normal"),
        ({"parameters": {"lr": {"distribution": "log_uniform_values", "min": 0, "max": 1}}}, "min"),
        ({"parameters": {"lr": {"distribution": "int_uniform", "min": 0.5, "max": 2}}}, "lr"),
        ({"parameters": {"a": {"parameters": {"b": {"value": 1}}}, "a.b": {"value": 2}}}, "a.b"),
        ({"method": "grid", "parameters": {"lr": {"min": 0.1, "max": 1.0}}}, "lr"),
        ({"method": "grid", "parameters": {"lr": {"min": 1, "max": 10**6}}}, "lr"),
        ({"method": "grid", "parameters": {x: {"min": 1, "max": 999} for x in "ab"}}, "parameters"),
        ({"early_terminate": {"type": "median"}}, "early_terminate"),
        ({"early_terminate": {"type": "hyperband"}}, "min_iter"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 3, "max_iter": 9}}, "min_iter"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 3, "eta": 1}}, "eta"),
        ({"early_terminate": {"type": "hyperband", "min_iter": 3, "strict": True}}, "strict"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_one_line_that_names_it(tmp_path, changes, named):
    if named is None:  # no way out of the folder of sweeps
        assert load(tmp_path, **changes).name == "up"
        return
    with pytest.raises(UserError, match=r"s\.yaml") as error:
        load(tmp_path, **changes)
    assert named in str(error.value)
    assert "\n" not in str(error.value)
