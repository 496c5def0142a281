"""`leanlight reproduce` on stand-in runs: what is reused, resumed, repeated, merged and published."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from leanlight.cli.reproduce import main
from leanlight.contracts import UserError
from leanlight.results.launch import Job, environment, run_jobs
from leanlight.results.markdown import warnings_of
from leanlight.results.state import clear

RESULT = Path("runs/results/classifier/two.json")
Rewrite = Callable[..., None]


def _run_dir(row: str, seed: int) -> Path:
    (found,) = Path("runs/classifier/digits").glob(f"two-{row}-s{seed}-*")
    return found


def _document() -> dict[str, Any]:
    return json.loads(RESULT.read_text())


def _row(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in document["rows"] if row["name"] == name)


def test_a_table_runs_every_cell_and_publishes_means_and_verdicts(suite: Any) -> None:
    assert main([str(suite.table()), "--jobs", "2"]) == 0
    assert len(suite.commands()) == 6
    document = _document()
    measured = _row(document, "good")["metrics"]["test/accuracy"]
    values = [0.8, 0.82, 0.84]
    assert list(measured["by_seed"].values()) == pytest.approx(values)
    assert measured["mean"] == pytest.approx(statistics.mean(values))
    assert measured["std"] == pytest.approx(statistics.stdev(values))
    assert measured["n"] == 3
    assert document["claims"][0]["verdict"] == "reproduced"
    assert document["complete"]
    assert not document["stale"]
    assert "test/energy_pj" not in _row(document, "good")["metrics"]  # optional and absent


def test_seeds_that_are_replicas_share_a_run_and_count_one_by_one(suite: Any) -> None:
    seconds = {"label": "Time", "higher_is_better": False}
    content = yaml.safe_load(suite.table().read_text())
    path = suite.table(
        replicas=2,
        metrics=content["metrics"] | {"summary/wall_s": seconds},
        rows=[content["rows"][0], {**content["rows"][1], "replicas": 1}],
    )
    assert main([str(path)]) == 0
    words = [command["argv"] for command in suite.commands()]
    assert len(words) == 2 + 3
    first = [word for word in words if "--seed_everything=0" in word]
    assert ["--model.init_args.replicas=2" in word for word in first] == [True, False]
    document = _document()
    good, bad = (_row(document, name) for name in ("good", "bad"))
    assert good["metrics"]["test/accuracy"]["by_seed"] == pytest.approx({"0": 0.8, "1": 0.82, "2": 0.84})
    assert bad["metrics"]["test/accuracy"]["by_seed"] == pytest.approx({"0": 0.6, "1": 0.61, "2": 0.62})
    assert good["metrics"]["summary/wall_s"]["by_seed"] == {"0": 1.0, "2": 2.0}  # one measurement a run
    assert [run["wall_s"] for run in good["runs"]] == [1.0, 1.0, 2.0]
    assert [run["samples_seen"] for run in good["runs"]] == [320, 320, 640]
    assert "--model.init_args.replicas=2" in good["command"]
    assert document["claims"][0]["evidence"]["n"] == 3
    before = RESULT.read_bytes()
    assert main([str(path)]) == 0
    assert len(suite.commands()) == 5
    assert RESULT.read_bytes() == before


def test_a_run_of_replicas_that_failed_fails_for_each_and_one_that_was_cut_off_goes_on(
    suite: Any, rewrite: Rewrite
) -> None:
    rows = [{"name": "good", "config": "a.yaml"}, {"name": "bad", "config": "b.yaml", "overrides": {"fail": "yes"}}]
    path = suite.table(replicas=3, rows=rows)
    assert main([str(path)]) == 1
    assert _row(_document(), "bad")["failed"] == dict.fromkeys("012", "exit code 1")
    assert warnings_of(_document())[-1] == "bad, seeds 0, 1, 2: exit code 1."
    rewrite(_run_dir("good", 0), status="interrupted")
    assert main([str(path), "--only", "good", "--seed", "1"]) == 0
    assert suite.commands()[-1]["argv"][:2] == ["fit", "--resume"]
    assert len(_row(_document(), "good")["seeds"]) == 3


def test_what_is_published_names_neither_host_nor_user_nor_folder(suite: Any) -> None:
    suite.reproduced()
    document = _document()
    assert set(document["machine"]) >= {"cpu", "cores", "ram_gib", "python", "torch"}
    runs = [run for row in document["rows"] for run in row["runs"]]
    assert all(run["run"].startswith("classifier/digits/two-") and "machine" not in run for run in runs)
    text = json.dumps([document["machine"], runs, document["table"], document["command"]])
    assert os.uname().nodename not in text
    assert str(suite.folder) not in text


@pytest.mark.parametrize(
    ("source", "published"),
    [
        ("/home/ann/data/digits/digits.npz (25 of 50 train)", "digits/digits.npz (25 of 50 train)"),
        ("/data/digits", "data/digits"),
        ("packaged subset (3,200 of 60,000 train / half)", "packaged subset (3,200 of 60,000 train / half)"),
        ("data/digits", "data/digits"),
    ],
)
def test_published_data_are_named_by_their_folder_alone(
    suite: Any, rewrite: Rewrite, source: str, published: str
) -> None:
    suite.reproduced()
    rewrite(_run_dir("good", 2), data={"name": "digits", "source": source})
    assert main(["two.yaml"]) == 0
    assert {data["source"] for data in _row(_document(), "good")["data"] if data} >= {published}


def test_a_second_time_runs_nothing_and_changes_nothing(suite: Any) -> None:
    suite.reproduced()
    before = RESULT.read_bytes()
    assert main([str(suite.table())]) == 0
    assert len(suite.commands()) == 6
    assert RESULT.read_bytes() == before


def test_a_changed_override_runs_that_row_again_and_only_that(suite: Any) -> None:
    suite.reproduced()
    content = yaml.safe_load(suite.table().read_text())
    content["rows"][0]["overrides"]["value"] = 0.9
    suite.table(rows=content["rows"])
    assert main(["two.yaml"]) == 0
    assert len(suite.commands()) == 6 + 3
    assert _row(_document(), "good")["metrics"]["test/accuracy"]["mean"] == pytest.approx(0.92)
    assert _row(_document(), "bad")["metrics"]["test/accuracy"]["mean"] == pytest.approx(0.61)


def test_changed_code_shows_as_stale_and_is_rerun_only_when_asked(
    suite: Any, rewrite: Rewrite, capsys: pytest.CaptureFixture[str]
) -> None:
    suite.reproduced()
    rewrite(_run_dir("good", 1), code_hash="of an older version")
    assert main(["two.yaml"]) == 0
    assert len(suite.commands()) == 6
    assert "good s1: stale" in capsys.readouterr().out
    document = _document()
    assert document["stale"]
    assert [run["stale"] for run in _row(document, "good")["runs"]] == [False, True, False]
    assert document["claims"][0]["evidence"]["stale"]
    assert main(["two.yaml", "--rerun-stale"]) == 0
    assert len(suite.commands()) == 7
    assert not _document()["stale"]


def test_an_interrupted_run_with_a_checkpoint_goes_on(suite: Any, rewrite: Rewrite) -> None:
    suite.reproduced()
    run_dir = _run_dir("bad", 0)
    for status in ("interrupted", "running", "failed"):
        rewrite(run_dir, status=status)
        assert main(["two.yaml"]) == 0
        assert suite.commands()[-1]["argv"] == ["fit", "--resume", str(run_dir)]
    assert len(suite.commands()) == 9


def test_an_interrupted_run_without_a_checkpoint_starts_anew(suite: Any, rewrite: Rewrite) -> None:
    suite.reproduced()
    run_dir = _run_dir("bad", 0)
    rewrite(run_dir, status="interrupted")
    (run_dir / "checkpoints" / "last.ckpt").unlink()
    assert main(["two.yaml"]) == 0
    assert "--resume" not in suite.commands()[-1]["argv"]


def test_half_a_run_of_older_code_is_not_gone_on_with(suite: Any, rewrite: Rewrite) -> None:
    suite.reproduced()
    rewrite(_run_dir("bad", 0), status="interrupted", code_hash="of an older version")
    assert main(["two.yaml"]) == 0
    assert "--resume" not in suite.commands()[-1]["argv"]


def test_a_diverged_run_is_reported_and_not_repeated(
    suite: Any, rewrite: Rewrite, capsys: pytest.CaptureFixture[str]
) -> None:
    suite.reproduced()
    rewrite(_run_dir("bad", 0), status="diverged", error="loss is nan at step 7")
    assert main(["two.yaml"]) == 1
    assert len(suite.commands()) == 6
    assert "loss is nan at step 7" in capsys.readouterr().out
    assert _row(_document(), "bad")["failed"] == {"0": "diverged"}
    assert _document()["claims"][0]["verdict"] == "not_tested"


def test_a_failing_cell_is_told_with_its_log_and_the_others_go_on(
    suite: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = yaml.safe_load(suite.table().read_text())["rows"]
    rows[0]["overrides"]["fail"] = True
    rows[1]["overrides"]["fail"] = "diverged"
    suite.table(rows=[*rows, {"name": "third", "config": "b.yaml"}])
    assert main(["two.yaml"]) == 1
    shown = capsys.readouterr().out
    assert "boom: the reason" in shown
    assert "6 FAILED: good s0, bad s0, good s1, bad s1, good s2, bad s2" in shown
    document = _document()
    assert not document["complete"]
    assert _row(document, "good")["metrics"] == {}
    assert _row(document, "good")["failed"] == dict.fromkeys("012", "exit code 1")
    assert _row(document, "bad")["failed"] == dict.fromkeys("012", "diverged")
    assert _row(document, "third")["metrics"]["test/accuracy"]["n"] == 3


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_missing_or_infinite_metric_is_a_failure_not_a_figure(
    suite: Any, rewrite: Rewrite, value: float | None, capsys: pytest.CaptureFixture[str]
) -> None:
    suite.reproduced()
    rewrite(_run_dir("good", 2), metrics={"val/accuracy": 1.0} if value is None else {"test/accuracy": value})
    assert main(["two.yaml"]) == 1
    assert "test/accuracy" in capsys.readouterr().out
    assert _row(_document(), "good")["metrics"]["test/accuracy"]["n"] == 2


def test_one_cell_is_repeated_and_merged_into_what_is_published(suite: Any) -> None:
    suite.reproduced()
    before = _document()
    assert main(["two.yaml", "--only", "good", "--seed", "1", "--fresh"]) == 0
    assert len(suite.commands()) == 7
    assert "--seed_everything=1" in suite.commands()[-1]["argv"]
    assert _document() == before


def test_cells_whose_folders_are_gone_stay_published_unless_asked_for(suite: Any, rewrite: Rewrite) -> None:
    suite.reproduced()
    before = _document()
    Path("runs/classifier").rename("elsewhere")
    assert main(["two.yaml", "--only", "bad", "--seed", "0"]) == 0
    assert len(suite.commands()) == 7
    assert _document() == before
    content = yaml.safe_load(Path("two.yaml").read_text())
    content["rows"][0]["overrides"]["value"] = 0.1  # the published figures of `good` are of another configuration now
    suite.table(rows=content["rows"])
    assert main(["two.yaml", "--only", "bad", "--seed", "0"]) == 0
    assert _row(_document(), "good")["runs"] == []
    assert _row(_document(), "bad")["seeds"] == [0, 1, 2]


def test_published_results_are_written_only_when_asked_and_are_where_others_begin(suite: Any) -> None:
    published = Path("docs/results/classifier/two.json")
    suite.reproduced()
    assert main(["two.yaml"]) == 0
    assert not published.exists()
    assert main(["two.yaml", "--publish"]) == 0
    assert len(suite.commands()) == 6
    assert json.loads(published.read_text()) == _document()
    Path("runs").rename("elsewhere")
    before = published.read_bytes()
    assert main(["two.yaml", "--only", "bad", "--seed", "0"]) == 0
    assert published.read_bytes() == before
    assert _document()["complete"]  # five cells from the published results, one of this machine


def test_a_stage_that_does_not_parse_is_found_in_the_dry_run(suite: Any) -> None:
    stages = [{"name": "only", "config": str(suite.folder / "a.yaml")}]
    pipeline = suite.write("one.yaml", {"method": "classifier", "dataset": "digits", "stages": stages})
    row = {"name": "good", "pipeline": str(pipeline), "stage": "only", "overrides": {"only.unknown": 1}}
    table = suite.table(rows=[row], claims=[])
    with pytest.raises(UserError, match=r"row good: stage only: unknown: not a key of the model"):
        main([str(table), "--dry-run"])


def test_a_stage_that_many_rows_share_is_parsed_once(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = sys.modules["leanlight.experiment"]  # the stand-in, whatever was imported before
    parsed, parse = [], experiment.resolve
    monkeypatch.setattr(experiment, "resolve", lambda *words: parsed.append(words) or parse(*words))
    stages = [{"name": "only", "config": str(suite.folder / "a.yaml")}]
    pipeline = suite.write("one.yaml", {"method": "classifier", "dataset": "digits", "stages": stages})
    rows = [{"name": name, "pipeline": str(pipeline), "stage": "only"} for name in ("good", "bad", "third")]
    assert main([str(suite.table(rows=rows, claims=[])), "--dry-run"]) == 0
    assert len(parsed) == 1


@pytest.mark.parametrize("place", ["..", "../outside", ".", "inside/../../outside"])
def test_nothing_outside_the_runs_root_is_ever_removed(tmp_path: Path, place: str) -> None:
    root, outside = tmp_path / "runs", tmp_path / "outside"
    for folder in (root, outside):
        folder.mkdir()
        (folder / "precious").touch()
    with pytest.raises(UserError, match="outside the runs root"):
        clear(root / place, root)
    assert (root / "precious").exists()
    assert (outside / "precious").exists()
    (root / "link").symlink_to(outside)
    with pytest.raises(UserError, match="outside the runs root"):
        clear(root / "link", root)
    assert (outside / "precious").exists()


def test_a_dry_run_starts_and_writes_nothing(suite: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(suite.table()), "--dry-run"]) == 0
    assert capsys.readouterr().out.count("not run yet") == 6
    assert suite.commands() == []
    assert not RESULT.exists()
    assert not Path("runs").exists()


def test_jobs_share_cores_and_devices(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlight.results.launch.usable_cores", lambda: 8)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)  # a number the user has set would stand
    main([str(suite.table()), "--devices", "3,5"])
    commands = suite.commands()
    assert {command["threads"] for command in commands} == {"4"}
    assert {command["gpu"] for command in commands} == {"3", "5"}


@pytest.mark.parametrize(("mkl", "expected"), [(None, "3"), ("2", "2")])
def test_every_library_of_a_job_has_the_threads_that_openmp_was_given(
    monkeypatch: pytest.MonkeyPatch, mkl: str | None, expected: str
) -> None:
    monkeypatch.setattr("leanlight.results.launch.usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    if mkl is not None:
        monkeypatch.setenv("MKL_NUM_THREADS", mkl)
    assert environment(jobs=2)["OMP_NUM_THREADS"] == "3"
    assert environment(jobs=2)["MKL_NUM_THREADS"] == expected


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [
        (None, 3, {"0", "1"}),
        ("2,5,7", 3, {"2", "5"}),
        ("GPU-8932f937, GPU-b1c2", 2, {"GPU-8932f937", "GPU-b1c2"}),
        ("MIG-a/1/0,MIG-b/1/0", 1, {"MIG-a/1/0"}),  # CUDA uses one MIG part of those it is given
        ("4,-1,6", 1, {"4"}),  # and stops at the first that is none
        (None, 0, {None}),
        ("", 0, {""}),
    ],
)
def test_several_jobs_get_a_visible_gpu_each_by_the_name_it_has(
    suite: Any, monkeypatch: pytest.MonkeyPatch, named: str | None, count: int, expected: set[str | None]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    main([str(suite.table()), "--jobs", "2", "--seed", "0"])
    assert {command["gpu"] for command in suite.commands()} == expected


def test_one_job_alone_sees_every_gpu(suite: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    main([str(suite.table()), "--seed", "0", "--only", "good"])
    assert [command["gpu"] for command in suite.commands()] == ["2,5"]


def test_a_run_another_process_works_on_is_left_alone(suite: Any, capsys: pytest.CaptureFixture[str]) -> None:
    suite.reproduced()
    run_dir = _run_dir("bad", 0)
    with open(run_dir.with_name(f".{run_dir.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["two.yaml", "--only", "bad", "--seed", "0", "--fresh"]) == 1
    assert len(suite.commands()) == 6
    assert "another process works in this run folder" in capsys.readouterr().out
    assert (run_dir / "summary.json").is_file()


def test_ctrl_c_interrupts_the_children_and_the_same_command_goes_on(suite: Any) -> None:
    rows = yaml.safe_load(suite.table().read_text())["rows"]
    rows[0]["overrides"]["wait"] = True
    suite.table(rows=rows)

    def interrupt(job: Job) -> None:
        deadline = time.monotonic() + 20
        while not list(Path("runs").glob("classifier/digits/two-good-*/checkpoints/last.ckpt")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leanlight.results.display.CellProgress.started", lambda self, job: interrupt(job))
        with pytest.raises(KeyboardInterrupt):
            main(["two.yaml", "--only", "good", "--seed", "0"])
    (run_dir,) = Path("runs/classifier/digits").glob("two-good-s0-*")
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    assert not RESULT.exists()
    assert main(["two.yaml", "--only", "good", "--seed", "0"]) == 0
    assert suite.commands()[-1]["argv"][:2] == ["fit", "--resume"]
    assert _row(_document(), "good")["seeds"] == [0]


def test_a_child_that_ignores_the_interrupt_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlight.results.launch.GRACE_S", 0.3)
    ready = tmp_path / "ready"
    code = f"import signal, time; signal.signal(2, signal.SIG_IGN)\nopen({str(ready)!r}, 'w'); time.sleep(60)"
    started: list[subprocess.Popen[bytes]] = []

    def interrupt(job: Job) -> None:
        while not ready.exists():
            time.sleep(0.02)
        raise KeyboardInterrupt

    class Watched(Job):
        def start(self, env: Any, forker: Any = None) -> Any:
            process = super().start(env, forker)
            started.append(process)
            return process

    job = Watched("k", tmp_path / "id", tmp_path / "log", lambda: [sys.executable, "-c", code])
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job], 1, started=interrupt)
    assert started[0].poll() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "god"], "--only: no row 'god' (did you mean 'good'?)"),
        (["--seed", "7"], "--seed: 7 is not one of this table's seeds"),
        (["--jobs", "0"], "--jobs: expected an integer of at least 1, got '0'"),
        (["--devices", "0,first"], "--devices: expected GPUs by index or UUID, e.g. 0,1, got 'first'"),
        (["--output", "x.txt"], "--output: expected a .json file"),
        (["--output", "x.json", "--publish"], "--publish: writes to docs/results, --output somewhere else"),
        (["--rerun-stal"], "--rerun-stal: not an option of `leanlight reproduce` (did you mean '--rerun-stale'?)"),
        (["--seed", "x"], "--seed: expected an integer from 0 to 4294967295, got 'x'"),
    ],
)
def test_a_wrong_option_is_one_line(suite: Any, options: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        main([str(suite.table()), *options])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unreadable_result_file_is_found_before_anything_runs(suite: Any) -> None:
    RESULT.parent.mkdir(parents=True)
    RESULT.write_text("{ half")
    with pytest.raises(UserError, match=r"two.json: expected a JSON file of results"):
        main([str(suite.table())])
    assert suite.commands() == []
