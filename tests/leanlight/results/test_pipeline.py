"""`leanlight run` on stand-in stages: order, references, identity by content, reuse."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from leanlight.cli.reproduce import main as reproduce
from leanlight.cli.run import main
from leanlight.contracts import UserError
from leanlight.registry import MethodInfo
from leanlight.results.pipeline import PipelineRunner, smallest_overrides
from leanlight.results.pipeline_spec import load_pipeline
from leanlight.results.table_spec import load_table

TEACHER = "${stages.teacher.artifacts.checkpoint}"


def _pipeline(suite: Any, **student: Any) -> Path:
    stages = [
        {"name": "teacher", "config": str(suite.folder / "a.yaml"), "overrides": {"value": 0.9}},
        {
            "name": "student",
            "config": str(suite.folder / "b.yaml"),
            "overrides": {"teacher": TEACHER, "floor": "${stages.teacher.metrics.test/accuracy}"},
            **student,
        },
    ]
    return suite.write("chain.yaml", {"method": "classifier", "dataset": "digits", "stages": stages})


def _stage_dirs() -> dict[str, list[str]]:
    names = sorted(path.name for path in Path("runs/classifier/digits").iterdir())
    return {stage: [name for name in names if f"-{stage}-" in name] for stage in ("teacher", "student")}


def _option(argv: list[str], key: str) -> str:
    return next(word.partition("=")[2] for word in argv if word.startswith(f"--{key}="))


def test_a_stage_gets_the_outputs_of_an_earlier_one(suite: Any) -> None:
    assert main([str(_pipeline(suite))]) == 0
    teacher, student = (command["argv"] for command in suite.commands())
    checkpoint = _option(student, "teacher")
    assert Path(checkpoint).is_file()
    teacher_id = teacher[teacher.index("--run.id") + 1]
    assert checkpoint == f"runs/classifier/digits/{teacher_id}/checkpoints/last.ckpt"
    assert teacher_id.startswith("chain-teacher-")
    assert float(_option(student, "floor")) == 0.9
    assert json.loads(_option(student, "run.inputs")) == {"teacher.artifacts.checkpoint": checkpoint}
    summary = json.loads(Path("runs/pipelines/chain/summary.json").read_text())
    assert summary["status"] == "finished"
    assert [stage["name"] for stage in summary["stages"]] == ["teacher", "student"]
    assert all((Path("runs") / stage["run_dir"] / "summary.json").is_file() for stage in summary["stages"])


def test_the_stages_of_a_pipeline_train_on_the_gpu_it_was_given(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")
    main([str(_pipeline(suite))])
    assert [command["gpu"] for command in suite.commands()] == ["GPU-8932f937"] * 2


def _method(suite: Any, smallest: str = "b.yaml", **more: Any) -> MethodInfo:
    return MethodInfo("own", "", "", smallest=str(suite.folder / smallest), **more)


def test_the_smallest_config_of_a_method_gets_what_the_stages_before_it_make(suite: Any) -> None:
    info = _method(suite, smallest_inputs=str(_pipeline(suite)))
    needed = smallest_overrides(info, Path("inputs"))
    (teacher,) = (command["argv"] for command in suite.commands())
    run = Path("inputs/classifier/digits") / teacher[teacher.index("--run.id") + 1]
    assert needed == {"teacher": str(run / "checkpoints/last.ckpt"), "floor": 0.9}
    assert smallest_overrides(info, Path("inputs")) == needed
    assert len(suite.commands()) == 1


def test_a_method_whose_smallest_config_needs_nothing_starts_nothing(suite: Any) -> None:
    assert smallest_overrides(_method(suite), Path("inputs")) == {}
    assert not Path("inputs").exists()


def test_a_pipeline_without_the_smallest_config_is_refused(suite: Any) -> None:
    info = _method(suite, "c.yaml", smallest_inputs=str(_pipeline(suite)))
    with pytest.raises(UserError, match=r"chain.yaml: expected a stage with config .*c.yaml"):
        smallest_overrides(info, Path("inputs"))


def test_finished_stages_are_reused(suite: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(_pipeline(suite))
    main([path])
    assert main([path]) == 0
    assert len(suite.commands()) == 2
    assert "[1/2] teacher: reuse (finished)" in capsys.readouterr().out


def test_from_repeats_a_stage_and_those_after_it(suite: Any) -> None:
    path = str(_pipeline(suite))
    main([path])
    assert main([path, "--from", "student"]) == 0
    assert [command["argv"][2] for command in suite.commands()[2:]] == [str(suite.folder / "b.yaml")]
    assert main([path, "--fresh"]) == 0
    assert len(suite.commands()) == 5


def test_identity_follows_the_content_of_inputs_not_their_place(suite: Any, rewrite: Callable[..., None]) -> None:
    path = str(_pipeline(suite))
    main([path])
    (teacher,) = _stage_dirs()["teacher"]
    Path("runs").rename("moved")
    main([path, "--runs-root", "moved"])
    assert len(suite.commands()) == 2  # elsewhere, but the same bytes
    Path("moved/classifier/digits", teacher, "checkpoints/last.ckpt").write_bytes(b"other weights")
    main([path, "--runs-root", "moved"])
    assert len(suite.commands()) == 3
    Path("moved").rename("runs")
    assert len(_stage_dirs()["student"]) == 2


def test_set_changes_one_key_of_one_stage(suite: Any) -> None:
    path = str(_pipeline(suite))
    main([path])
    assert main([path, "--set", "student.lr=0.5"]) == 0
    assert len(suite.commands()) == 3
    assert _option(suite.commands()[-1]["argv"], "lr") == "0.5"


def test_seed_reaches_every_stage_that_names_none(suite: Any) -> None:
    path = str(_pipeline(suite, overrides={"seed_everything": 7}))
    assert main([path, "--seed", "3"]) == 0
    assert [_option(command["argv"], "seed_everything") for command in suite.commands()] == ["3", "7"]


def test_a_failed_stage_stops_the_pipeline_and_the_next_call_goes_on(suite: Any) -> None:
    path = str(_pipeline(suite, overrides={"fail": True}))
    assert main([path]) == 1
    assert json.loads(Path("runs/pipelines/chain/summary.json").read_text())["status"] == "failed"
    assert main([str(_pipeline(suite))]) == 0
    assert sum("a.yaml" in str(command["argv"]) for command in suite.commands()) == 1


def test_an_export_stage_leaves_an_ordinary_run_folder(suite: Any) -> None:
    stages = [
        {"name": "train", "config": str(suite.folder / "a.yaml")},
        {"name": "pack", "command": "export", "inputs": {"source": "${stages.train.run_dir}"}},
        {
            "name": "use",
            "config": str(suite.folder / "b.yaml"),
            "overrides": {"weights": "${stages.pack.artifacts.export}/weights.bin"},
        },
    ]
    path = suite.write("pack.yaml", {"method": "classifier", "dataset": "digits", "stages": stages})
    assert main([str(path)]) == 0
    (packed,) = Path("runs/classifier/digits").glob("pack-pack-*")
    summary = json.loads((packed / "summary.json").read_text())
    assert [artifact["path"] for artifact in summary["artifacts"]] == ["artifacts/export/weights.bin"]
    inputs = json.loads(_option(suite.commands()[-1]["argv"], "run.inputs"))
    assert inputs == {"pack.artifacts.export": f"{packed}/artifacts/export"}
    assert main([str(path)]) == 0
    assert len(suite.commands()) == 3


def _with_command(suite: Any, **stage: Any) -> str:
    pack = {"name": "pack", "command": "export", "inputs": {"source": "${stages.train.run_dir}"}, **stage}
    stages = [{"name": "train", "config": str(suite.folder / "a.yaml")}, pack]
    return str(suite.write("pack.yaml", {"method": "classifier", "dataset": "digits", "stages": stages}))


def test_options_of_a_stage_command_are_its_overrides(suite: Any) -> None:
    assert main([_with_command(suite)]) == 0
    assert main([_with_command(suite, overrides={"checkpoint": "best"})]) == 0
    _, first, second = (command["argv"] for command in suite.commands())
    assert first[1].startswith("runs/classifier/digits/pack-train-")
    assert "--checkpoint=best" not in first
    assert "--checkpoint=best" in second
    assert len(list(Path("runs/classifier/digits").glob("pack-pack-*"))) == 2


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"overrides": {"chekpoint": "best"}}, "stage pack: --chekpoint=best: not an option of `leanlight export`"),
        ({"overrides": {"checkpoint": "newest"}}, "invalid choice: 'newest'"),
        ({"overrides": {"output": "x"}}, "overrides: output is set by the pipeline itself"),
        ({"inputs": {}}, "export takes no config and one input"),
        ({"config": "a.yaml"}, "export takes no config and one input"),
    ],
)
def test_a_wrong_stage_command_is_found_before_the_first_stage(suite: Any, stage: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        main([_with_command(suite, **stage)])
    assert not Path("runs").exists()


def _selecting(suite: Any, overrides: dict[str, Any] | None = None, **stage: Any) -> Path:
    stages = [
        {"name": "features", "command": "predict", "config": str(suite.folder / "a.yaml")},
        {
            "name": "choose",
            "command": "select",
            "overrides": {"rule": "random", "keep": 0.2, **(overrides or {})},
            "inputs": {"source": "${stages.features.run_dir}"},
            **stage,
        },
        {
            "name": "train",
            "config": str(suite.folder / "b.yaml"),
            "overrides": {
                "subset": "${stages.choose.artifacts.select}",
                "share": "${stages.choose.metrics.rho_s}",
                "value": 0.7,
            },
        },
    ]
    return suite.write("selecting.yaml", {"method": "classifier", "dataset": "digits", "stages": stages})


def _chosen() -> dict[Path, dict[str, Any]]:
    folders = sorted(Path("runs/classifier/digits").glob("selecting-choose-*"))
    return {folder: json.loads((folder / "summary.json").read_text()) for folder in folders}


def test_a_selection_is_a_stage_whose_folder_and_numbers_later_stages_take(suite: Any) -> None:
    assert main([str(_selecting(suite))]) == 0
    ((folder, summary),) = _chosen().items()
    train = suite.commands()[-1]["argv"]
    assert _option(train, "subset") == f"{folder}/artifacts/select"
    assert _option(train, "share") == "0.2"
    assert summary["status"] == "finished"
    assert summary["metrics"] == {"kept": 12, "rho_s": 0.2}
    assert summary["wall_s"] > 0
    # Of the features, of the command, and of what the rule imported.
    assert {"leanlight/contracts/errors.py", "leanlight/cli/select.py", "leanlight/contracts/files.py"} == set(
        summary["code_files"]
    )
    assert main([str(_selecting(suite))]) == 0
    assert len(suite.commands()) == 3


def test_a_seed_reaches_a_stage_command_that_draws_and_its_own_stands_above(suite: Any) -> None:
    assert main([str(_selecting(suite)), "--seed", "3"]) == 0
    assert main([str(_selecting(suite, {"seed": 5})), "--seed", "3"]) == 0
    seeds = [_option(c["argv"], "seed") for c in suite.commands() if c["argv"][0] == "select"]
    assert seeds == ["3", "5"]
    assert len(_chosen()) == 2
    spec = load_pipeline(_with_command(suite)).with_seed(3)
    assert [stage.overrides for stage in spec.stages] == [{"seed_everything": 3}, {}]  # an export draws nothing


def test_options_and_input_content_are_the_identity_of_a_selection(suite: Any) -> None:
    main([str(_selecting(suite))])
    main([str(_selecting(suite, {"keep": 0.3}))])
    (features,) = Path("runs/classifier/digits").glob("selecting-features-*")
    (features / "artifacts/predictions/0.safetensors").write_text("other features")
    main([str(_selecting(suite, {"keep": 0.3}))])
    assert len(_chosen()) == 3


def test_a_stage_that_broke_off_goes_on_with_its_parts_and_ends_as_any(suite: Any) -> None:
    path = str(_selecting(suite, {"seed": 13}))
    assert main([path]) == 1
    ((folder, summary),) = _chosen().items()
    assert summary["status"] == "failed"
    assert main([path]) == 0
    assert (folder / "artifacts/select/selection.safetensors").read_text().endswith("True")
    assert _chosen()[folder]["status"] == "finished"
    assert not (folder / "artifacts/select/.parts").exists()
    assert main([path, "--from", "choose"]) == 1  # repeated from nothing


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"rule": "randm"}, "stage choose: rule: 'randm' is none (did you mean 'random'?)"),
        ({"keep": 0}, "stage choose: --keep: expected a number in (0, 1], got '0'"),
        ({"set": {"alpha": 1}}, "stage choose: --set alpha: not an argument of lit_modules.selection.Random"),
        ({"config": "x.yaml"}, "stage choose: overrides: config is set by the pipeline itself"),
    ],
)
def test_a_wrong_selection_is_found_before_the_first_stage(suite: Any, overrides: Any, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        main([str(_selecting(suite, overrides))])
    assert not Path("runs").exists()


def test_what_is_checked_stands_in_for_outputs_of_earlier_stages(suite: Any) -> None:
    """Neither the path nor the number is there yet when all stages are parsed."""
    spec = load_pipeline(str(_pipeline(suite)))
    PipelineRunner(spec, Path("runs")).check()
    assert suite.commands() == []
    assert not Path("runs").exists()


def test_a_folder_of_many_files_is_one_input(suite: Any) -> None:
    path = str(_pipeline(suite, overrides={"bank": "${stages.teacher.artifacts.bank}", "teacher": TEACHER}))
    assert main([path, "--set", "teacher.files=3000"]) == 0
    (bank,) = Path("runs/classifier/digits").glob("chain-teacher-*/artifacts/bank")
    inputs = json.loads(_option(suite.commands()[-1]["argv"], "run.inputs"))
    assert inputs["teacher.artifacts.bank"] == str(bank)
    assert len(inputs) == 2
    assert main([path, "--set", "teacher.files=3000"]) == 0
    assert len(suite.commands()) == 2
    (bank / "7" / "1007.txt").write_text("changed")
    assert main([path, "--set", "teacher.files=3000"]) == 0
    assert len(suite.commands()) == 3


def test_a_killed_predict_stage_goes_on_where_it_was(suite: Any, rewrite: Callable[..., None]) -> None:
    path = str(_pipeline(suite, command="predict"))
    assert main([path]) == 0
    (student,) = Path("runs/classifier/digits").glob("chain-student-*")
    rewrite(student, status="running")
    assert main([path]) == 0
    assert suite.commands()[-1]["argv"] == ["predict", "--resume", str(student)]
    rewrite(student, status="running")
    (student / "artifacts/predictions/0.safetensors").unlink()
    assert main([path]) == 0
    assert "--resume" not in suite.commands()[-1]["argv"]


def test_a_missing_output_is_named(suite: Any) -> None:
    path = _pipeline(suite, overrides={"bank": "${stages.teacher.artifacts.bank.safetensors}"})
    with pytest.raises(UserError, match=r"stage teacher left nothing at .*artifacts/bank.safetensors"):
        main([str(path)])


def test_a_missing_metric_is_named(suite: Any) -> None:
    path = _pipeline(suite, overrides={"x": "${stages.teacher.metrics.test/acuracy}"})
    with pytest.raises(UserError, match=r"measured no 'test/acuracy' \(did you mean 'test/accuracy'\?\)"):
        main([str(path)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": {"t": "${stages.techer.run_dir}"}}, "no stage 'techer' (did you mean 'teacher'?)"),
        ({"overrides": {"t": "${stages.student.run_dir}"}}, "stage 'student' does not come before 'student'"),
        ({"overrides": {"t": ["${stages.teacher.weights}"]}}, "expected ${stages.STAGE.run_dir}"),
        ({"inputs": {"t": "${stages.teacher.artifacts.../../secret}"}}, "expected ${stages.STAGE.run_dir}"),
        ({"overrides": {"run.id": "x"}}, "overrides: run.id is set by the pipeline itself"),
        ({"command": "export"}, "export takes no config and one input"),
        ({"command": "train"}, "command must be one of fit, validate, test, predict, export, select, got 'train'"),
        ({"name": "teacher"}, "name 'teacher' stands twice"),
        ({"inputs": {"t": 3}}, "inputs must map names to paths"),
        ({"config": "classifier/no_such"}, "config 'classifier/no_such'"),
        ({"overrides": {"resume": "x"}}, "overrides: resume is set by the pipeline itself"),
        ({"overrides": {"unknown": 1}}, "stage student: unknown: not a key of the model"),
        ({"inputs": {"t": "nowhere.npz"}}, "stage student: input 't': nothing at nowhere.npz"),
    ],
)
def test_a_mistake_in_the_file_is_one_line_and_nothing_runs(suite: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        main([str(_pipeline(suite, **changes))])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert suite.commands() == []
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "techer"], "--from: no stage 'techer' (did you mean 'teacher'?)"),
        (["--set", "lr=1"], "--set: lr: no stage 'lr'"),
        (["--set", "student"], "--set: expected stage.key=value, got 'student'"),
        (["--set", "student=1"], "--set: student: names no key of stage 'student'"),
        (["--set", "student.unknown=1"], "stage student: unknown: not a key of the model"),
        (["--id", "../../x"], "--id: '../../x' is not a folder name"),
        (["--seed", "100000000000000"], "--seed: expected an integer from 0 to 4294967295, got '100000000000000'"),
        (["--seed", "-1"], "--seed: expected an integer from 0 to 4294967295, got '-1'"),
    ],
)
def test_a_wrong_option_is_one_line(suite: Any, options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        main([str(_pipeline(suite)), *options])
    assert not Path("runs").exists()


def test_references_to_other_things_are_left_to_the_config(suite: Any) -> None:
    spec = load_pipeline(str(_pipeline(suite, overrides={"dim": "${data.init_args.dim}"})))
    assert spec.stages[1].overrides == {"dim": "${data.init_args.dim}"}


def test_a_table_reads_numbers_of_every_stage(suite: Any) -> None:
    metrics = {
        "test/accuracy": {"label": "Accuracy", "higher_is_better": True},
        "stages/choose/wall_s": {"label": "Selection", "higher_is_better": False, "unit": "s"},
        "stages/choose/rho_s": {"label": "Kept", "higher_is_better": False},
        "stages/features/val/accuracy": {"label": "Selector", "higher_is_better": True},
        "stages/train/samples_seen": {"label": "Items", "higher_is_better": False},
    }
    rows = [{"name": "good", "pipeline": str(_selecting(suite)), "stage": "train"}]
    table = {"rows": rows, "seeds": [0, 1], "metrics": metrics, "claims": []}
    assert reproduce([str(suite.table(**table))]) == 0
    measured = json.loads(Path("runs/results/classifier/two.json").read_text())["rows"][0]["metrics"]
    assert measured["test/accuracy"]["by_seed"] == pytest.approx({"0": 0.7, "1": 0.71})
    assert measured["stages/features/val/accuracy"]["by_seed"] == pytest.approx({"0": 0.5, "1": 0.51})
    assert measured["stages/choose/rho_s"]["by_seed"] == {"0": 0.2, "1": 0.2}
    assert measured["stages/train/samples_seen"]["mean"] == 640
    walls = sorted(summary["wall_s"] for summary in _chosen().values())
    assert sorted(measured["stages/choose/wall_s"]["by_seed"].values()) == walls


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"stage": "train"}, "metric stages/chose/wall_s: its pipeline has no stage 'chose' (did you mean 'choose'?)"),
        ({"pipeline": None, "config": "b.yaml"}, "metric stages/chose/wall_s: it has no stages; say optional: true"),
    ],
)
def test_a_metric_of_a_stage_that_a_row_lacks_is_one_line(suite: Any, row: dict[str, Any], message: str) -> None:
    full = {"name": "good", "pipeline": str(_selecting(suite)), **row}
    row = {key: value for key, value in full.items() if value is not None}
    metric = {"label": "Selection", "higher_is_better": False}
    with pytest.raises(UserError, match=re.escape(message)):
        reproduce([str(suite.table(rows=[row], claims=[], metrics={"stages/chose/wall_s": metric}))])
    optional = {"stages/chose/wall_s": {**metric, "optional": True}}
    assert load_table(str(suite.table(rows=[row], claims=[], metrics=optional))).rows


def test_a_table_row_can_be_a_stage_of_a_pipeline(suite: Any) -> None:
    rows = [
        {"name": "good", "pipeline": str(_pipeline(suite)), "stage": "student", "overrides": {"student.value": 0.8}},
        {"name": "bad", "config": str(suite.folder / "b.yaml"), "overrides": {"value": 0.6}},
    ]
    table = str(suite.table(rows=rows, seeds=[0, 1]))
    assert reproduce([table]) == 0
    document = json.loads(Path("runs/results/classifier/two.json").read_text())
    good = document["rows"][0]
    assert good["metrics"]["test/accuracy"]["by_seed"] == pytest.approx({"0": 0.8, "1": 0.81})
    assert good["wall_s"] == 4.0  # both stages
    assert set(good["runs"][0]["stages"]) == {"teacher", "student"}
    done = len(suite.commands())
    assert reproduce([table]) == 0
    assert len(suite.commands()) == done
