"""Losses of classifiers: an item of weight 3 counts like three items."""

import pytest
import torch
import torch.nn.functional as F

from lit_modules.classifier import cross_entropy, distillation_loss

TIMES = torch.tensor([1, 3, 0, 2, 5])


def logits(items=5, classes=4):
    return torch.randn(items, classes, dtype=torch.float64)


def labels(kind):
    return torch.randint(4, (5,)) if kind == "classes" else torch.rand(5, 4, dtype=torch.float64).softmax(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["classes", "soft"])
def test_a_weight_counts_like_as_many_items(kind, smoothing):
    x, label = logits(), labels(kind)
    repeated = x.repeat_interleave(TIMES, 0), label.repeat_interleave(TIMES, 0)
    expected = F.cross_entropy(*repeated, label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(x, label, TIMES.double() / 7, smoothing), expected)


@pytest.mark.parametrize("kind", ["classes", "soft"])
def test_without_weights_it_is_the_mean_bit_for_bit(kind):
    x, label = logits().float(), labels(kind)
    label = label.float() if label.is_floating_point() else label
    assert torch.equal(cross_entropy(x, label, label_smoothing=0.1), F.cross_entropy(x, label, label_smoothing=0.1))


def test_distillation_is_weighted_alike():
    student, teacher = logits(), logits()
    repeated = [x.repeat_interleave(TIMES, 0) for x in (student, teacher)]
    torch.testing.assert_close(
        distillation_loss(student, teacher, 2.0, TIMES.double()), distillation_loss(*repeated, 2.0)
    )
