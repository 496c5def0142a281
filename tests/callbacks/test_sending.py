"""Loggers that show pictures get them, and none of them stops a run."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import Logger, MLFlowLogger
from torch.utils.data import DataLoader

from callbacks import MediaLogger
from callbacks.sending import as_table, attempt, keep_from_stopping, send_artifact, send_media
from leanlight.contracts import Animation, Bars, Curve, Heatmap, ImageGrid, Table
from leanlight.loggers import RunCSVLogger, RunTensorBoardLogger


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        loss = (self.weight - batch.mean()) ** 2
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def media(self, split):
        return {"grid": ImageGrid(torch.rand(3, 1, 8, 8))}


class Broken(Logger):
    """Fails in whatever is asked of it."""

    name, version = "broken", "0"
    asked = 0

    def log_metrics(self, *_, **__):
        self.asked += 1
        raise ConnectionError("no route\nto the host")

    log_hyperparams = save = finalize = log_metrics


def fit(folder, *loggers, callbacks=()):
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_epochs=2,
        log_every_n_steps=1,
        accelerator="cpu",
        logger=list(loggers),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Module(), DataLoader(torch.ones(6), batch_size=2))


def test_a_broken_logger_costs_one_line_and_is_asked_no_more(tmp_path, capsys):
    broken, table = keep_from_stopping(Broken()), RunCSVLogger(tmp_path)
    fit(tmp_path, broken, table)
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("leanlight: warning")]
    assert told == ["leanlight: warning: Broken gets no more data of this run (ConnectionError: no route to the host)"]
    assert broken.asked == 1
    assert len(table.path.read_text().splitlines()) == 1 + 6  # every step, and names


def test_what_fails_for_pictures_leaves_metrics_alone(capsys):
    logger = Broken()

    def fail():
        raise PermissionError("read-only home")

    assert attempt(logger, "pictures", fail) is None
    assert attempt(logger, "metrics", lambda: 7) == 7
    assert attempt(logger, "pictures", lambda: 7) is None
    assert capsys.readouterr().err.count("\n") == 1


def test_what_takes_no_metrics_is_asked_for_nothing_more(capsys):
    logger = Broken()

    def fail():
        raise NotADirectoryError("the store is gone")

    assert attempt(logger, "metrics", fail) is None
    assert attempt(logger, "pictures", lambda: 7) is None
    assert capsys.readouterr().err.count("\n") == 1


def test_tensorboard_has_scalars_and_the_very_pictures_inside_the_run_folder(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "a run, größer"
    logger = RunTensorBoardLogger(run)
    fit(run, logger, callbacks=[MediaLogger()])
    moving = Animation(torch.rand(3, 1, 8, 8))
    from callbacks.pictures import render

    files = {"film": render(moving, run / "film", "film"), "facts": render(Table(("a",), [(1,)]), run / "facts", "")}
    send_media([logger], "test", {"film": moving, "facts": Table(("a",), [(1,)])}, files, 6)
    logger.save()
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(6))
    (picture,) = events.Images("train/grid")
    assert picture.encoded_image_string == (run / "artifacts/media/train/grid.png").read_bytes()
    assert events.Images("test/film")[0].encoded_image_string == files["film"].read_bytes()
    assert b"|1" in events.Tensors("test/facts/text_summary")[0].tensor_proto.string_val[0].replace(b"\n", b"|")
    assert sorted(path.name for path in run.iterdir()) == ["artifacts", "facts.csv", "film.gif", "tensorboard"]


class Client:
    """Stands in for MLflow's client."""

    def __init__(self):
        self.sent = []

    def log_artifact(self, run_id, local, folder):
        self.sent.append((run_id, local, folder))


def test_mlflow_gets_pictures_and_exports_by_folder(tmp_path, monkeypatch):
    client = Client()
    monkeypatch.setattr(MLFlowLogger, "experiment", client)
    monkeypatch.setattr(MLFlowLogger, "run_id", "r")
    logger = object.__new__(MLFlowLogger)
    picture, weights = tmp_path / "grid.png", tmp_path / "weights.txt"
    send_media([logger], "val", {"grid": ImageGrid(torch.rand(1, 1, 8, 8))}, {"grid": picture}, 1)
    send_artifact([logger], "title", {"inner/weights.txt": weights}, {}, ["latest"])
    assert client.sent == [("r", str(picture), "media/val"), ("r", str(weights), "export/inner")]


@pytest.mark.parametrize(
    ("item", "columns", "rows"),
    [
        (Curve([1, 2], {"a": [3.0, 4.0]}, "step", "loss"), ("step", "a"), [(1, 3.0), (2, 4.0)]),
        (Bars({"cat": 0.5}, "share"), ("name", "share"), [("cat", 0.5)]),
        (
            Heatmap(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "predicted", "true", ["x", "y"], ["x", "y"]),
            ("true", "predicted", "value"),
            [("x", "x", 1.0), ("x", "y", 2.0), ("y", "x", 3.0), ("y", "y", 4.0)],
        ),
    ],
)
def test_the_numbers_behind_a_picture_are_a_table(item, columns, rows):
    table = as_table(item)
    assert tuple(table.columns) == columns
    assert list(table.rows) == rows


def test_a_picture_of_pixels_has_no_table():
    assert as_table(ImageGrid(torch.rand(1, 1, 8, 8))) is None
