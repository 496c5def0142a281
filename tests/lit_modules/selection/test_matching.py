"""Rules by gradients against the same written out with plain least squares and autograd."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch.nn.functional import cross_entropy

from leanlight.contracts import UserError
from lit_modules.selection import Features, Glister, GradMatch, error_of
from lit_modules.selection.matching import nonnegative


def one_class(count=25, classes=3, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = {
        "embedding": torch.rand(count, width, generator=generator),
        "logits": torch.randn(count, classes, generator=generator),
    }
    return Features(torch.zeros(count, dtype=torch.int64), 1, values)


def gradients(data):
    error, inputs = error_of(data["logits"], data.label), data["embedding"].double()
    return torch.cat([error, (error[:, :, None] * inputs[:, None]).flatten(1)], 1).numpy()


def matched(rows, count, ridge):
    """Orthogonal matching pursuit with ridge least squares as rows below the gradients."""
    mean, chosen, weight = rows.mean(0), [], np.zeros(0)
    for _ in range(count):
        fit = rows @ (mean - weight @ rows[chosen] if chosen else mean)
        fit[chosen] = -np.inf
        chosen.append(int(fit.argmax()))
        tall = np.vstack([rows[chosen].T, np.sqrt(ridge) * np.eye(len(chosen))])
        target = np.concatenate([mean, np.zeros(len(chosen))])
        weight = np.linalg.lstsq(tall, target, rcond=None)[0]
    return chosen, nnls(tall, target)[0]


@pytest.mark.parametrize("ridge", [1.0, 1e-3])
@pytest.mark.parametrize("seed", range(4))
def test_grad_match_is_matching_pursuit_with_weights_that_are_not_negative(ridge, seed):
    data = one_class(seed=seed)
    chosen, weight = matched(gradients(data), 8, ridge)
    picks = GradMatch(ridge).select(data, torch.tensor([8]), seed=0)
    assert picks.index.tolist() == [item for item, each in zip(chosen, weight, strict=True) if each > 1e-9]
    assert picks.weight.tolist() == pytest.approx([25 * each for each in weight if each > 1e-9], rel=1e-4)


def test_items_of_weight_0_are_left_out():
    data = one_class(seed=3)
    chosen, weight = matched(gradients(data), 8, 1e-6)
    assert sum(weight == 0) == 1
    picks = GradMatch(1e-6).select(data, torch.tensor([8]), seed=0)
    assert picks.index.tolist() == [item for item, each in zip(chosen, weight, strict=True) if each > 0]
    assert picks.order.tolist() == list(range(7))


def test_the_least_squares_without_negative_numbers():
    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 30):
        rows, target = (torch.randn(40, n, dtype=torch.float64, generator=generator) for n in (size, 1))
        found = nonnegative(rows.T @ rows, (rows.T @ target)[:, 0])
        assert found.tolist() == pytest.approx(nnls(rows.numpy(), target[:, 0].numpy())[0].tolist(), abs=1e-9)


def stepped(data, count, step):
    """Glister with the last layer's weights moved and gradients by autograd."""
    inputs = torch.cat([torch.ones(len(data), 1), data["embedding"]], 1).double()
    rows = torch.tensor(gradients(data)).view(len(data), -1)
    logits, chosen = data["logits"].double(), []
    classes = logits.shape[1]

    def layers(vector):
        return torch.cat([vector[:classes, None], vector[classes:].view(classes, -1)], 1)

    for _ in range(count):
        layer = torch.zeros(classes, inputs.shape[1], dtype=torch.float64)
        if chosen:
            layer -= step * layers(rows[chosen].mean(0))
        layer.requires_grad_()
        loss = cross_entropy(logits + inputs @ layer.T, data.label)
        (slope,) = torch.autograd.grad(loss, layer)
        gain = torch.stack([(layers(row) * slope).sum() for row in rows])
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
    return chosen


def test_glister_follows_the_gradient_after_a_step_on_those_chosen():
    budget = torch.tensor([10])
    for seed in range(3):
        data = one_class(seed=seed)
        assert Glister(step=5.0).select(data, budget, seed=0).index.tolist() == stepped(data, 10, 5.0)
    still = Glister(step=5.0, deepcore_compat=True).select(data, budget, seed=0).index.tolist()
    assert still == stepped(data, 10, 0.0) != stepped(data, 10, 5.0)


def test_a_ridge_of_0_is_refused():
    with pytest.raises(UserError, match="ridge: expected more than 0, got 0"):
        GradMatch(0)
