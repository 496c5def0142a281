"""Trackers that die and disks that fill up in the middle of a real run: nothing of the run is lost."""

import csv
import json
import resource
import time

import pytest
import torch
from kill import finish, kill_when, rows, run_dir, start
from smallest import words
from wandb_file import records
from wandb_server import WandbServer

pytestmark = pytest.mark.slow

COMMON = [
    *("--trainer.max_epochs=3", "--trainer.log_every_n_steps=1", "--exact_resume.every=3", "--run.id=a"),
    *("--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
]
ALONE, FIT = ["--config=logger/none"], ["fit", *words("classifier"), *COMMON]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run without trackers that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(folder, *FIT, *ALONE))
    return run_dir(folder)


def assert_same(run, expected):
    """Metrics byte for byte, weights, and what the summary says."""
    assert (run / "metrics.csv").read_bytes() == (expected / "metrics.csv").read_bytes()
    weights, again = (torch.load(x / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for x in (expected, run))
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    told, again = (json.loads((x / "summary.json").read_text()) for x in (expected, run))
    assert (again["status"], again["metrics"]) == ("finished", told["metrics"])


def warnings(process):
    """Lines of warning of a process that ends well."""
    _, error = process.communicate(timeout=280)
    assert process.returncode == 0, error.decode()[-3000:]
    return [line for line in error.decode().splitlines() if line.startswith("leanlight: warning")]


def wait_for(process, condition):
    """Wait until something holds while a process runs."""
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        time.sleep(0.005)


@pytest.mark.parametrize("breaks", ["die", "fall_silent"])
def test_a_run_outlives_the_server_of_wandb(tmp_path, undisturbed, breaks):
    server = WandbServer()
    settings = {"BASE_URL": server.address, "API_KEY": "0" * 40, "FINISH_TIMEOUT": "5", "MODE": "online"}
    process = start(tmp_path, *FIT, "--run.wandb=online", **{f"WANDB_{name}": x for name, x in settings.items()})
    wait_for(process, lambda: rows(tmp_path) > 2)
    getattr(server, breaks)()
    told = warnings(process)
    assert server.asked["UpsertBucket"]
    assert_same(run_dir(tmp_path), undisturbed)
    assert len(told) == 2
    assert "no more tables and artefacts" in told[0]
    assert "later: wandb sync" in told[1]
    (kept,) = run_dir(tmp_path).glob("wandb/run-*/run-*.wandb")
    items = [item for record in records(kept) for item in record.history.item]
    losses = [json.loads(item.value_json) for item in items if (item.key or item.nested_key[0]) == "train/loss"]
    assert losses == [float(row["train/loss"]) for row in logged(run_dir(tmp_path))]


def logged(run):
    """Rows of training in ``metrics.csv``."""
    with open(run / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["train/loss"]]


def kill_and_resume(folder, tracker):
    """A run with a tracker, killed after its first checkpoint and resumed; the run folder."""
    process = start(folder, *FIT, *ALONE, f"--config=logger/{tracker}")
    kill_when(process, folder, lambda: rows(folder) > 30 and list(folder.rglob("last.ckpt")))
    finish(start(folder, "fit", "--resume", run_dir(folder)))
    return run_dir(folder)


def test_tensorboard_goes_on_where_a_run_was_killed(tmp_path, undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = kill_and_resume(tmp_path, "tensorboard")
    assert_same(run, undisturbed)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert {event.step for event in events.Scalars("train/loss")} == {int(row["step"]) for row in logged(run)}
    pictures = {path.name for path in (run / "artifacts/media/val").glob("*.png")}
    assert {f"val/{name.removesuffix('.png')}" for name in pictures} <= set(events.Tags()["images"])


def test_a_killed_run_goes_on_in_the_same_run_of_mlflow(tmp_path, undisturbed, monkeypatch):
    client = pytest.importorskip("mlflow.tracking", reason="needs the extra tracking").MlflowClient
    run = kill_and_resume(tmp_path, "mlflow")
    assert_same(run, undisturbed)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = client((run / "mlflow").as_uri())
    (experiment,) = store.search_experiments(filter_string="name = 'leanlight'")
    (found,) = store.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    points = store.get_metric_history(found.info.run_id, "train/loss")
    assert {point.step for point in points} == {int(row["step"]) for row in logged(run)}
    pictures = {path.name for path in (run / "artifacts/media/val").glob("*.png")}
    assert {item.path.rpartition("/")[2] for item in store.list_artifacts(found.info.run_id, "media/val")} == pictures


def test_a_store_of_mlflow_that_breaks_costs_a_line(tmp_path, undisturbed):
    pytest.importorskip("mlflow", reason="needs the extra tracking")
    process = start(tmp_path, *FIT, *ALONE, "--config=logger/mlflow")
    wait_for(process, lambda: rows(tmp_path) > 2)
    store = run_dir(tmp_path) / "mlflow"
    store.rename(tmp_path / "gone")
    store.touch()
    told = warnings(process)
    assert_same(run_dir(tmp_path), undisturbed)
    (line,) = told
    assert "MLflow gets no more" in line


def test_a_run_that_a_full_disk_ended_goes_on_when_there_is_room(tmp_path, undisturbed):
    process = start(tmp_path, *FIT, *ALONE)
    wait_for(process, lambda: rows(tmp_path) > 30)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (8192, 8192))  # room for a summary, for no checkpoint
    _, error = process.communicate(timeout=280)
    run = run_dir(tmp_path)
    assert process.returncode == 1
    (line,) = error.decode().splitlines()
    assert line.startswith("leanlight: error: cannot write (the disk is full, or a limit on sizes is reached)")
    assert line.endswith(f"go on with: leanlight fit --resume {run}")
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    assert not list(run.rglob("*.part"))
    finish(start(tmp_path, "fit", "--resume", run))
    assert_same(run, undisturbed)
