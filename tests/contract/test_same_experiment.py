"""A run is gone on with as the same experiment or not at all, and what has finished is safe."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from leanlight import load
from leanlight.__main__ import main
from leanlight.contracts import UserError
from leanlight.locks import locked

RUN = Path("runs/classifier/digits/a")
LAST, PREVIOUS = RUN / "checkpoints" / "last.ckpt", RUN / "checkpoints" / "previous.ckpt"
QUICK = {
    "trainer.max_epochs": 2,
    "trainer.limit_train_batches": 4,
    "trainer.limit_val_batches": 2,
    "trainer.limit_test_batches": 2,
    "trainer.log_every_n_steps": 1,
    "trainer.enable_progress_bar": "false",
    "exact_resume.every": 3,
    "media.every_n_epochs": 100,
    "run.wandb": "disabled",
    "run.id": "a",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which a run has finished."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        options = [f"--{key}={value}" for key, value in QUICK.items()]
        assert main(["fit", "--config=classifier/digits_small", *options]) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of it, worked in."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return RUN


def tree(folder="."):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refused(capsys, *arguments, code=2):
    """Run a command that must change nothing; what it says."""
    before = tree()
    assert main(list(map(str, arguments))) == code
    assert tree() == before
    said = capsys.readouterr()
    return said.err if code else said.out


def rewrite(**changes):
    path = RUN / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def interrupt(**changes):
    """Make the finished run one that was killed in its test, after the test's row was written."""
    rewrite(status="running", metrics={}, artifacts=[], **changes)


def test_a_finished_run_is_left_as_it_is_and_says_so(run, capsys):
    assert "has finished, nothing is left to do" in refused(capsys, "fit", "--resume", run, code=0)


@pytest.mark.parametrize(
    "change",
    [
        "--model.init_args.optimizer.init_args.lr=0.5",
        "--data.init_args.batch_size=7",
        "--seed_everything=3",
        "--trainer.max_epochs=3",
        "--run.tf32=true",
        "--model.init_args.network.init_args.width=5",
    ],
)
def test_a_change_that_decides_numbers_is_refused_by_name(run, capsys, change):
    said = refused(capsys, "fit", "--resume", run, change)
    assert f"{change.removeprefix('--').split('=')[0]}: " in said
    assert "--allow-changes" in said


def test_an_allowed_change_is_recorded_where_the_run_is_described(run):
    assert main(["fit", "--resume", str(run), "--trainer.max_epochs=3", "--allow-changes"]) == 0
    (change,) = json.loads((run / "summary.json").read_text())["changes"]
    assert change["keys"] == {"trainer.max_epochs": [2, 3]}
    text = (run / "config.yaml").read_text()
    assert yaml.safe_load(text)["trainer"]["max_epochs"] == 3
    assert text.startswith(f"# changed on {change['date']}: trainer.max_epochs: 2 -> 3\n")
    assert torch.load(LAST, weights_only=True)["epoch"] == 3


def test_other_data_are_refused_and_named(run, capsys):
    data = json.loads((run / "summary.json").read_text())["data"]
    interrupt(data={**data, "fingerprint": "0123456789abcdef"})
    said = refused(capsys, "fit", "--resume", run)
    assert "other data" in said
    assert "0123456789ab" in said
    assert data["fingerprint"][:12] in said


def test_an_input_of_other_content_is_refused(run, capsys, tmp_path):
    (tmp_path / "teacher").write_text("now")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["run"]["inputs"] = {"teacher": str(tmp_path / "teacher")}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rewrite(status="running", inputs={"teacher": "f" * 64})
    assert "run.inputs" in refused(capsys, "fit", "--resume", run)


@pytest.mark.parametrize("status", ["finished", "interrupted"])
def test_a_resume_that_fails_before_it_trains_leaves_the_run_as_it_was(run, capsys, status):
    rewrite(status=status)
    refused(capsys, "fit", "--resume", run, "--trainer.max_epochs=1", "--allow-changes")
    (run / "checkpoints" / "other.ckpt").write_bytes(b"no checkpoint")
    refused(capsys, "fit", "--resume", run, f"--ckpt_path={run}/checkpoints/other.ckpt")


def test_a_finished_run_that_fails_to_become_longer_stays_finished(run, capsys):
    before = json.loads((run / "summary.json").read_text())
    change = ["--trainer.max_epochs=4", "--model.init_args.optimizer.init_args.lr=1e30", "--allow-changes"]
    callback = ["--disk_guard.min_free_mb=1e12"]
    assert main(["fit", "--resume", str(run), *change, *callback]) == 2
    after = json.loads((run / "summary.json").read_text())
    assert after["status"] == "finished"
    assert after["metrics"] == before["metrics"]


@pytest.mark.parametrize("place", ["--run.id=b", "--run.dataset=x", "--trainer.default_root_dir=elsewhere"])
def test_a_name_for_the_run_folder_is_refused_where_there_is_one(run, capsys, place):
    assert place.split("=")[0] in refused(capsys, "fit", "--resume", run, place)


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    for position in range(int(len(content) * at), int(len(content) * at) + 64):
        content[position] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    "command",
    [["fit", "--resume", RUN], ["test", "--from", RUN], ["predict", "--from", RUN], ["export", RUN], ["export", LAST]],
    ids=lambda words: " ".join(map(str, words)),
)
def test_a_damaged_checkpoint_is_never_used_and_the_one_before_it_is_named(run, capsys, command):
    interrupt()
    flip(LAST)
    said = refused(capsys, *command)
    assert f"{LAST} is damaged" in said.replace(f"{Path.cwd()}/", "")
    assert str(PREVIOUS) in said
    flip(PREVIOUS)
    assert "previous" not in refused(capsys, *command)


def test_python_does_not_load_a_damaged_checkpoint(run):
    load(run)
    flip(LAST)
    with pytest.raises(UserError, match="damaged"):
        load(run)


def test_a_run_goes_on_from_its_previous_checkpoint_and_ends_the_same(run):
    expected, metrics = torch.load(LAST, weights_only=True)["state_dict"], (run / "metrics.csv").read_bytes()
    interrupt()
    flip(LAST)
    assert main(["fit", "--resume", str(run), f"--ckpt_path={PREVIOUS}"]) == 0
    found = torch.load(LAST, weights_only=True)["state_dict"]
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    assert (run / "metrics.csv").read_bytes() == metrics


def test_metrics_that_were_cut_are_refused(run, capsys):
    interrupt()
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:-3]))
    assert "metrics.csv" in refused(capsys, "fit", "--resume", run)


def test_a_run_killed_in_its_test_ends_with_each_row_once_also_where_it_was_moved_to(run):
    summary, metrics = json.loads((run / "summary.json").read_text()), (run / "metrics.csv").read_bytes()
    interrupt()
    (run / "checkpoints" / ".last.ckpt.77.part").touch()
    moved = Path("moved")
    run.rename(moved)
    best = (moved / "checkpoints" / "best.ckpt").read_bytes()
    assert main(["fit", "--resume", str(moved)]) == 0
    assert (moved / "metrics.csv").read_bytes() == metrics
    again = json.loads((moved / "summary.json").read_text())
    assert (again["status"], again["metrics"]) == ("finished", summary["metrics"])
    assert (moved / "checkpoints" / "best.ckpt").read_bytes() == best
    assert not list(moved.rglob("*.part"))


def test_a_run_killed_before_its_first_checkpoint_starts_anew_in_place(run):
    metrics = (run / "metrics.csv").read_bytes()
    interrupt(data=None)
    for path in run.iterdir():
        if path.name not in ("config.yaml", "summary.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["fit", "--resume", str(run)]) == 0
    assert (run / "metrics.csv").read_bytes() == metrics


def test_a_run_that_had_trained_does_not_start_anew_without_its_checkpoint(run, capsys):
    interrupt()
    LAST.unlink()
    assert "no checkpoint at" in refused(capsys, "fit", "--resume", run)


def test_a_run_that_another_process_works_in_is_left_alone(run, capsys):
    interrupt()
    with locked(run):
        for command in (["fit", "--resume", run], ["export", run]):
            assert "another process works in this run folder" in refused(capsys, *command)


def test_changes_are_allowed_only_to_a_run_that_is_there(run, capsys):
    assert "--resume" in refused(capsys, "fit", "--config=classifier/digits_small", "--allow-changes")
