"""Rules by score against counting by hand."""

import math
import statistics

import pytest
import torch
from scipy.stats import beta

from leanlight.contracts import UserError
from lit_modules.selection import CCS, DUAL, EL2N, Entropy, Features, Forgetting, LeastConfidence, Margin, Moderate


def one_class(**values):
    count = len(next(iter(values.values())))
    return Features(torch.zeros(count, dtype=torch.int64), 1, values)


def select(rule, budget, **values):
    return rule.select(one_class(**values), torch.tensor([budget]), seed=0)


def test_forgetting_counts_falls_from_right_to_wrong():
    margin = torch.tensor(
        [
            [1.0, 1.0, 1.0, 1.0],  # never
            [-1.0, 1.0, -1.0, -1.0],  # once
            [1.0, -1.0, 1.0, -1.0],  # twice
            [-1.0, -1.0, -1.0, -1.0],  # never learnt, so never
            [1.0, 1.0, 1.0, 0.0],  # once: a tie is no right answer
        ]
    )
    picks = select(Forgetting(), 5, train_margin=margin)
    assert picks.index.tolist() == [2, 1, 4, 0, 3]
    assert picks.score.tolist() == [2, 1, 1, 0, 0]
    with pytest.raises(UserError, match="expected train_margin of 2 epochs or more, got 1"):
        select(Forgetting(), 1, train_margin=margin[:, :1])


def test_el2n_averages_the_first_epochs():
    error = torch.tensor([[0.1, 0.9, 9.0], [0.6, 0.6, 0.0], [0.2, 0.2, 0.2]])
    assert select(EL2N(epochs=2), 2, train_error=error).index.tolist() == [1, 0]
    picks = select(EL2N(), 2, train_error=error)
    assert picks.index.tolist() == [0, 1]
    assert picks.score.tolist() == pytest.approx([10 / 3, 0.4])
    with pytest.raises(UserError, match="epochs: expected 1 or more, got 0"):
        EL2N(epochs=0)


def test_entropy_keeps_the_most_uncertain_and_the_public_branch_the_least():
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1e4, 0.0, 0.0], [1.0, 1.0, -50.0]])
    picks = select(Entropy(), 4, logits=logits)
    assert picks.index.tolist() == [1, 3, 0, 2]
    assert picks.score.tolist() == pytest.approx(
        [math.log(3), math.log(2), -sum(p * math.log(p) for p in torch.tensor([5.0, 0, 0]).softmax(0).tolist()), 0]
    )
    assert select(Entropy(deepcore_compat=True), 4, logits=logits).index.tolist() == [2, 0, 3, 1]


def test_equal_scores_are_taken_in_order():
    assert select(EL2N(), 20, train_error=torch.ones(40, 3)).index.tolist() == list(range(20))


def test_ccs_takes_as_many_from_each_stratum_and_all_of_small_ones():
    # Strata of width 10 from 0 to 50: 2, 4, 50, 3 and 41 items.
    margin = torch.cat(
        [torch.linspace(low, low + 9, count) for low, count in ((0, 2), (10, 4), (20, 50), (30, 3), (41, 41))]
    )
    picks = select(CCS(beta=0.0, strata=5), 29, train_margin=margin[:, None].expand(-1, 3))
    taken = (margin[picks.index] / 10).long().clamp_max(4).bincount(minlength=5).tolist()
    assert taken == [2, 4, 10, 3, 10]
    assert torch.allclose(picks.score, margin[picks.index])
    assert picks.index.unique().numel() == 29


@pytest.mark.parametrize(("keep", "dropped"), [(0.01, 300), (0.1, 300), (0.55, 150), (1.0, 0)])
def test_ccs_leaves_the_hardest_out_by_the_part_that_is_kept(keep, dropped):
    margin = torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    picks = select(CCS(strata=5), int(1000 * keep), train_margin=margin[:, None])
    assert float(margin[picks.index].min()) >= dropped
    assert len(picks) == int(1000 * keep)
    if keep == 1.0 or keep >= 0.55:
        assert float(margin[picks.index].min()) < dropped + 60


def test_ccs_drops_no_more_than_the_budget_allows():
    margin = torch.arange(10.0)[:, None]
    assert sorted(select(CCS(beta=0.9), 5, train_margin=margin).index.tolist()) == [5, 6, 7, 8, 9]
    assert len(select(CCS(), 4, train_margin=torch.zeros(10, 2))) == 4


def test_ccs_draws_by_the_seed():
    margin = torch.arange(200.0)[:, None]
    data, budget = one_class(train_margin=margin), torch.tensor([20])
    assert torch.equal(CCS().select(data, budget, 1).index, CCS().select(data, budget, 1).index)
    assert not torch.equal(CCS().select(data, budget, 1).index, CCS().select(data, budget, 2).index)


@pytest.mark.parametrize(("arguments", "text"), [({"beta": 1.0}, "beta: expected a share"), ({"strata": 0}, "strata")])
def test_wrong_arguments_of_ccs_are_refused(arguments, text):
    with pytest.raises(UserError, match=text):
        CCS(**arguments)


def test_confidence_and_margin_go_by_probabilities_and_the_public_code_otherwise():
    logits = torch.tensor([[10.0, 9.9, 9.9], [1.0, 0.0, 0.0], [0.0, -9.0, 0.0]])
    assert select(LeastConfidence(), 3, logits=logits).index.tolist() == [0, 2, 1]
    assert select(LeastConfidence(deepcore_compat=True), 3, logits=logits).index.tolist() == [2, 1, 0]
    picks = select(Margin(), 3, logits=logits)
    assert picks.index.tolist() == [2, 0, 1]
    first, second, _ = logits[1].softmax(0).tolist()
    assert picks.score[2].item() == pytest.approx(second - first)
    assert select(Margin(deepcore_compat=True), 3, logits=logits).index.tolist() == [1, 0, 2]


def test_moderate_keeps_the_median_distances_from_the_mean():
    x = torch.tensor([[0.0], [1.0], [-1.0], [2.0], [-2.0], [7.0], [-7.0]])
    assert sorted(select(Moderate(), 2, embedding=x).index.tolist()) == [3, 4]


def dual_score(row, window):
    """Mean over windows of std (1 - mean), by the statistics module."""
    parts = [row[begin : begin + window] for begin in range(len(row) - window + 1)]
    return statistics.fmean(statistics.stdev(part) * (1 - statistics.fmean(part)) for part in parts)


def test_the_score_of_dual_is_the_mean_over_windows():
    probability = torch.rand(12, 8, generator=torch.Generator().manual_seed(0))
    picks = select(DUAL(epochs=6, window=3), 12, train_probability=probability)
    want = [dual_score(probability[item, :6].tolist(), 3) for item in picks.index]
    assert picks.score.tolist() == pytest.approx(want, rel=1e-5)
    assert len(select(DUAL(), 12, train_probability=probability)) == 12  # fewer epochs than a window


def test_dual_draws_in_proportion_to_the_score_times_a_beta_density():
    probability = torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.6, 0.4], [0.7, 0.9, 0.6], [0.2, 0.8, 0.3]])
    data, drawn = one_class(train_probability=probability), torch.zeros(4)
    for seed in range(4000):
        drawn[DUAL(window=3).select(data, torch.tensor([1]), seed).index] += 1
    mean = probability.double().mean(1)
    b = 15 * (1 - float(mean.mean())) * (1 - 0.75**4)
    score = torch.tensor([dual_score(row.tolist(), 3) for row in probability])
    chance = score * torch.tensor([beta.pdf(float(each), 16 - b, b) for each in mean])
    assert torch.allclose(drawn / 4000, (chance / chance.sum()).float(), atol=0.03)


def test_dual_needs_two_epochs():
    with pytest.raises(UserError, match="expected train_probability of 2 epochs or more, got 1"):
        select(DUAL(), 1, train_probability=torch.rand(5, 1))
    with pytest.raises(UserError, match="window: expected 2 to 5, the epochs looked at; got 1"):
        DUAL(epochs=5, window=1)
