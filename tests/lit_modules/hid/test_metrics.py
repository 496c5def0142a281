"""Metrics equal loops over cases, and torchmetrics' own retrieval metrics."""

import math

import pytest
import torch
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

from leanlight.contracts import UserError
from leanlight.contracts.sessions import Catalogue
from lit_modules.hid.metrics import MRR, NDCG, Coverage, HitRate, MeanPopularity, TailShare, ranking_metrics

M, KS = 30, (3, 5, 10)


def a_catalogue():
    clicks = torch.cat([torch.zeros(1).long(), torch.arange(M, 0, -1) ** 2])
    none = torch.zeros(0, dtype=torch.int64)
    head = torch.arange(M + 1).clamp(min=0) <= 6
    head[0] = False
    return Catalogue(tuple(map(str, range(1, M + 1))), (), none, none, clicks, head)


def cases(count=50, seed=0):
    """Lists of the ten best items by drawn scores, the scores, and targets that are often near the top."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, M, generator=generator)
    scores[:, : M // 2] += 0.3
    order = scores.argsort(1, descending=True) + 1
    place = (torch.rand(count, generator=generator) ** 2 * M).long()
    return order[:, :10], scores, order.gather(1, place[:, None])[:, 0]


def by_loops(recommended, target, catalogue, k):
    """Every metric, one case after the other, by sets of Python."""
    lists, targets = [each[:k] for each in recommended.tolist()], target.tolist()
    head, clicks = catalogue.head.tolist(), catalogue.clicks.tolist()
    tail = {item for item in range(1, M + 1) if not head[item]}
    found = {}
    for which, kept in (("", set(range(1, M + 1))), ("tail_", tail)):
        hits, reciprocals, gains = [], [], []
        for best, wanted in zip(lists, targets, strict=True):
            if wanted not in kept:
                continue
            rank = best.index(wanted) + 1 if wanted in best else math.inf
            hits.append(rank <= k)
            reciprocals.append(1 / rank)
            gains.append(1 / math.log2(1 + rank))
        for name, values in (("hr", hits), ("mrr", reciprocals), ("ndcg", gains)):
            found[f"{which}{name}_{k}"] = sum(values) / len(values)
    union = set().union(*lists)
    exposure = [sum(item in best for best in lists) for item in range(1, M + 1)]
    differences = sum(abs(one - other) for one in exposure for other in exposure)
    return found | {
        f"tail_share_{k}": sum(len(tail & set(best)) / k for best in lists) / len(lists),
        f"coverage_{k}": len(union) / M,
        f"tail_coverage_{k}": len(union & tail) / len(tail),
        f"gini_{k}": differences / (2 * M * sum(exposure)),
        f"popularity_{k}": sum(clicks[item] for best in lists for item in best) / (k * len(lists)),
    }


@pytest.mark.parametrize("batch", [7, 50])
def test_all_metrics_are_those_of_loops_over_cases(batch):
    recommended, _, target = cases()
    metrics = ranking_metrics(a_catalogue(), KS)
    for part in torch.arange(50).split(batch):
        metrics.update(recommended[part], target[part])
    got = metrics.compute()
    expected = {}
    for k in KS:
        expected |= by_loops(recommended, target, a_catalogue(), k)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].item() == pytest.approx(value, rel=1e-5), name
    assert 0 < expected["tail_hr_3"] < expected["hr_10"] < 1
    assert 0 < expected["tail_coverage_3"] < 1


@pytest.mark.parametrize("k", KS)
def test_hits_ranks_and_gains_are_those_of_torchmetrics_retrieval(k):
    recommended, scores, target = cases(seed=1)
    relevant = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, target[:, None] - 1, True)
    query = torch.arange(len(scores))[:, None].expand_as(scores)
    for ours, theirs in (
        (HitRate(k), RetrievalHitRate(top_k=k)),
        (MRR(k), RetrievalMRR(top_k=k)),
        (NDCG(k), RetrievalNormalizedDCG(top_k=k)),
    ):
        expected = theirs(scores.flatten(), relevant.flatten(), indexes=query.flatten())
        torch.testing.assert_close(ours(recommended, target), expected)


def test_a_case_by_hand_tells_items_from_their_columns():
    """Item 1 is in column 0 and is the only head item: counted by columns, all of this would be others' numbers."""
    tail = torch.tensor([False, False, True, True])
    recommended, target = torch.tensor([[1, 3], [3, 2]]), torch.tensor([3, 1])
    assert HitRate(2)(recommended, target) == 0.5
    assert HitRate(2, tail)(recommended, target) == 1.0
    assert MRR(2)(recommended, target) == 0.25
    assert TailShare(2, tail)(recommended, target) == 0.75
    assert TailShare(1, tail)(recommended, target) == 0.5
    assert Coverage(1, 3)(recommended, target) == pytest.approx(2 / 3)
    assert Coverage(1, 3, tail)(recommended, target) == 0.5
    assert MeanPopularity(2, torch.tensor([0, 9, 2, 1]))(recommended, target) == pytest.approx(13 / 4)


def test_an_epoch_forgets_the_one_before():
    recommended, _, target = cases()
    metrics = ranking_metrics(a_catalogue(), KS)
    metrics.update(recommended, target)
    first = metrics.compute()
    metrics.reset()
    metrics.update(recommended[:5], target[:5])
    assert metrics.compute()["coverage_3"] < first["coverage_3"]
    metrics.reset()
    metrics.update(recommended, target)
    assert all(torch.equal(value, first[name]) for name, value in metrics.compute().items())


def test_a_metric_leaves_nothing_in_a_state_dict():
    assert not ranking_metrics(a_catalogue(), KS).state_dict()


def test_without_a_case_in_the_tail_its_accuracy_is_unknown():
    recommended, _, _ = cases()
    metrics = ranking_metrics(a_catalogue(), KS)
    metrics.update(recommended, torch.ones(50).long())
    got = metrics.compute()
    assert got["tail_hr_3"].isnan()
    assert got["hr_3"].isfinite()


def test_lists_longer_than_the_catalogue_or_shorter_than_k_are_refused():
    with pytest.raises(UserError, match=r"^topk: expected at most 30, the number of items, got 31$"):
        ranking_metrics(a_catalogue(), [5, 31])
    with pytest.raises(UserError, match=r"^k: expected lists of at least 3 items, got 2$"):
        HitRate(3).update(torch.ones(4, 2).long(), torch.ones(4).long())
