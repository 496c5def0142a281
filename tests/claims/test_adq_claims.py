"""What selection by bins does and does not do for accuracy, on real digits and on clusters of unequal weight."""

import functools

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from datamodules import ImageDataModule
from lit_modules.adq import ADQ, DQ, random_views, texture
from lit_modules.selection import Features, GraphCut, Herding, Random, Work, class_budget

SEEDS = range(20)
GRAPH_CUT = GraphCut(feature="embedding")
DQ_PIXELS, ADQ_PIXELS = DQ(feature="embedding"), ADQ(feature="embedding")


class Remembering(Work):
    """Cuts each class once, whatever the budget and seed."""

    def __init__(self):
        self.done = {}

    def one(self, features, label, step, advance=None):
        if not hasattr(step, "num_bins"):
            return super().one(features, label, step)
        if (step, label) not in self.done:
            self.done[step, label] = super().one(features, label, step)
        return self.done[step, label]


@functools.cache
def digits():
    """Digits with their pixels as features, their test part, and work on them."""
    data = ImageDataModule(dataset="digits")
    data.setup()
    image = data.train_split.images.float() / 255
    views = random_views(image, 2, torch.Generator().manual_seed(0))
    values = {"embedding": image.flatten(1), "texture": texture(image), "views": views.flatten(2)}
    features = Features(data.train_split.labels, 10, values)
    test = data.test_split.images.float().flatten(1) / 255, data.test_split.labels
    return features, test, Remembering()


@functools.cache
def clusters():
    """Five classes of six clusters, from half of a class to a twenty-fifth of it; those of the test part are equal."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(5, 6, 16, generator=generator) * 1.5

    def items(counts):
        mode = torch.arange(6).repeat_interleave(torch.tensor(counts)).repeat(5)
        label = torch.arange(5).repeat_interleave(sum(counts))
        return centre[label, mode] + torch.randn(len(label), 16, generator=generator), label

    x, label = items([150, 60, 36, 24, 18, 12])
    return Features(label, 5, {"embedding": x}), items([50] * 6), Remembering()


def score(train, test, seed):
    """Accuracy of ridge regression on 400 random ReLU features, in percent."""
    (x, label), (test_x, test_label) = train, test
    mean, std = x.mean(0), x.std(0) + 0.1
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(x.shape[1], 400, generator=generator), torch.randn(400, generator=generator)
    hidden, test_hidden = (
        ((((each - mean) / std) @ weight) / x.shape[1] ** 0.5 + bias).relu().double() for each in (x, test_x)
    )
    target = F.one_hot(label).double() - 1 / (label.max() + 1)
    solution = torch.linalg.solve(hidden.T @ hidden + 1.0 * torch.eye(400).double(), hidden.T @ target)
    return float(((test_hidden @ solution).argmax(1) == test_label).double().mean() * 100)


@functools.cache
def scores(data, rule, keep):
    """Accuracies (seeds,) in percent of what a rule keeps."""
    features, test, work = data()
    found = []
    for seed in SEEDS:
        picked = rule.select(features, class_budget(features, keep), seed, work).index
        found.append(score((features["embedding"][picked], features.label[picked]), test, seed))
    return torch.tensor(found)


@pytest.mark.parametrize("data", [digits, clusters])
def test_spread_rises_with_the_bin(data):
    features, _, work = data()
    spread = DQ_PIXELS.select(features, class_budget(features, 0.1), 0, work).details["bins"]["spread"]
    assert spearmanr(range(10), spread).statistic >= 0.9


def test_texture_falls_with_the_bin_on_digits():
    features, _, work = digits()
    level = ADQ_PIXELS.select(features, class_budget(features, 0.1), 0, work).details["bins"]["texture"]
    assert spearmanr(range(10), level).statistic <= -0.9


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.1, 0.2, 0.4])
def test_bins_repair_what_one_pass_of_graph_cut_lacks_on_digits(keep):
    one_pass = scores(digits, GRAPH_CUT, keep).mean()
    assert scores(digits, DQ_PIXELS, keep).mean() > one_pass + 1
    assert scores(digits, Random(), keep).mean() > one_pass + 1


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.05, 0.1, 0.2])
def test_one_pass_of_graph_cut_misses_rare_clusters_that_bins_hold(keep):
    assert scores(clusters, DQ_PIXELS, keep).mean() > scores(clusters, GRAPH_CUT, keep).mean() + 15


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.05, 0.1, 0.2, 0.4])
def test_adq_is_not_worse_than_dq_by_more_than_two_points_on_digits(keep):
    assert scores(digits, ADQ_PIXELS, keep).mean() > scores(digits, DQ_PIXELS, keep).mean() - 2


@pytest.mark.slow
def test_herding_towards_the_mean_is_not_the_herding_away_from_it_of_a_public_code():
    right, wrong = (scores(digits, Herding(deepcore_compat=compat), 0.1).mean() for compat in (False, True))
    assert right > wrong + 30
    assert right > scores(digits, Random(), 0.1).mean()
