"""Trainer and plain loop do the same work."""

import functools
import json

import lightning.pytorch as pl
import pytest
import torch

from datamodules import ImageDataModule
from leanlight.benchmarks.probe import StepProbe
from lit_modules.classifier import ImageClassifier
from lit_modules.classifier.reference import BareClassifierStep
from lit_modules.nn import ConvNet

NETWORK = functools.partial(ConvNet, in_channels=1, image_size=28, width=4, depth=2)


@pytest.fixture(scope="module")
def data():
    module = ImageDataModule(variant="subset", batch_size=64, train_fraction=0.2, seed=0)
    module.setup()
    return module


class SlowerLearner(BareClassifierStep):
    """A step that is not the same: another learning rate."""

    def __init__(self, module):
        super().__init__(module)
        self.optimizer.param_groups[0]["lr"] *= 0.5


class Watcher(pl.Callback):
    def on_train_batch_end(self, *_):
        pass


def probed(tmp_path, data, bare_step="lit_modules.classifier.reference:BareClassifierStep"):
    output = tmp_path / "times.json"
    trainer = pl.Trainer(
        max_steps=8,
        max_epochs=-1,
        limit_val_batches=0,
        callbacks=[StepProbe(output, bare_step, warmup=2), Watcher()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    torch.manual_seed(0)
    module = ImageClassifier(NETWORK)
    trainer.fit(module, datamodule=data)
    return json.loads(output.read_text())


def test_trainer_and_plain_loop_end_with_the_same_weights(tmp_path, data):
    report = probed(tmp_path, data)
    assert report["equal"]
    assert len(report["cycle"]) == len(report["bare"]) == len(report["outside"]) == 6
    assert {name: len(values) for name, values in report["hooks"].items()} == {"Watcher": 6}
    assert all(outside <= cycle for outside, cycle in zip(report["outside"], report["cycle"], strict=True))


def test_the_probe_notices_a_plain_loop_that_does_other_work(tmp_path, data):
    assert not probed(tmp_path, data, f"{__name__}:SlowerLearner")["equal"]
