"""One short run of every method through the real command line, read back from every place it writes to."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from smallest import words
from wandb_file import read_wandb

from leanlight.glossary import meaning
from leanlight.registry import METHODS
from leanlight.results.dashboard import describe
from leanlight.sharing.card import Origin, write_card

pytestmark = pytest.mark.xdist_group("contract_run")


@pytest.fixture(scope="module", params=list(METHODS))
def run(request, tmp_path_factory):
    """A run of a method's smallest config, two steps long, W&B offline."""
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "leanlight", "fit", *words(request.param)]
    limits = [
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
        "--trainer.limit_val_batches=2",
        "--trainer.limit_test_batches=2",
        "--trainer.check_val_every_n_epoch=1",
    ]
    more = ["--run.wandb=offline", "--run.id=short", "--trainer.log_every_n_steps=1"]
    done = subprocess.run([*command, *limits, *more], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = folder.glob(f"runs/{request.param}/*/short")
    return found


def test_the_run_folder_holds_what_the_design_names(run):
    for name in ("config.yaml", "metrics.csv", "summary.json", "checkpoints/last.ckpt", "wandb", "artifacts"):
        assert (run / name).exists(), name


def test_the_summary_says_what_was_run_and_what_came_out(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["seed"] == 0
    assert any(name.startswith("test/") for name in summary["metrics"])
    assert any(name.startswith("val/") for name in summary["metrics"])
    for key in ("config_hash", "code_hash", "machine", "wall_s", "peak_rss_mb", "samples_seen", "date"):
        assert summary[key], key
    assert summary["data"]["fingerprint"]
    paths = {item["path"] for item in summary["artifacts"]}
    assert "checkpoints/last.ckpt" in paths
    assert any(path.startswith("artifacts/export/") for path in paths)


def test_every_logged_name_is_split_slash_metric_and_in_the_docs_with_its_unit(run):
    with open(run / "metrics.csv", newline="") as file:
        names = csv.DictReader(file).fieldnames
    assert [name for name in names if not meaning(name)] == [], "docs/metrics.yaml: add them"
    for name in set(names) - {"step", "epoch"}:
        assert name.split("/")[0] in ("train", "val", "test", "progress"), name
    assert any(name.startswith("progress/") for name in names)


def test_a_dashboard_of_it_shows_what_it_has_logged_and_no_more(run):
    dashboard = describe(run)
    shown = {name for panels in dashboard.sections.values() for panel in panels for name in panel.metrics}
    with open(run / "metrics.csv", newline="") as file:
        columns = set(csv.DictReader(file).fieldnames)
    sent = read_wandb(next((run / "wandb").rglob("*.wandb")))["history"]
    assert shown <= columns | {name.removesuffix("/_type") for name in sent}
    assert shown >= {name for name in columns if name.startswith(("train/", "val/", "test/"))}
    assert dashboard.x in columns
    assert {"Judged by", "Pictures"} <= set(dashboard.sections)


def test_wandb_is_told_what_the_run_was_made_of(run):
    record = read_wandb(next((run / "wandb").rglob("*.wandb")))
    summary = json.loads((run / "summary.json").read_text())
    assert [name for name in record["used"] if name.startswith("data-")] == [f"data-{summary['data']['name']}"]
    assert len(record["used"]) == 1 + len(summary["inputs"])
    assert f"{summary['method']}-" in next(name for name in record["artifacts"] if name.endswith("-run"))


def test_the_saved_config_is_complete_and_runs_again(run):
    from leanlight.experiment import resolve

    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert "${" not in (run / "config.yaml").read_text()
    assert {"model", "data", "trainer", "run", "seed_everything"} <= set(saved)
    again = resolve("fit", ["--config", str(run / "config.yaml")])
    assert again["model"] == saved["model"]
    assert again["data"] == saved["data"]


def test_the_checkpoint_loads_without_trusting_it_and_rebuilds_the_module(run):
    from leanlight import load

    path = run / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True, map_location="cpu")
    module = load(path)
    for name, value in module.state_dict().items():
        assert torch.equal(value, saved["state_dict"][name]), name


def test_pictures_are_written(run):
    media = list((run / "artifacts" / "media").rglob("*.png"))
    assert media
    from PIL import Image

    for path in media:
        with Image.open(path) as image:
            assert min(image.size) >= 50, path
            drawn = image.convert("RGB").getcolors(maxcolors=2**24)
            assert max(count for count, _ in drawn) < 0.995 * image.width * image.height, f"{path} is blank"


def test_the_wandb_file_holds_config_metrics_media_and_artefact(run):
    record = read_wandb(next((run / "wandb").rglob("*.wandb")))
    assert (
        record["config"]["model"]["class_path"]
        == yaml.safe_load((run / "config.yaml").read_text())["model"]["class_path"]
    )
    assert record["config"]["trainer"]["limit_train_batches"] == 2
    assert any(name.startswith("train/") for name in record["history"])
    assert any(name.startswith("val/") for name in record["history"])
    assert any(name.startswith("progress/") for name in record["history"])
    kinds = [value for name, value in record["history"].items() if name.endswith("_type")]
    kinds += [value.get("_type") for value in record["history"].values() if isinstance(value, dict)]
    assert "image-file" in kinds
    assert record["artifacts"]
    assert record["metrics"]  # which unit of progress each chart runs over
    assert record["group"] == run.parent.parent.name


def test_the_exported_model_loads_in_plain_pytorch(run, tmp_path):
    code = """
import sys
for name in ("leanlight", "lit_modules", "datamodules", "callbacks", "lightning", "pytorch_lightning"):
    sys.modules[name] = None
from pathlib import Path
import torch
folder = Path(sys.argv[1])
programs = list(folder.glob("*.pt2"))
for path in programs:
    program = torch.export.load(path)
    example = program.example_inputs[0]
    outputs = torch.utils._pytree.tree_leaves(program.module()(*example))
    print("LOADED", path.name, len(outputs), all(bool(torch.isfinite(out).all()) for out in outputs))
from safetensors.torch import load_file
for path in folder.glob("*.safetensors"):
    print("WEIGHTS", len(load_file(path)))
"""
    command = [sys.executable, "-c", code, str(run / "artifacts" / "export")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "LOADED" in done.stdout or "WEIGHTS" in done.stdout
    assert "False" not in done.stdout


def test_its_card_reads_as_the_hub_s_and_what_it_shows_runs_without_the_suite(run, tmp_path):
    folder = shutil.copytree(run / "artifacts" / "export", tmp_path / "export")
    text = write_card(folder, Origin.of(run)).read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"]
    assert "leanlight" in front["tags"]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (shown, *_) = blocks
    if "FOLDER_OF_THE_BASE" in shown:  # of an adapter, whose base is the user's
        return
    hidden = "import sys\nfor name in ('leanlight', 'lit_modules', 'datamodules', 'callbacks', 'lightning'):\n"
    code = f"{hidden}    sys.modules[name] = None\n{shown}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_exported_is_the_trained_state(run):
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    trained = [value for value in saved.values() if value.is_floating_point() and value.numel() > 1]
    exported = [
        value for file in (run / "artifacts/export").rglob("*.safetensors") for value in load_file(file).values()
    ]
    assert exported
    assert all(value.numel() and value.float().isfinite().all() for value in exported)
    assert any(torch.equal(value, weight) for value in exported for weight in trained if value.shape == weight.shape)


def test_testing_a_finished_run_gives_the_same_figures(run):
    command = [sys.executable, "-m", "leanlight", "test", "--from", run, "--run.wandb=disabled"]
    done = subprocess.run(list(map(str, command)), cwd=run.parents[3], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    first = json.loads((run / "summary.json").read_text())["metrics"]
    (second_file,) = Path(run).glob("test*/summary.json")
    second = json.loads(second_file.read_text())["metrics"]
    same = [name for name in second if name.startswith("test/") and name in first]
    assert same
    for name in same:
        assert second[name] == pytest.approx(first[name], rel=1e-6), name
