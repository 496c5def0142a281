"""Rules by position against their definitions, tried item by item."""

import itertools

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.selection import (
    Craig,
    FacilityLocation,
    Features,
    GraphCut,
    Herding,
    KCenter,
    class_budget,
    class_members,
    error_of,
    herding_subset,
)

RULES = [Herding(), KCenter(), GraphCut(), FacilityLocation(), Craig()]


def features(count=60, classes=3, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % classes
    values = {
        "embedding": torch.rand(count, width, generator=generator),
        "logits": torch.randn(count, classes, generator=generator),
    }
    return Features(label, classes, values)


def gradients(own):
    """(N, K (1 + D)) last-layer gradients, written out."""
    error, inputs = error_of(own["logits"], own.label), own["embedding"].double()
    return torch.cat([error, (error[:, :, None] * inputs[:, None]).flatten(1)], 1)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_rule_spends_its_budget_in_every_class_and_repeats_itself(rule):
    data, budget = features(), torch.tensor([3, 7, 20])
    picks, again = rule.select(data, budget, seed=1), rule.select(data, budget, seed=1)
    assert picks.index.unique().numel() == 30
    assert data.label[picks.index].tolist() == [0] * 3 + [1] * 7 + [2] * 20
    assert picks.order.tolist() == [*range(3), *range(7), *range(20)]
    assert torch.equal(picks.index, again.index)
    assert torch.equal(picks.score, again.score)
    assert picks.score.dtype == picks.weight.dtype == torch.float32


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_choice_does_not_depend_on_other_classes(rule):
    data, budget = features(), torch.tensor([5, 5, 5])
    picks = rule.select(data, budget, seed=1)
    values = {name: value.clone() for name, value in data.values.items()}
    values["embedding"][data.label == 1] += 1
    moved = rule.select(Features(data.label, 3, values), budget, seed=1)
    for label in (0, 2):
        assert torch.equal(picks.index[data.label[picks.index] == label], moved.index[data.label[moved.index] == label])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_features_that_are_no_numbers_are_refused(rule):
    data = features()
    data["embedding"][7, 1] = float("nan")
    with pytest.raises(UserError, match="features: embedding: expected numbers, got NaN or infinity in 1 items"):
        rule.select(data, torch.tensor([3, 3, 3]), seed=0)


def test_only_the_first_item_of_k_center_hangs_on_the_seed():
    data, budget = features(), torch.tensor([20, 20, 20])
    firsts = {tuple(KCenter().select(data, budget, seed).index[[0, 20, 40]].tolist()) for seed in range(20)}
    assert len(firsts) > 10
    picks = KCenter().select(data, budget, 3)
    one = data["embedding"][class_members(data.label, 0)].double()
    chosen = (picks.index[:20] // 3).tolist()
    for number in range(1, 20):
        nearest = torch.cdist(one, one[chosen[:number]]).amin(1)
        assert float(picks.score[number]) == pytest.approx(float(nearest.max()), rel=1e-5)


def test_herding_and_the_subset_of_distillation_are_one():
    data = features()
    picks = Herding().select(data, torch.tensor([4, 4, 4]), seed=0)
    assert torch.equal(picks.index, herding_subset(data["embedding"], data.label, 3, 4))


def test_herding_as_in_the_public_code_is_far_worse_on_digits():
    from sklearn.datasets import load_digits
    from sklearn.linear_model import RidgeClassifier

    digits = load_digits()
    train, test = torch.arange(1200), torch.arange(1200, 1797)
    pixels, label = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target).long()
    data = Features(label[train], 10, {"embedding": pixels[train]})
    score = {}
    for compat in (False, True):
        index = Herding(deepcore_compat=compat).select(data, class_budget(data, 0.1), seed=0).index
        model = RidgeClassifier().fit(pixels[train][index], label[train][index])
        score[compat] = model.score(pixels[test], label[test])
    assert score[False] > score[True] + 0.15


def test_graph_cut_and_facility_location_on_gradients_written_out():
    data = features()
    one = data.take(class_members(data.label, 0))
    unit = torch.nn.functional.normalize(gradients(one))
    rows = 0.5 + 0.5 * unit @ unit.T

    def cut(chosen, item):
        return float(rows[:, item].sum() - 2 * rows[chosen, item].sum())

    def cover(chosen, item):
        covered = rows[:, chosen].amax(1) if chosen else torch.zeros(len(rows))
        return float((rows[:, item] - covered).clamp_min(0).sum())

    budget = torch.tensor([8, 1, 1])
    for rule, gain in ((GraphCut(double_softmax=False), cut), (FacilityLocation(), cover)):
        chosen: list[int] = []
        for _ in range(8):
            chosen.append(max((item for item in range(20) if item not in chosen), key=lambda i: gain(chosen, i)))
        picks = rule.select(data, budget, seed=0)
        assert (picks.index[:8] // 3).tolist() == chosen
        gains = [gain(chosen[:number], item) for number, item in enumerate(chosen)]
        assert picks.score[:8].tolist() == pytest.approx(gains, abs=1e-4)


def test_craig_weights_are_sizes_of_clusters_and_its_choice_the_greedy_one():
    data = features()
    one = data.take(class_members(data.label, 0))
    distance = torch.cdist(gradients(one), gradients(one))
    chosen: list[int] = []
    for _ in range(6):
        left = {item: float(distance[:, [*chosen, item]].amin(1).sum()) for item in range(20) if item not in chosen}
        chosen.append(min(left, key=left.__getitem__))
    picks = Craig().select(data, torch.tensor([6, 1, 1]), seed=0)
    assert (picks.index[:6] // 3).tolist() == chosen
    sizes = [0] * 6
    for item in range(20):
        sizes[min(range(6), key=lambda number: float(distance[item, chosen[number]]))] += 1
    assert picks.weight.tolist() == [*sizes, 20, 20]
    more = Craig(deepcore_compat=True).select(data, torch.tensor([6, 1, 1]), seed=0)
    assert torch.equal(more.weight, picks.weight + 1)


def test_craig_covers_gradients_nearly_as_well_as_the_best_subset_can():
    for seed in range(5):
        data = features(8, 1, 3, seed)
        distance = torch.cdist(gradients(data), gradients(data))
        best = min(float(distance[:, list(each)].amin(1).sum()) for each in itertools.combinations(range(8), 3))
        got = float(distance[:, Craig().select(data, torch.tensor([3]), seed=0).index].amin(1).sum())
        assert best - 1e-9 <= got <= 1.5 * best + 1e-9


def test_what_similarities_are_taken_of_decides_what_is_needed():
    assert GraphCut().needs == ("embedding", "logits")
    assert GraphCut(feature="embedding").needs == ("embedding",)
    data = features()
    alone = Features(data.label, 3, {"embedding": data["embedding"]})
    for similarity in ("cosine", "neg_sqeuclid"):
        rule = FacilityLocation(feature="embedding", similarity=similarity)
        assert len(rule.select(alone, torch.tensor([2, 2, 2]), seed=0)) == 6
    with pytest.raises(UserError, match="similarity: expected cosine with feature: gradient, got neg_sqeuclid"):
        GraphCut(similarity="neg_sqeuclid").select(data, torch.tensor([2, 2, 2]), seed=0)
    with pytest.raises(UserError, match="similarity: expected one of cosine, neg_sqeuclid; got 'cosin'"):
        GraphCut(similarity="cosin")
