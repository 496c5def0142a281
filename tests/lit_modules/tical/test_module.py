"""Emotion recognition around its networks and assessments: what it trains, measures, keeps, tells and refuses."""

import csv
from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer

from datamodules import EmotionDataModule, PlantedConflicts
from leanlight.contracts import UserError
from lit_modules.tical import (
    MISA,
    AttentionFusion,
    ConsistencyAssessment,
    EmotionRecognition,
    Encoding,
    Geometry,
    LateFusion,
    LowRankFusion,
    MulT,
    SelfMM,
    SoftStages,
    TensorFusion,
    ThreeStages,
    Unimodal,
)

SMALL = PlantedConflicts(train=60, val=20, test=30)
SIZE = Encoding(dim=8, dropout=0.1, layers=1, heads=2)
STAGES = partial(ThreeStages, encoding=SIZE)
TICAL = ConsistencyAssessment(dim=4, length=20, warmup_epochs=1, theta=0.12)


def make_data(**more):
    return EmotionDataModule("planted", **{"planted": SMALL, "batch_size": 16, **more})


def make_trainer(folder, **more):
    options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=folder, **{**options, **quiet, **more})


def make(network=STAGES, assessment=TICAL, **options):
    optimizer = partial(torch.optim.Adam, lr=0.01)
    return EmotionRecognition(network, assessment, **{"optimizer": optimizer, **options})


def fit(folder, network=STAGES, assessment=TICAL, trainer=None, data=None, **options):
    pl.seed_everything(3)
    module = make(network, assessment, **options)
    trainer = trainer or make_trainer(folder)
    trainer.fit(module, data or make_data())
    return module, trainer


BASELINES = {
    "late": partial(LateFusion, encoding=SIZE),
    "attention": partial(AttentionFusion, encoding=SIZE),
    "tensor": partial(TensorFusion, encoding=SIZE),
    "low_rank": partial(LowRankFusion, encoding=SIZE),
    "mult": partial(MulT, dim=8, heads=2, levels=1, memory_levels=1),
    "misa": partial(MISA, encoding=SIZE),
    "self_mm": partial(SelfMM, encoding=SIZE),
    "left": partial(Unimodal, modality="left", encoding=SIZE),
}


@pytest.mark.parametrize("name", BASELINES)
def test_every_fusion_trains_and_is_measured_without_an_assessment(tmp_path, name):
    module, trainer = fit(tmp_path, BASELINES[name], None)
    seen = trainer.callback_metrics
    assert torch.isfinite(seen["train/loss"])
    for metric in ("accuracy", "uar", "weighted_f1", "accuracy_agreeing", "accuracy_conflicted"):
        assert 0 <= seen[f"val/{metric}"] <= 1, metric
    assert "val/consistency" not in seen
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer.test(module, make_data(), verbose=False)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


ASSESSED = {
    "paper": {},
    "batch range": {"assessment": ConsistencyAssessment(dim=4, length=20, warmup_epochs=0, typicality_range="batch")},
    "soft": {
        "network": partial(SoftStages, encoding=SIZE),
        "assessment": ConsistencyAssessment("soft", dim=4, length=20, warmup_epochs=1),
    },
    "lorentz": {"assessment": ConsistencyAssessment(geometry=Geometry("lorentz"), dim=4, length=20, warmup_epochs=1)},
    "two stages": {"network": partial(ThreeStages, encoding=SIZE, stages=2)},
    "attention": {"network": partial(AttentionFusion, encoding=SIZE)},
    "without tree": {"tree_weight": 0.0},
    "ordinal": {"tree": "ordinal"},
    "missing": {"missing": {"middle": 0.4}},
}


@pytest.mark.parametrize("name", ASSESSED)
def test_clips_are_assessed_after_the_warm_up(tmp_path, name):
    module, trainer = fit(tmp_path, **ASSESSED[name])
    seen = trainer.callback_metrics
    assert torch.isfinite(seen["train/loss"])
    assert module.network.assessing
    for metric in ("consistency", "conflict_auroc", "pseudo_accuracy", "accuracy_consistency_high"):
        assert 0 <= seen[f"val/{metric}"] <= 1, metric
    assert 0 <= seen["train/consistency"] <= 1
    assert 0 <= seen["train/anchors_left"] <= 20
    assert ("train/tree" in seen) == (name not in ("soft", "without tree"))


def test_in_its_warm_up_it_is_the_network_alone_bit_for_bit(tmp_path):
    plain, _ = fit(tmp_path, assessment=None)
    warm, trainer = fit(tmp_path, assessment=ConsistencyAssessment(dim=4, warmup_epochs=2, theta=0.12))
    later, _ = fit(tmp_path, assessment=ConsistencyAssessment(dim=4, warmup_epochs=1, theta=0.12))
    expected = {name: value for name, value in plain.state_dict().items() if "body" in name}
    assert len(expected) > 10
    assert all(torch.equal(value, warm.state_dict()[name]) for name, value in expected.items())
    assert not all(torch.equal(value, later.state_dict()[name]) for name, value in expected.items())
    assert not warm.network.assessing
    assert "val/consistency" not in trainer.callback_metrics
    assert warm.network.lists.written.min() > 0  # lists fill up meanwhile


def test_a_checkpoint_rebuilds_the_network_and_its_anchors_without_data(tmp_path):
    module, trainer = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = EmotionRecognition.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).eval()
    batch = next(iter(trainer.datamodule.test_dataloader()))
    expected = module.eval()(batch.features, batch.length, batch.present)
    found = again(batch.features, batch.length, batch.present)
    assert torch.equal(found["consistency"], expected["consistency"])
    assert torch.equal(found["probabilities"], expected["probabilities"])
    assert again.network.facts == module.network.facts


def test_an_interrupted_fit_goes_on_with_full_lists(tmp_path):
    still = partial(ThreeStages, encoding=Encoding(dim=8, dropout=0.0, layers=1, heads=2))  # draws nothing in a step
    short = ConsistencyAssessment(dim=4, length=10, warmup_epochs=1, theta=0.12)
    whole, _ = fit(tmp_path, still, assessment=short, trainer=make_trainer(tmp_path, max_epochs=3))
    _, trainer = fit(tmp_path, still, assessment=short, trainer=make_trainer(tmp_path, max_epochs=2))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    pl.seed_everything(99)
    other = make(still, assessment=short)
    make_trainer(tmp_path, max_epochs=3).fit(other, make_data(seed=3), ckpt_path=tmp_path / "half.ckpt")
    assert other.network.lists.written.min() > 10
    assert other.history["epoch"] == [1, 2, 3]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_clip_is_told_the_same_alone_and_among_others(tmp_path):
    module, trainer = fit(tmp_path)
    split = trainer.datamodule
    whole = torch.cat([found["consistency"] for found in trainer.predict(module, make_data(eval_batch_size=30))])
    alone = torch.cat([found["consistency"] for found in trainer.predict(module, make_data(eval_batch_size=1))])
    torch.testing.assert_close(alone, whole, rtol=1e-4, atol=1e-5)
    assert len(whole) == split.meta.counts["test"]


def test_a_training_clip_is_never_its_own_anchor(tmp_path):
    module, trainer = fit(tmp_path, trainer=make_trainer(tmp_path, max_epochs=4))
    for found in trainer.predict(module, make_data(predict_split="train")):
        for name in ("left", "middle", "right"):
            assert all(clip != anchor for clip, anchor in zip(found["clip"], found[f"anchor_{name}"], strict=True))


def test_the_table_of_predictions_has_a_row_a_clip(tmp_path):
    module, trainer = fit(tmp_path)
    pieces = trainer.predict(module, make_data(eval_batch_size=11))
    told = module.collect(lambda: iter(pieces), tmp_path)
    with open(tmp_path / "clips.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["clip"] for row in rows] == list(trainer.datamodule.names("test"))
    assert told["clips"] == 30
    probabilities = torch.cat([piece["probabilities"] for piece in pieces])
    kappa = torch.cat([piece["consistency"] for piece in pieces])
    assert told["consistency"] == pytest.approx(float(kappa.mean()))
    classes = trainer.datamodule.meta.classes
    train = set(trainer.datamodule.names("train"))
    for row, share, consistency in zip(rows, probabilities, kappa, strict=True):
        assert row["class"] == classes[int(share.argmax())]
        assert [float(row[f"p_{name}"]) for name in classes] == pytest.approx(share.tolist(), rel=1e-4)
        assert float(row["consistency"]) == pytest.approx(float(consistency), rel=1e-4)
        assert row["left_says"] in classes
        assert row["right_anchor"] in train
        assert 0 <= float(row["middle_typicality"]) <= 1


def test_pictures_show_verdicts_and_anchors(tmp_path):
    module, trainer = fit(tmp_path)
    trainer.test(module, make_data(), verbose=False)
    drawn = module.media("test")
    assert {"confusion", "consistency", "accuracy_by_tercile", "left_says_middle_says"} <= drawn.keys()
    assert {"disk_by_class_left", "disk_by_typicality_right"} <= drawn.keys()
    assert drawn["confusion"].matrix.sum() == 30
    accuracy = float(trainer.callback_metrics["test/accuracy"])
    assert drawn["confusion"].matrix.diagonal().sum() / 30 == pytest.approx(accuracy)
    disk = drawn["disk_by_class_left"].series
    assert sum(len(points) for name, points in disk.items() if name != "rim") == 30
    assert all((points.norm(dim=1) <= 1 + 1e-6).all() for points in disk.values())
    assert module.media("train").keys() == {"anchors"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"missing": {"audio": 0.3}}, r"^missing: expected one of left, middle, right, got 'audio'"),
        ({"missing": {"left": 1.0}}, r"^missing.left: expected a share in \[0, 1\), got 1.0"),
        ({"target": "score"}, r"^target: expected classes, since the data have no scores"),
        ({"tree_weight": -1.0}, r"^tree_weight: expected at least 0"),
        ({"network": partial(Unimodal, modality="voice", encoding=SIZE), "assessment": None}, r"modality: .*got voice"),
        ({"network": partial(Unimodal, modality="left", encoding=SIZE)}, r"^network: Unimodal has no vector of each"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        fit(tmp_path, **options)


def test_a_checkpoint_is_refused_where_the_modalities_are_others(tmp_path):
    module, trainer = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    two = make_data(modalities=["left", "right"])
    with pytest.raises(UserError, match=r"^data: expected clips with the modalities .*'middle'.* got"):
        make_trainer(tmp_path).test(make(), two, ckpt_path=tmp_path / "a.ckpt", verbose=False)
    with pytest.raises(UserError, match=r"^data: expected clips with the modalities"):
        make_trainer(tmp_path).test(module, two, verbose=False)


def test_data_of_another_kind_are_refused(tmp_path):
    from datamodules import ImageDataModule

    with pytest.raises(UserError, match=r"^data: EmotionRecognition needs a DataModule of clips"):
        fit(tmp_path, data=ImageDataModule("digits"))
