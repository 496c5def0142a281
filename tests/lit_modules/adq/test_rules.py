"""DQ and ADQ on made-up features: budgets, streams, what they share."""

import dataclasses

import pytest
import torch

from leanlight.contracts import UserError
from leanlight.selection_rules import RULES
from lit_modules.adq import ADQ, DQ
from lit_modules.selection import Features, Work, class_budget


def features(counts=(43, 60, 51), seed=0, width=5):
    """Classes of these sizes in a random order."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    label = label[torch.randperm(len(label), generator=generator)]
    n = len(label)
    values = {
        "embedding": torch.randn(n, width, generator=generator).relu(),
        "logits": torch.randn(n, len(counts), generator=generator),
        "texture": torch.rand(n, generator=generator),
        "views": torch.randn(n, 2, width, generator=generator).relu(),
    }
    return Features(label, len(counts), values)


def pick(rule, data=None, keep=0.3, seed=0, work=None):
    data = data or features()
    return rule.select(data, class_budget(data, keep), seed, work)


def same(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("index", "order", "score", "weight", "bin"))


RULES_OF_ALL_KINDS = [
    DQ(),
    DQ(num_bins=4, bin_scheme="geometric"),
    *(ADQ(allocation=name) for name in ("uniform", "paper_norm", "paper_literal", "repo")),
    ADQ(scores="texture", alpha=1.0),
    ADQ(diversity="contrastive", heads=1),
]


@pytest.mark.parametrize("rule", RULES_OF_ALL_KINDS, ids=repr)
@pytest.mark.parametrize("keep", [0.05, 0.3, 0.77, 1.0])
def test_every_switch_spends_the_same_budget_in_every_class(rule, keep):
    data = features()
    picks = pick(rule, data, keep)
    assert torch.equal(data.label[picks.index].bincount(), class_budget(data, keep))
    assert picks.index.unique().numel() == len(picks)
    bins = picks.details["bins"]
    assert bins["drawn"] == picks.bin.bincount(minlength=rule.num_bins).tolist()
    assert sum(bins["share"]) == pytest.approx(1)
    assert sum(bins["size"]) == len(data)
    assert all(drawn <= size for drawn, size in zip(bins["drawn"], bins["size"], strict=True))


def test_rounding_each_bin_for_itself_gives_6200_of_50000():
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(10).repeat(5000)
    data = Features(label, 10, {"embedding": torch.randn(50_000, 1, generator=generator)})

    class OneBinAfterTheOther(Work):
        """Bins without their search, which plays no part here."""

        def one(self, features, label, step, advance=None):
            sizes = torch.tensor(step.sizes(len(features.take((features.label == label).nonzero()[:, 0])), label))
            return {"bin": torch.arange(len(sizes)).repeat_interleave(sizes)}

    budget = class_budget(data, 0.125)
    work = OneBinAfterTheOther()
    assert len(DQ(rounding="repo", feature="embedding").select(data, budget, 0, work)) == 6200
    assert len(DQ(feature="embedding").select(data, budget, 0, work)) == 6250


def test_adq_without_scores_is_dq():
    assert same(pick(ADQ(scores="none")), pick(DQ()))
    assert same(pick(ADQ(alpha=0.0)), pick(DQ()))
    assert same(pick(ADQ(allocation="uniform")), pick(DQ()))
    assert not same(pick(ADQ()), pick(DQ()))


def bin_of_all(rule, data):
    picks = pick(rule, data, keep=1.0)
    return torch.empty_like(picks.bin).scatter(0, picks.index, picks.bin)


def test_dq_and_adq_have_the_same_bins_whatever_the_budget_and_seed():
    data = features()
    bins = bin_of_all(DQ(), data)
    assert torch.equal(bins, bin_of_all(ADQ(), data))
    for rule in (DQ(), ADQ()):
        for keep, seed in ((0.1, 0), (0.4, 7)):
            picks = pick(rule, data, keep, seed)
            assert torch.equal(picks.bin, bins[picks.index])


def test_equal_bins_are_balanced_over_classes():
    data = features((100, 100, 100))
    bins = bin_of_all(DQ(), data)
    for label in range(3):
        assert bins[data.label == label].bincount().tolist() == [10] * 10


def test_classes_and_bins_draw_from_streams_of_their_own():
    one = features((60,))
    twice = Features(one.label.repeat(2), 2, {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in one.values.items()})
    twice.label[60:] = 1
    twice.values["logits"] = torch.zeros(120, 2)
    twice.values["logits"][60:] = twice.values["logits"][:60]
    rule = DQ(num_bins=3, feature="embedding")
    picks = pick(rule, twice, 0.5)
    first, second = picks.index[:30].sort().values, picks.index[30:].sort().values - 60
    assert torch.equal(bin_of_all(rule, twice)[:60], bin_of_all(rule, twice)[60:])
    assert not torch.equal(first, second)
    bins = bin_of_all(rule, twice)[:60]
    places = [
        {members.tolist().index(item) for item in first.tolist() if bins[item] == n}
        for n, members in ((n, (bins == n).nonzero()[:, 0]) for n in range(3))
    ]
    assert not places[0] == places[1] == places[2]


def test_the_choice_is_a_function_of_the_seed():
    assert same(pick(ADQ(), seed=3), pick(ADQ(), seed=3))
    assert not same(pick(ADQ(), seed=3), pick(ADQ(), seed=4))


def test_every_item_of_a_bin_is_equally_likely():
    data = features((40,))
    bins, counts = bin_of_all(DQ(num_bins=2), data), torch.zeros(40)
    for seed in range(400):
        counts[pick(DQ(num_bins=2), data, 0.25, seed).index] += 1
    assert (counts / 400 - 0.25).abs().max() < 0.1
    assert bins.bincount().tolist() == [20, 20]


def test_more_is_drawn_where_importance_is_larger():
    data = features((200, 200))
    # Texture rises with the bin, which nothing else depends on.
    bins = bin_of_all(DQ(), data)
    data.values["texture"].copy_(bins)
    details = pick(ADQ(scores="texture"), data, 0.2).details["bins"]
    assert details["texture"] == [float(n) for n in range(10)]
    assert details["importance"] == pytest.approx([n / 9 for n in range(10)])
    assert details["drawn"] == sorted(details["drawn"])
    expected = [0.6 * n / 45 + 0.4 * 0.1 for n in range(10)]
    assert details["share"] == pytest.approx(expected)


def test_more_weight_on_importance_above_30_percent():
    data = features((200, 200))
    data.values["texture"].copy_(bin_of_all(DQ(), data))
    shares = {keep: pick(ADQ(scores="texture"), data, keep).details["bins"]["share"][0] for keep in (0.3, 0.4)}
    assert shares == {0.3: pytest.approx(0.4 * 0.1), 0.4: pytest.approx(0.3 * 0.1)}
    assert pick(ADQ(scores="texture", alpha=0.6), data, 0.4).details["bins"]["share"][0] == pytest.approx(0.04)


def test_rounding_of_the_budgets_does_not_change_the_weight_on_importance():
    data = features((43, 43, 43))
    data.values["texture"].copy_(bin_of_all(DQ(), data))
    assert class_budget(data, 0.3).sum() > 0.3 * len(data)
    rule, fixed = ADQ(scores="texture"), ADQ(scores="texture", alpha=0.6)
    assert pick(rule, data, 0.3).details == pick(fixed, data, 0.3).details


def test_every_switch_of_the_bins_and_scores_is_heard():
    data = features((60, 60, 60))
    by_default = pick(ADQ(), data)
    switches = [
        {"num_bins": 5},
        {"bin_scheme": "geometric"},
        {"feature": "embedding"},
        {"feature": "embedding", "similarity": "neg_sqeuclid"},
        {"double_softmax": False},
        {"submodular": "facility_location"},
        {"diversity": "contrastive"},
        {"heads": 0},
        {"scores": "diversity"},
        {"allocation": "repo"},
        {"alpha": 0.9},  # 1 would be repo where bins are equal
    ]
    details = [by_default.details, *(pick(ADQ(**switch), data).details for switch in switches)]
    for number, one in enumerate(details):
        assert one not in details[:number], switches[number - 1]


def test_texture_within_classes_forgets_what_the_class_has():
    data = features((100, 100))
    bins = bin_of_all(DQ(), data)
    data.values["texture"].copy_(bins + 100 * data.label)
    texture = pick(ADQ(scores="texture", texture_within_class=True), data).details["bins"]["texture"]
    deviation = torch.arange(10).double().std(correction=0)
    assert texture == pytest.approx(((torch.arange(10).double() - 4.5) / deviation).tolist())


def test_a_single_bin_gives_all_or_says_how_many_it_has():
    picks = pick(ADQ(single_bin=2), keep=0.08)
    assert picks.bin.unique().tolist() == [2]
    assert picks.details["bins"]["share"] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    with pytest.raises(UserError, match="single_bin: bin 2 of class 0 has 4 items, not 13"):
        pick(DQ(single_bin=2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DQ(num_bins=0), "num_bins: expected at least 1, got 0"),
        (lambda: DQ(single_bin=10), "single_bin: expected 0 to 9, got 10"),
        (lambda: DQ(rounding="rep"), r"rounding: expected one of budget, repo; got 'rep' \(did you mean 'repo'\?\)"),
        (lambda: ADQ(scores="rep"), "scores: expected one of none, texture, diversity, both; got 'rep'"),
        (lambda: ADQ(alpha=1.5), "alpha: expected 0 to 1, got 1.5"),
        (lambda: ADQ(heads=-1), "heads: expected 0 or more, got -1"),
        (lambda: ADQ(similarity="neg_sqeuclid"), "similarity: expected cosine with feature: gradient"),
        (lambda: pick(DQ(), features((9, 30))), "num_bins: expected 1 to 9, the items of class 0; got 10"),
    ],
)
def test_bad_switches_are_one_line(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_rule_needs_what_its_switches_read():
    assert DQ().needs == RULES["dq"].needs
    assert ADQ().needs == RULES["adq"].needs
    assert ADQ(scores="texture").needs == ("embedding", "logits", "texture")
    assert ADQ(scores="none", feature="embedding").needs == ("embedding",)
    data = features()
    for rule in (DQ(), ADQ(), ADQ(scores="texture"), ADQ(scores="diversity"), DQ(feature="embedding")):
        fewer = dataclasses.replace(data, values={name: data[name] for name in rule.needs})
        assert same(pick(rule, fewer), pick(rule, data))
        for name in rule.needs:
            without = dataclasses.replace(data, values={key: data[key] for key in rule.needs if key != name})
            with pytest.raises(UserError, match=f"the rule needs {name}"):
                pick(rule, without)
