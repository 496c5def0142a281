"""What TiCAL does on digits cut into three strips, where every conflict and every strip's own class is known."""

import functools
import warnings
from statistics import mean

import lightning.pytorch as pl
import pytest
import torch

from datamodules import EmotionDataModule
from lit_modules.tical import (
    AttentionFusion,
    ConsistencyAssessment,
    EmotionRecognition,
    Encoding,
    SoftStages,
    ThreeStages,
    Unimodal,
)

SEEDS = range(3)
ENCODING = Encoding(dim=64)
NETWORKS = {
    "attention": functools.partial(AttentionFusion, encoding=ENCODING),
    "middle": functools.partial(Unimodal, modality="middle", encoding=ENCODING),
    "tical": functools.partial(ThreeStages, encoding=ENCODING),
    "soft": functools.partial(SoftStages, encoding=ENCODING),
}
ASSESSMENTS = {"tical": "paper", "soft": "soft"}


@functools.cache
def measured(row):
    """Test metrics of a row after 15 epochs, a mean over seeds."""
    found = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        reading = ASSESSMENTS.get(row)
        assessment = reading and ConsistencyAssessment(reading=reading, dim=16, length=512, warmup_epochs=2)
        adam = functools.partial(torch.optim.Adam, lr=0.002)
        module = EmotionRecognition(NETWORKS[row], assessment, optimizer=adam, seed=seed)
        data = EmotionDataModule("planted", batch_size=32, seed=seed)
        quiet = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "limit_val_batches"), 0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = pl.Trainer(accelerator="cpu", max_epochs=15, **quiet)
            trainer.fit(module, datamodule=data)
            (tested,) = trainer.test(module, datamodule=data, verbose=False)
        found.append(tested)
    return {name: mean(each[name] for each in found) for name in found[0]}


@pytest.mark.slow
def test_several_strips_say_more_than_one():
    assert measured("attention")["test/accuracy"] > measured("middle")["test/accuracy"] + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("row", ["attention", "tical"])
def test_conflicts_cost_accuracy(row):
    # On digits TiCAL gives none of it back; the table on MNIST has where it does.
    assert measured(row)["test/accuracy_conflicted"] < measured(row)["test/accuracy_agreeing"] - 0.15


@pytest.mark.slow
@pytest.mark.parametrize(("row", "least"), [("tical", 0.52), ("soft", 0.55)])
def test_consistency_finds_conflicts_that_nobody_told_it_of(row, least):
    assert measured(row)["test/conflict_auroc"] > least


@pytest.mark.slow
@pytest.mark.parametrize("row", ["tical", "soft"])
def test_pseudo_labels_recover_the_class_of_a_foreign_strip(row):
    # The one label of the clip, which all modalities are taught, is wrong on every foreign strip; chance is a tenth.
    assert measured(row)["test/pseudo_accuracy"] > 0.3
