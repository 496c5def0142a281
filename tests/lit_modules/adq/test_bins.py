"""Bins against the rule spelled out in plain Python."""

import pytest
import torch

from leanlight.contracts import UserError
from lit_modules.adq import Binning
from lit_modules.selection import Features


def silent(done):
    pass


def one_class(items, seed=0, width=6):
    generator = torch.Generator().manual_seed(seed)
    values = {
        "embedding": torch.randn(items, width, generator=generator),
        "logits": torch.randn(items, 4, generator=generator),
    }
    return Features(torch.full((items,), 2), 4, values)


def cut(binning, own):
    found = binning(own, 2, silent)
    return found["bin"], found["order"]


def similarity_table(own, binning):
    """Similarities from explicit vectors, gradients by autograd."""
    x = own["embedding"].double()
    if binning.feature == "gradient":
        logits = own["logits"].double().requires_grad_()
        target = logits.softmax(1) if binning.double_softmax else logits
        loss = torch.nn.functional.cross_entropy(target, own.label, reduction="sum")
        (error,) = torch.autograd.grad(loss, logits)
        x = torch.stack([torch.cat([d, torch.outer(d, h).flatten()]) for d, h in zip(error, x, strict=True)])
    if binning.similarity == "neg_sqeuclid":
        return -torch.cdist(x, x).square()
    return 0.5 + 0.5 * torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)


def bins_by_hand(own, binning):
    """Bins as lists of items in the order picked, every gain summed anew."""
    table, left, bins = similarity_table(own, binning), list(range(len(own))), []
    for size in binning.sizes(len(own), 2)[:-1]:
        chosen = []
        for _ in range(size):
            gains = {}
            for x in (x for x in left if x not in chosen):
                if binning.submodular == "graph_cut":
                    gains[x] = sum(table[i, x] for i in left) - 2 * sum(table[j, x] for j in chosen)
                else:
                    covered = [max((table[i, j] for j in chosen), default=0.0) for i in left]
                    gains[x] = sum(max(table[i, x] - c, 0.0) for i, c in zip(left, covered, strict=True))
            # Two items that are nearest to each other tie, but for rounding; the first is taken.
            chosen.append(max(gains, key=lambda x: round(float(gains[x]), 9)))
        bins.append(chosen)
        left = [item for item in left if item not in chosen]
    return [*bins, left]


@pytest.mark.parametrize(
    "binning",
    [
        Binning(4),
        Binning(4, double_softmax=False),
        Binning(4, "geometric"),
        Binning(4, feature="embedding"),
        Binning(4, feature="embedding", similarity="neg_sqeuclid"),
        Binning(4, submodular="facility_location"),
        Binning(1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("seed", range(3))
def test_bins_are_those_of_re_summed_gains_in_the_order_of_the_picks(binning, seed):
    own = one_class(19, seed)
    bin, order = cut(binning, own)
    expected = bins_by_hand(own, binning)
    members = torch.arange(19)
    for number, items in enumerate(expected):
        assert members[bin == number][order[bin == number].argsort()].tolist() == items


@pytest.mark.parametrize("items", [10, 11, 15, 19, 143, 5421])
@pytest.mark.parametrize("num_bins", [1, 2, 7, 10])
def test_equal_bins_differ_by_one_item_at_most(items, num_bins):
    sizes = Binning(num_bins).sizes(items, 0)
    assert len(sizes) == num_bins
    assert sum(sizes) == items
    assert max(sizes) - min(sizes) <= 1


def test_geometric_sizes_are_those_of_the_authors_sampler():
    sizes = Binning(10, "geometric").sizes(5000, 0)
    assert sizes == [500, 450, 405, 364, 328, 295, 266, 239, 215, 1938]
    assert min(Binning(10, "geometric").sizes(11, 0)) == 1


def test_bins_partition_a_class():
    bin, order = cut(Binning(), one_class(143))
    assert bin.bincount().tolist() == Binning().sizes(143, 0)
    for number in range(10):
        assert sorted(order[bin == number].tolist()) == list(range(int((bin == number).sum())))


def test_progress_counts_the_picks():
    told = []
    Binning()(one_class(57), 2, told.append)
    assert sum(told) == 57 - Binning().sizes(57, 0)[-1]


def test_a_class_with_fewer_items_than_bins_is_refused_by_name():
    with pytest.raises(UserError, match="num_bins: expected 1 to 9, the items of class 3; got 10"):
        Binning().sizes(9, 3)
