"""Selection rules against brute force."""

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.selection import herding_subset, random_subset


def test_a_random_subset_has_so_many_distinct_items_of_each_class_class_by_class():
    labels = torch.randint(4, (100,), generator=torch.Generator().manual_seed(0))
    chosen = random_subset(labels, 4, 5, torch.Generator().manual_seed(1))
    assert chosen.unique().numel() == 20
    assert torch.equal(labels[chosen], torch.arange(4).repeat_interleave(5))
    assert torch.equal(chosen, random_subset(labels, 4, 5, torch.Generator().manual_seed(1)))


def test_every_item_is_equally_likely():
    labels, counts = torch.arange(12) % 2, torch.zeros(12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3000):
        counts[random_subset(labels, 2, 2, generator)] += 1
    assert torch.allclose(counts / 3000, torch.full((12,), 2 / 6), atol=0.04)


def nearest_next(features, chosen):
    """The item that brings the mean of the chosen ones nearest to the mean of all, by trying each."""
    best, smallest = -1, float("inf")
    for item in range(len(features)):
        if item not in chosen:
            mean = sum(features[i] for i in [*chosen, item]) / (len(chosen) + 1)
            distance = float((mean - features.mean(0)).norm())
            if distance < smallest:
                best, smallest = item, distance
    return best


def test_herding_takes_what_trying_every_item_takes():
    generator = torch.Generator().manual_seed(0)
    features, labels = torch.randn(40, 3, generator=generator).double(), torch.arange(40) % 2
    got = herding_subset(features, labels, 2, 7).view(2, 7)
    for label in (0, 1):
        members, chosen = (labels == label).nonzero()[:, 0], []
        while len(chosen) < 7:
            chosen.append(nearest_next(features[members], chosen))
        assert got[label].tolist() == members[chosen].tolist()


def test_herding_follows_the_class_mean():
    features, labels = torch.randn(60, 5).double(), torch.arange(60) % 2
    chosen = herding_subset(features, labels, 2, 6)
    assert chosen.unique().numel() == 12
    for c in (0, 1):
        members, mean = features[labels == c], features[labels == c].mean(0)
        picked = features[chosen[c * 6 : c * 6 + 6]]
        assert torch.equal(picked[0], members[(members - mean).norm(dim=1).argmin()])
        random = torch.stack([members[torch.randperm(30)[:6]].mean(0) for _ in range(200)])
        assert (picked.mean(0) - mean).norm() < (random - mean).norm(dim=1).quantile(0.05)


def test_herding_of_a_whole_class_takes_all_of_it():
    labels = torch.tensor([1, 0, 1, 0, 1, 0])
    chosen = herding_subset(torch.randn(6, 2), labels, 2, 3)
    assert sorted(chosen[:3].tolist()) == [1, 3, 5]
    assert sorted(chosen[3:].tolist()) == [0, 2, 4]


@pytest.mark.parametrize("rule", [random_subset, lambda *x: herding_subset(torch.zeros(5, 2), *x[:3])])
def test_more_items_than_a_class_has_are_refused(rule):
    with pytest.raises(UserError, match="per_class: expected 1 to 2, the items of class 1; got 3"):
        rule(torch.tensor([0, 0, 0, 1, 1]), 2, 3, torch.Generator())
