"""Metrics equal those of scikit-learn and numpy, in any batches and whatever the order."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, recall_score, roc_auc_score

from leanlight.contracts import UserError
from lit_modules.tical.metrics import SentimentAccuracy, emotion_metrics

N, C = 90, 7


def clips(seed=0):
    """Scores on a grid that hits halves and 0, classes of which one never occurs, κ with ties, conflicts."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(-12, 13, (N,), generator=generator) / 4
    score = true + torch.randint(-8, 9, (N,), generator=generator) / 4
    label = true.clamp(-3, 2).round().long() + 3
    predicted = score.clamp(-3, 3).round().long() + 3
    kappa = torch.randint(0, 20, (N,), generator=generator) / 20
    conflict = torch.rand(N, generator=generator) < 0.6 - 0.4 * kappa
    return {
        "predicted": predicted,
        "label": label,
        "score": score,
        "true_score": true,
        "consistency": kappa,
        "conflict": conflict,
    }


def expected_of(values):
    v = {name: each.numpy() for name, each in values.items()}
    occurring = np.unique(v["label"])
    found = {
        "accuracy": accuracy_score(v["label"], v["predicted"]),
        "uar": recall_score(v["label"], v["predicted"], average="macro", labels=occurring),
        "weighted_f1": f1_score(v["label"], v["predicted"], average="weighted"),
        "mae": mean_absolute_error(v["true_score"], v["score"]),
        "corr": np.corrcoef(v["true_score"], v["score"])[0, 1],
        "conflict_auroc": roc_auc_score(v["conflict"], 1 - v["consistency"]),
    }
    some = v["true_score"] != 0
    signs = {
        "negative_nonnegative": (v["true_score"] >= 0, v["score"] >= 0),
        "negative_positive": (v["true_score"][some] > 0, v["score"][some] > 0),
    }
    for name, (true, said) in signs.items():
        found[f"acc2_{name}"] = accuracy_score(true, said)
        found[f"f1_{name}"] = f1_score(true, said, average="weighted")
    for name, most in (("acc5", 2), ("acc7", 3)):
        levels = [np.round(np.clip(v[each], -most, most)) for each in ("true_score", "score")]
        found[name] = accuracy_score(*levels)
    low, high = np.sort(v["consistency"])[[N // 3, 2 * N // 3]]
    right = v["label"] == v["predicted"]
    for name, those in (
        ("low", v["consistency"] < low),
        ("middle", (v["consistency"] >= low) & (v["consistency"] < high)),
        ("high", v["consistency"] >= high),
    ):
        found[f"accuracy_consistency_{name}"] = right[those].mean()
    return found


@pytest.mark.parametrize("batch", [13, N])
def test_all_metrics_are_those_of_scikit_learn(batch):
    values, metrics = clips(), emotion_metrics(C, (-3, 3))
    for part in torch.randperm(N, generator=torch.Generator().manual_seed(1)).split(batch):
        metrics.update(**{name: each[part] for name, each in values.items()})
    found, expected = metrics.compute(), expected_of(values)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-5), name
    assert expected["acc2_negative_nonnegative"] != expected["acc2_negative_positive"]
    metrics.reset()
    other = clips(seed=5)
    metrics.update(*other.values())
    assert metrics.compute()["accuracy"].item() == pytest.approx(expected_of(other)["accuracy"])


def test_without_scores_kappa_and_conflicts_there_are_only_figures_of_classes():
    values, metrics = clips(), emotion_metrics(C)
    metrics.update(values["predicted"], values["label"])
    found = metrics.compute()
    assert found.keys() == {"accuracy", "uar", "weighted_f1"}
    assert found["uar"].item() == pytest.approx(expected_of(values)["uar"])


def test_figures_of_kappa_that_no_clip_gives_are_left_out():
    values, metrics = clips(), emotion_metrics(C)
    constant = torch.full((N,), 0.5)
    metrics.update(values["predicted"], values["label"], consistency=constant, conflict=torch.ones(N).bool())
    found = metrics.compute()
    assert found.keys() == {"accuracy", "uar", "weighted_f1", "accuracy_consistency_high"}
    assert found["accuracy_consistency_high"] == found["accuracy"]
    metrics.reset()
    metrics.update(values["predicted"], values["label"], consistency=constant, conflict=values["conflict"])
    assert metrics.compute()["conflict_auroc"].item() == 0.5


def test_scales_of_other_ranges_have_no_levels():
    assert {"mae", "corr", "acc2_negative_positive"} < set(emotion_metrics(3, (-1, 1)).keys())
    assert not {"acc5", "acc7"} & set(emotion_metrics(3, (-1, 1)).keys())
    assert "acc2_negative_positive" not in emotion_metrics(5, (0, 4))
    with pytest.raises(UserError, match="scale: expected one of negative_nonnegative"):
        SentimentAccuracy("six")
