"""The recommender around backbones, losses, plug-ins and floors: what it trains, measures, keeps and refuses."""

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import Trainer

from datamodules import Planted, SessionDataModule
from leanlight.contracts import UserError
from lit_modules.hid import (
    GCEGNN,
    LAPSR,
    LOAM,
    SRGNN,
    STAMP,
    GRU4Rec,
    HybridIntents,
    ICLoss,
    ItemKNN,
    Popularity,
    Scoring,
    SessionPopularity,
    SessionRecommender,
    TailNet,
)

SMALL = Planted(intents=3, categories=3, items=6, train_sessions=60, test_sessions=30)
STAMP_8 = partial(STAMP, dim=8)
HID = {"intents": HybridIntents(n=3), "icloss": ICLoss()}


def make_data(**more):
    return SessionDataModule("planted", **{"planted": SMALL, "batch_size": 16, **more})


def make_trainer(folder, **more):
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=folder, **{**options, **quiet, **more})


def fit(folder, backbone=STAMP_8, trainer=None, data=None, **options):
    pl.seed_everything(3)
    options = {"topk": (2, 5), "optimizer": partial(torch.optim.Adam, lr=0.01), **options}
    module = SessionRecommender(backbone, **options)
    trainer = trainer or make_trainer(folder)
    trainer.fit(module, data or make_data())
    return module, trainer


BESIDE = {
    "plain": {},
    "hid": HID,
    "released": {"intents": HybridIntents(n=3), "icloss": ICLoss(form="released")},
    "last_items": {"icloss": ICLoss(against="last_items")},
    "loam": {"plugin": LOAM},
    "tailnet": {"plugin": partial(TailNet, dim=8)},
    "lapsr": {"plugin": LAPSR},
    "cosine": {"scoring": Scoring("cosine", chunk=10)},
}


@pytest.mark.parametrize("name", BESIDE)
def test_it_trains_and_measures_with_everything_that_can_stand_beside_a_backbone(tmp_path, name):
    module, trainer = fit(tmp_path, **BESIDE[name])
    seen = trainer.callback_metrics
    assert torch.isfinite(seen["train/loss"])
    assert ("train/icloss" in seen) == ("icloss" in BESIDE[name])
    for metric in ("hr", "mrr", "ndcg", "tail_hr", "tail_mrr", "tail_share", "coverage", "tail_coverage", "gini"):
        assert 0 <= seen[f"val/{metric}_5"] <= 1, metric
        assert 0 <= seen[f"val/{metric}_2"] <= 1, metric
    assert seen["val/popularity_5"] >= 1
    before = {name: value.clone() for name, value in module.state_dict().items()}
    trainer.test(module, make_data(), verbose=False)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("backbone", [GRU4Rec, SRGNN, GCEGNN], ids=lambda kind: kind.__name__)
def test_every_backbone_trains_with_the_loss_of_hid(tmp_path, backbone):
    module, trainer = fit(tmp_path, partial(backbone, dim=8), **HID)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())


def test_with_epsilon_0_it_is_the_backbone_bit_for_bit(tmp_path):
    dropped = partial(GRU4Rec, dim=8, dropout=0.3)  # draws in every step
    plain, _ = fit(tmp_path, dropped)
    zero, _ = fit(tmp_path, dropped, **HID, epsilon=0.0)
    some, _ = fit(tmp_path, dropped, **HID, epsilon=0.1)
    expected = plain.state_dict()
    assert expected.keys() == zero.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in zero.state_dict().items())
    assert not all(torch.equal(value, expected[name]) for name, value in some.state_dict().items())


@pytest.mark.parametrize("backbone", [Popularity, SessionPopularity, ItemKNN], ids=lambda kind: kind.__name__)
def test_a_floor_is_measured_without_an_optimiser_and_survives_a_checkpoint(tmp_path, backbone):
    module, trainer = fit(tmp_path, backbone)
    assert trainer.global_step == 0
    assert module.progress().value == len(make_loader()) > 0
    assert trainer.callback_metrics["val/hr_5"] > 0
    assert "val/loss" not in trainer.callback_metrics
    assert_same_scores(module, trainer, tmp_path)


def make_loader():
    data = make_data()
    data.setup("fit")
    return data.train_dataloader()


@pytest.mark.parametrize("name", ["hid", "loam", "tailnet", "lapsr"])
def test_a_checkpoint_rebuilds_the_recommender_without_data(tmp_path, name):
    module, trainer = fit(tmp_path, **BESIDE[name])
    assert_same_scores(module, trainer, tmp_path)


def test_a_checkpoint_holds_the_neighbours_of_a_network(tmp_path):
    module, trainer = fit(tmp_path, partial(GCEGNN, dim=8))
    assert_same_scores(module, trainer, tmp_path)


def assert_same_scores(module, trainer, folder):
    trainer.save_checkpoint(folder / "a.ckpt")
    again = SessionRecommender.load_from_checkpoint(folder / "a.ckpt", weights_only=True).eval()
    items = torch.tensor([[1, 2, 1, 3], [4, 0, 0, 0]])
    with torch.no_grad():
        assert torch.equal(again(items), module.eval()(items))
    assert again.catalogue.names == module.catalogue.names
    sessions = [[module.catalogue.names[0], module.catalogue.names[5]]]
    assert again.recommend(sessions, 3) == module.recommend(sessions, 3)


def test_an_interrupted_fit_goes_on_with_its_intents_and_items(tmp_path):
    whole, _ = fit(tmp_path, trainer=make_trainer(tmp_path, max_epochs=2), **HID)
    half, trainer = fit(tmp_path, trainer=make_trainer(tmp_path, max_epochs=1), **HID)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    pl.seed_everything(99)
    other = SessionRecommender(STAMP_8, topk=(2, 5), optimizer=partial(torch.optim.Adam, lr=0.01), **HID)
    make_trainer(tmp_path, max_epochs=2).fit(other, make_data(seed=3), ckpt_path=tmp_path / "half.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert torch.equal(half.intents.item, other.intents.item)


def test_the_metrics_are_those_of_the_predicted_lists(tmp_path):
    module, trainer = fit(tmp_path)
    data = make_data(eval_batch_size=7)
    measured = trainer.test(module, data, verbose=False)[0]
    pieces = trainer.predict(module, data)
    assert torch.cat([piece["index"] for piece in pieces]).tolist() == list(range(data.meta.counts["test"]))
    hits, reciprocal, cases = 0, 0.0, 0
    for piece in pieces:
        for target, row, score in zip(
            piece["target"].tolist(), piece["recommended"].tolist(), piece["score"].tolist(), strict=True
        ):
            assert score == sorted(score, reverse=True)
            assert len(set(row)) == 5
            cases += 1
            if target in row:
                hits += 1
                reciprocal += 1 / (row.index(target) + 1)
    assert measured["test/hr_5"] == pytest.approx(hits / cases)
    assert measured["test/mrr_5"] == pytest.approx(reciprocal / cases)


def test_pictures_add_up_to_the_metrics(tmp_path):
    module, trainer = fit(tmp_path, **HID)
    trainer.test(module, make_data(), verbose=False)
    drawn = module.media("test")
    assert drawn.keys() == {"rank_frequency", "hit_rate_by_popularity", "hit_rate_by_length"}
    sums = module.evaluation._shown["test"]
    rate = sums["tenth_hits"].sum() / sums["tenth_cases"].sum()
    assert rate == pytest.approx(float(trainer.callback_metrics["test/hr_5"]))
    assert torch.equal(sums["tenth_cases"].sum(), sums["length_cases"].sum())
    assert sums["recommended"].sum() == 5 * sums["length_cases"].sum()
    assert module.media("train").keys() == {"intents", "intent_map"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"topk": (5, 100_000)}, r"^topk: expected at most \d+, the items of the data, got 100000"),
        ({"topk": ()}, r"^topk: expected one length at least"),
        ({"topk": (0, 5)}, r"^topk: expected an integer of at least 1"),
        ({"epsilon": -1.0}, r"^epsilon: expected at least 0, got -1"),
        ({"icloss": ICLoss()}, r"^intents: expected how items are grouped"),
        ({"backbone": Popularity, **HID}, r"^backbone: Popularity has nothing to train"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        fit(tmp_path, **options)


def test_a_checkpoint_is_refused_where_the_items_are_others(tmp_path):
    module, trainer = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"^data: expected the 53 items that this model was made for.*got \d+ items"):
        make_trainer(tmp_path).test(module, make_data(train_cases=100), ckpt_path=tmp_path / "a.ckpt", verbose=False)


def test_data_of_another_kind_are_refused(tmp_path):
    from datamodules import ImageDataModule

    with pytest.raises(UserError, match=r"^data: SessionRecommender needs a DataModule of sessions"):
        fit(tmp_path, data=ImageDataModule("digits"))


def test_a_recommender_without_items_says_so():
    with pytest.raises(UserError, match="does not know its items yet"):
        SessionRecommender(STAMP_8).recommend([["1"]])
