"""`leanlight predict`: in pieces, resumed after a kill, from any part of the data, also as a stage of a pipeline."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from kill import kill_when, start

from leanlight.contracts import sha256_file
from leanlight.predictions import describe_predictions, load_predictions
from leanlight.registry import config_root

SLOW = '''
import json, os, time
from leanlight.contracts import Bars
from lit_modules.adq import SampleScorer
from lit_modules.classifier import ImageClassifier

class Slow(ImageClassifier):
    """Predicts slowly, and says its class in words, too."""
    def predict_step(self, batch, batch_idx):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        outputs = super().predict_step(batch, batch_idx)
        words = [self.evaluation.classes[i] for i in outputs["probabilities"].argmax(1)]
        return {**outputs, "word": words}

class SlowScorer(SampleScorer):
    """Scores items slowly."""
    def predict_step(self, batch, batch_idx):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        return super().predict_step(batch, batch_idx)

class Collecting(ImageClassifier):
    """Makes a file of what it predicted; slowly."""
    counts = None

    def collect(self, pieces, directory):
        (directory / "begun").touch()
        time.sleep(float(os.environ.get("PAUSE", 0)))
        assert [p["index"].tolist() for p in pieces()] == [p["index"].tolist() for p in pieces()]
        labels = [label for piece in pieces() for label in piece["label"].tolist()]
        self.counts = {str(label): labels.count(label) for label in range(10)}
        (directory / "counts.json").write_text(json.dumps(self.counts))
        return {"items": len(labels)}

    def media(self, split):
        return {"counts": Bars(self.counts, "items")} if self.counts else {}
'''
PIPELINE = {
    "method": "classifier",
    "dataset": "digits",
    "stages": [
        {"name": "train", "config": "config.yaml", "overrides": {"trainer.max_epochs": 1, "run.wandb": "disabled"}},
        {
            "name": "label",
            "command": "predict",
            "config": "config.yaml",
            "overrides": {
                "ckpt_path": "${stages.train.artifacts.checkpoint}",
                "run.wandb": "disabled",
                "predictions.piece_items": 32,
            },
        },
    ],
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with a slow classifier, trained for an epoch."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "slow.py").write_text(SLOW)
    config = yaml.safe_load((config_root() / "classifier" / "digits_small.yaml").read_text())
    config["model"]["class_path"] = "slow.Slow"
    config["data"]["init_args"]["eval_batch_size"] = 16
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"run": {"method": "slow"}}))
    (folder / "pipeline.yaml").write_text(json.dumps(PIPELINE))
    done = call(folder, "fit", "--config=config.yaml", "--trainer.max_epochs=1", "--run.id=a", "--run.wandb=disabled")
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def call(folder, *arguments, **options):
    command = [sys.executable, "-m", "leanlight", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, **options)


def killed(folder, pattern, *arguments, found="predictions/*_0.json", count=2, pause="0.2"):
    """Start a command that is slow, and kill it with all its children once some artefacts are there: two pieces."""
    kill_when(
        start(folder, *arguments, PAUSE=pause),
        folder,
        lambda: len(list(folder.glob(f"{pattern}/artifacts/{found}"))) >= count,
    )


def same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]) if isinstance(value, torch.Tensor) else value == right[name], name


@pytest.fixture(scope="module")
def whole(project):
    done = call(project, "predict", "--from=runs/slow/digits/a", "--trust=slow", "--run.wandb=disabled")
    assert done.returncode == 0, done.stderr[-2000:]
    return load_predictions(project / "runs/slow/digits/a/predict")


FROM = ["--from=runs/slow/digits/a", "--trust=slow", "--run.wandb=disabled"]


def test_predictions_hold_tensors_and_text_of_every_item_once(whole):
    assert torch.equal(whole["index"], torch.arange(360))
    assert whole["probabilities"].shape == (360, 10)
    assert whole["word"] == tuple(str(int(i)) for i in whole["probabilities"].argmax(1))


def test_predictions_say_which_weights_made_them_and_those_of_others_are_not_gone_on_with(project, whole, tmp_path):
    run, last = project / "runs/slow/digits/a/predict", project / "runs/slow/digits/a/checkpoints/last.ckpt"
    assert describe_predictions(run)["weights"] == sha256_file(last)
    copy, other = tmp_path / "predict", tmp_path / "other.ckpt"
    shutil.copytree(run, copy)
    saved = torch.load(last, weights_only=True)
    torch.save({**saved, "epoch": saved["epoch"] + 1}, other)
    done = call(project, "predict", "--resume", str(copy), "--trust=slow", f"--ckpt_path={other}")
    assert done.returncode == 2
    assert "other weights" in done.stderr


def test_a_killed_predict_goes_on_where_it_was(project, whole):
    killed(project, "runs/slow/digits/a/predict-*", "predict", *FROM, "--predictions.piece_items=32")
    (run,) = project.glob("runs/slow/digits/a/predict-*")
    pieces = {path: path.stat().st_mtime_ns for path in run.glob("artifacts/predictions/*_0.json")}
    assert 0 < 32 * len(pieces) < 360
    done = call(project, "predict", "--resume", str(run), "--trust=slow")
    assert done.returncode == 0, done.stderr[-2000:]
    same(load_predictions(run), whole)
    assert all(path.stat().st_mtime_ns == written for path, written in pieces.items())
    assert describe_predictions(run)["items"] == 360


@pytest.mark.parametrize("fitted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_killed_scores_go_on_to_the_same_bits(project, fitted):
    """Of a network that is only made, too: it, the crops and their order are functions of the seed."""
    config = yaml.safe_load((config_root() / "adq" / "digits_small.yaml").read_text())
    config["model"]["class_path"] = "slow.SlowScorer"
    config["data"]["init_args"]["eval_batch_size"] = 16
    config["run"] = {"method": f"scorer{fitted}", "wandb": "disabled"}
    (project / f"scorer{fitted}.yaml").write_text(yaml.safe_dump(config))
    start = [f"--config=scorer{fitted}.yaml", "--predictions.piece_items=32"]
    if fitted:
        done = call(project, "fit", f"--config=scorer{fitted}.yaml", "--trainer.max_epochs=2", "--run.id=fit")
        assert done.returncode == 0, done.stderr[-2000:]
        start += [f"--ckpt_path=runs/scorer{fitted}/digits/fit/checkpoints/last.ckpt"]
    done = call(project, "predict", *start, "--run.id=whole")
    assert done.returncode == 0, done.stderr[-2000:]
    killed(project, f"runs/scorer{fitted}/digits/killed", "predict", *start, "--run.id=killed")
    run = project / f"runs/scorer{fitted}/digits/killed"
    assert 0 < len(list(run.glob("artifacts/predictions/*_0.json"))) < 1293 / 32
    done = call(project, "predict", "--resume", str(run), "--trust=slow")
    assert done.returncode == 0, done.stderr[-2000:]
    expected = load_predictions(project / f"runs/scorer{fitted}/digits/whole")
    assert ("train_margin" in expected) == fitted
    same(load_predictions(run), expected)


@pytest.mark.slow
def test_a_killed_predict_stage_of_a_pipeline_goes_on_where_it_was(project):
    killed(project, "runs/classifier/digits/pipeline-label-*", "run", "pipeline.yaml")
    (run,) = project.glob("runs/classifier/digits/pipeline-label-*")
    pieces = {path: path.stat().st_mtime_ns for path in run.glob("artifacts/predictions/*_0.json")}
    done = call(project, "run", "pipeline.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "label: resume (running, with predictions)" in done.stdout
    assert torch.equal(load_predictions(run)["index"], torch.arange(360))
    assert all(path.stat().st_mtime_ns == written for path, written in pieces.items())


def test_another_part_of_the_data_can_be_predicted(project):
    before = set(project.glob("runs/slow/digits/a/predict-*"))
    done = call(project, "predict", *FROM, "--data.init_args.predict_split=val")
    assert done.returncode == 0, done.stderr[-2000:]
    (run,) = set(project.glob("runs/slow/digits/a/predict-*")) - before
    assert describe_predictions(run)["split"] == "val"
    assert len(load_predictions(run)["index"]) == 144


def test_a_run_of_fit_cannot_be_resumed_as_a_prediction(project):
    done = call(project, "predict", "--resume", "runs/slow/digits/a", "--trust=slow")
    assert done.returncode == 2
    assert "is no run of predict" in done.stderr


@pytest.fixture(scope="module")
def collecting(project):
    config = yaml.safe_load((project / "config.yaml").read_text())
    config["model"]["class_path"] = "slow.Collecting"
    (project / "collecting.yaml").write_text(yaml.safe_dump(config | {"run": {"method": "collecting"}}))
    return ["predict", "--config=collecting.yaml", "--predictions.piece_items=32"]


def test_a_killed_collection_is_made_of_all_predictions_when_the_run_goes_on(project, collecting):
    killed(project, "runs/collecting/digits/a", *collecting, "--run.id=a", found="bank/begun", count=1, pause="100")
    run = project / "runs/collecting/digits/a"
    pieces = {path: path.stat().st_mtime_ns for path in run.glob("artifacts/predictions/*_0.json")}
    assert sorted(path.name for path in (run / "artifacts/bank").iterdir()) == ["begun"]
    done = call(project, "predict", "--resume", str(run), "--trust=slow")
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(path.stat().st_mtime_ns == written for path, written in pieces.items())
    labels = load_predictions(run)["label"].tolist()
    made = json.loads((run / "artifacts/bank/counts.json").read_text())
    assert made == {str(label): labels.count(label) for label in range(10)}
    assert sum(made.values()) == 360
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert "artifacts/bank/counts.json" in [item["path"] for item in summary["artifacts"]]
    assert summary["metrics"]["predict/items"] == 360
    assert "predict/items" in (run / "metrics.csv").read_text()
    assert (run / "artifacts/media/test/counts.png").is_file()
    sent = [path.read_bytes() for path in run.glob("wandb/offline-run-*/run-*.wandb")]  # a file a process
    assert any(b"media/images/test/counts" in content for content in sent)


@pytest.mark.parametrize("cut", ["--trainer.limit_predict_batches=1", "--trainer.limit_predict_batches=0.5"])
def test_a_part_of_the_predictions_is_not_collected(project, collecting, cut):
    done = call(project, *collecting, f"--run.id=cut{cut[-1]}", "--run.wandb=disabled", cut)
    assert done.returncode == 0, done.stderr[-2000:]
    artifacts = project / f"runs/collecting/digits/cut{cut[-1]}/artifacts"
    assert (artifacts / "predictions").is_dir()
    assert not (artifacts / "bank").exists()
