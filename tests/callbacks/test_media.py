import csv
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch.utils.data import DataLoader

from callbacks import ExportArtifact, MediaLogger, ThroughputMonitor
from callbacks.pictures import render
from leanlight.contracts import (
    Animation,
    Bars,
    Curve,
    Heatmap,
    Histogram,
    ImageGrid,
    PrimaryMetric,
    Progress,
    Scatter,
    Table,
)

PICTURES = {
    "grid": ImageGrid(torch.rand(7, 3, 8, 8), columns=3, captions=["a → b"] * 7),
    "large": ImageGrid(torch.rand(2, 1, 100, 90)),
    "curve": Curve([1, 2, 3], {"a": [0.1, 0.2, 0.3], "b": [1, 2, 3]}, "step", "loss", log_y=True),
    "histogram": Histogram({"a": torch.randn(50), "with gaps": torch.tensor([1.0, float("nan")])}, "score"),
    "constant": Histogram({"a": torch.ones(5)}, "score"),
    "heatmap": Heatmap(torch.rand(3, 4), "x", "y", rows=["r1", "r2", "r3"]),
    "scatter": Scatter({"one": torch.rand(9, 2), "other": torch.zeros(0, 2)}, "x", "y"),
    "bars": Bars({"first": 1.0, "second": 2.5}, "spikes"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_every_kind_of_picture_opens(tmp_path, name):
    path = render(PICTURES[name], tmp_path / "v1.0", "Title")
    assert path == tmp_path / "v1.0.png"
    with Image.open(path) as image:
        image.load()
        assert min(image.size) >= 60
    assert list(tmp_path.iterdir()) == [path]


def test_grid_shows_the_pixels_it_was_given(tmp_path):
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    path = render(ImageGrid(colours[:, :, None, None].expand(2, 3, 4, 4)), tmp_path / "grid", "")
    with Image.open(path) as image:
        counts = {colour: count for count, colour in image.getcolors(2**20)}
    assert counts[(255, 0, 0)] == counts[(0, 0, 255)] == 64 * 64


def test_a_band_is_drawn_around_its_curve(tmp_path):
    line = {"score": [1.0, 2.0, 3.0]}
    plain = Curve([1, 2, 3], line, "step", "score")
    banded = Curve([1, 2, 3], line, "step", "score", bands={"score": ([0.0, 1.0, 2.0], [2.0, 3.0, 4.0])})
    pictures = [render(item, tmp_path / str(i), "x").read_bytes() for i, item in enumerate((plain, banded))]
    assert pictures[0] != pictures[1]


def test_animation_has_all_its_frames(tmp_path):
    frames = torch.arange(5).view(5, 1, 1, 1).expand(5, 1, 6, 6) / 5
    with Image.open(render(Animation(frames, fps=4), tmp_path / "film", "")) as image:
        assert image.n_frames == 5
        assert image.info["duration"] == 250


def test_table_reads_back(tmp_path):
    path = render(Table(("name", "value"), [("a, b", 1.5), ("ç", 2)]), tmp_path / "table", "")
    with open(path, newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["name", "value"], ["a, b", "1.5"], ["ç", "2"]]


class Module(pl.LightningModule):
    """Draws random numbers where it should not."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.asked, self.draws = [], []

    primary_metric = PrimaryMetric("val/loss", "min")

    def progress(self):
        return Progress("round", self.global_step)

    def media(self, split):
        self.asked.append((split, self.current_epoch))
        torch.rand(3)
        return {"noise": ImageGrid(torch.rand(2, 1, 4, 4)), "facts": Table(("a",), [(1,)])}

    def export(self, directory):
        torch.rand(3)
        (directory / "weight.txt").write_text(str(self.weight.item()))
        return [directory / "weight.txt"]

    def training_step(self, batch, batch_idx):
        self.draws.append(torch.rand(()).item())
        return self.weight * batch.sum()

    def validation_step(self, batch, batch_idx):
        pass

    test_step = predict_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, *callbacks, module=None, logger=False, **settings):
    torch.manual_seed(3)
    trainer = pl.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 4} | settings,
    )
    module = module or Module()
    loader = DataLoader([torch.ones(2)] * 3, batch_size=None)
    trainer.fit(module, loader, loader)
    return module, trainer, loader


def test_pictures_come_from_due_validations_the_last_one_train_end_and_test(tmp_path):
    module, trainer, loader = fit(tmp_path, MediaLogger(every_n_epochs=3, keep_history=True))
    trainer.test(module, loader, verbose=False)
    assert module.asked == [("val", 2), ("val", 3), ("train", 4), ("test", 4)]
    media = tmp_path / "artifacts" / "media"
    for split in ("train", "val", "test"):
        assert (media / split / "noise.png").is_file()
        assert (media / split / "facts.csv").is_file()
    assert {path.name for path in (media / "val" / "noise").iterdir()} == {"9.png", "12.png"}


def test_a_prediction_draws_too(tmp_path):
    module, trainer, loader = fit(tmp_path, MediaLogger(every_n_epochs=0))
    trainer.predict(module, loader, return_predictions=False)
    assert module.asked == [("train", 4), ("test", 4)]


def test_drawing_and_exporting_leave_the_random_states_alone(tmp_path):
    with_media, *_ = fit(tmp_path, MediaLogger(), ExportArtifact())
    without, *_ = fit(tmp_path)
    assert with_media.draws == without.draws


def test_modules_without_pictures_and_trial_runs_write_nothing(tmp_path):
    fit(tmp_path, MediaLogger(), ExportArtifact(), ThroughputMonitor(), fast_dev_run=True)
    assert not list(tmp_path.iterdir())


class Run:
    """Stands for a W&B run."""

    id, sent, artifacts = "my run", [], []

    def log(self, values, **_):
        self.sent.append(values)

    def log_artifact(self, artifact, aliases):
        self.artifacts.append((artifact, aliases))

    def __getattr__(self, name):
        return lambda *_, **__: None


@pytest.fixture
def wandb_logger(monkeypatch):
    run = Run()
    run.sent, run.artifacts = [], []
    monkeypatch.setattr(WandbLogger, "experiment", property(lambda self: run))
    return WandbLogger(offline=True), run


def test_pictures_and_tables_go_to_wandb(tmp_path, wandb_logger):
    import wandb

    logger, run = wandb_logger
    fit(tmp_path, MediaLogger(), logger=logger, max_epochs=1)
    sent = {name: value for values in run.sent for name, value in values.items()}
    assert isinstance(sent["val/noise"], wandb.Image)
    assert isinstance(sent["val/facts"], wandb.Table)


def test_export_is_written_at_the_end_and_becomes_a_model_artifact(tmp_path, wandb_logger):
    logger, run = wandb_logger
    module, _, _ = fit(tmp_path, ExportArtifact(aliases=["best"]), logger=logger)
    assert float((tmp_path / "artifacts/export/weight.txt").read_text()) == pytest.approx(module.weight.item())
    ((artifact, aliases),) = run.artifacts
    assert (artifact.type, artifact.name, aliases) == ("model", "Module-export", ["best"])
    assert set(artifact.manifest.entries) == {"weight.txt"}
    assert artifact.metadata["progress"] == {"round": 12}


class Plain(pl.LightningModule):
    """Only what Lightning asks for."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * batch.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Draws(Plain):
    def media(self, split):
        return {"table": Table(("a",), [(1,)])}


class Exports(Plain):
    def export(self, directory):
        (directory / "weight.txt").write_text(str(self.weight.item()))
        return [directory / "weight.txt"]


@pytest.mark.parametrize(
    ("kind", "written"),
    [(Plain, []), (Draws, ["media/train/table.csv", "media/train/table/6.csv"]), (Exports, ["export/weight.txt"])],
)
def test_a_module_offers_what_it_has(tmp_path, wandb_logger, kind, written):
    logger, run = wandb_logger
    callbacks = [MediaLogger(keep_history=True), ExportArtifact()]
    fit(tmp_path, *callbacks, module=kind(), logger=logger, max_epochs=2)
    artifacts = tmp_path / "artifacts"
    assert sorted(str(path.relative_to(artifacts)) for path in artifacts.rglob("*.*")) == written
    assert [artifact.metadata["progress"] for artifact, _ in run.artifacts] == [{"step": 6}] * (kind is Exports)


def test_failed_run_exports_nothing(tmp_path):
    class Fail(pl.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, ExportArtifact(), Fail())
    assert not Path(tmp_path / "artifacts").exists()


def test_a_histogram_takes_the_edges_it_is_given(tmp_path):
    values = torch.tensor([0.0, 1.0, 1.0, 2.0])
    three = Histogram({"a": values}, "class", bins=3)
    edges = Histogram({"a": values}, "class", bins=[-0.5, 0.5, 1.5, 2.5])
    pictures = [render(item, tmp_path / str(i), "x").read_bytes() for i, item in enumerate((three, edges))]
    assert pictures[0] != pictures[1]


def test_drawing_loads_no_lightning():
    code = "import sys, callbacks.pictures; print({'lightning', 'wandb', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "set()", done.stderr
