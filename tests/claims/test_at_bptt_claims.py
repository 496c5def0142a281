"""What truncation does to meta-gradients, on real digits."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datamodules import ImageDataModule
from leanlight.contracts import isolated_rng
from lit_modules.at_bptt import Adjoint, InnerOptimizer
from lit_modules.at_bptt.inner import BatchSampler, FlatNetwork, InnerProblem, SyntheticData
from lit_modules.at_bptt.synthetic import noise_images, one_hot_labels

STEPS, WINDOW = 80, 20


@functools.cache
def digits():
    data = ImageDataModule(dataset="digits")
    data.setup()
    return (data.train_split.images.float() / 255 - 0.305) / 0.376, data.train_split.labels


def gradient(seed, start, length):
    """Meta-gradient (D,) of one fresh MLP with its window at `start`."""
    image, label = digits()
    with isolated_rng(seed):
        network = FlatNetwork(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))
    problem = InnerProblem(network, InnerOptimizer(lr=0.01), None)
    data = SyntheticData(noise_images(10, (1, 8, 8), torch.Generator().manual_seed(0)), one_hot_labels(10, 1))
    batches = BatchSampler(10, 1).draw(start + length, torch.Generator().manual_seed(seed), torch.device("cpu"))
    state = problem.optimizer.start(network.parameters())
    state = problem.trained(state, data, batches[:start])

    def outer_loss(theta):
        yield F.cross_entropy(network(theta, image), label)

    result = Adjoint().meta_gradient(problem, state, data, batches[start:], outer_loss, False)
    return result.images.flatten()


def mean_cosine(gradients):
    return torch.stack([F.cosine_similarity(a, b, 0) for a, b in itertools.combinations(gradients, 2)]).mean()


@pytest.mark.slow
def test_truncation_makes_meta_gradients_smaller_and_more_alike_over_initialisations():
    starts = torch.randint(STEPS - WINDOW + 1, (25,), generator=torch.Generator().manual_seed(0)).tolist()
    full = [gradient(seed, 0, STEPS) for seed in range(25)]
    random = [gradient(seed, start, WINDOW) for seed, start in enumerate(starts)]
    last = [gradient(seed, STEPS - WINDOW, WINDOW) for seed in range(25)]
    norm = {name: torch.stack(g).norm(dim=1).mean() for name, g in (("full", full), ("random", random), ("last", last))}
    assert norm["full"] > 3 * norm["random"]
    assert norm["random"] > 1.5 * norm["last"]
    assert mean_cosine(full) < mean_cosine(random)
    assert mean_cosine(full) < mean_cosine(last)
