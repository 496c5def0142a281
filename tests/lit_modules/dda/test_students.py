"""Losses and heads of students against closed forms, in float64."""

import math

import pytest
import torch
from torch import nn

from leanlight.contracts import UserError
from lit_modules.dda import AlignHead, RotationHead, kd_losses, rotation_labels, rotations


def kl_of_two_classes(teacher, student, temperature):
    """τ² KL of one item with two classes, by its sigmoid."""
    p, q = (1 / (1 + math.exp((b - a) / temperature)) for a, b in (teacher, student))
    return temperature**2 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_the_terms_have_the_values_of_hand(temperature):
    student, teacher = [(0.5, -1.0), (2.0, 3.0)], [(3.0, 0.0), (-1.0, 1.5)]
    maps = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[1.5, 4.0]]).double()
    s, t = (torch.tensor(rows).double() for rows in (student, teacher))
    terms = kd_losses("kl_ce_fea", s, t, torch.tensor([0, 0]), temperature, maps)
    kl = sum(kl_of_two_classes(b, a, temperature) for a, b in zip(student, teacher, strict=True)) / 2
    ce = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(1.0))) / 2
    expected = {"distillation": kl, "cross_entropy": ce, "features": (0.5**2 + 2.0**2) / 2}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], torch.tensor(value, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_recipes_take_their_terms_alone():
    logits, label = torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert list(kd_losses("kl", logits, logits, label)) == ["distillation"]
    assert list(kd_losses("ce", logits, logits, label)) == ["cross_entropy"]
    with pytest.raises(UserError, match="maps: expected"):
        kd_losses("kl_ce_fea", logits, logits, label)
    with pytest.raises(UserError, match="recipe: expected one of kl, kl_ce_fea, ce"):
        kd_losses("kd", logits, logits, label)


def test_rotations_of_an_image_follow_one_another():
    x, y = torch.rand(3, 2, 5, 5), torch.tensor([2, 0, 7])
    turned, label = rotations(x), rotation_labels(y)
    assert turned.shape == (12, 2, 5, 5)
    for i in range(3):
        assert torch.equal(turned[4 * i], x[i])
        assert torch.equal(turned[4 * i + 1], x[i].transpose(1, 2).flip(1))
        assert torch.equal(turned[4 * i + 2], x[i].flip(1, 2))  # by 180 degrees
        assert torch.equal(turned[4 * i + 3], x[i].transpose(1, 2).flip(2))
        assert label[4 * i : 4 * i + 4].tolist() == [4 * int(y[i]) + r for r in range(4)]


@pytest.mark.parametrize(("classes", "low", "high"), [(10, 2.7190, 4.6856), (100, 4.9945, 6.9912)])
def test_a_normalised_head_has_a_loss_within_bounds(classes, low, high):
    head, label = RotationHead(32, classes), torch.randint(4 * classes, (64,))
    loss = nn.functional.cross_entropy
    output = head(torch.randn(64, 32) * 100)
    torch.testing.assert_close(output.norm(dim=1), torch.ones(64))
    assert low - 1e-3 <= loss(output, label) <= high + 1e-3
    # Where the gradient of the loss is along the vector: these two alone are the best and the worst of length 1.
    best = nn.functional.one_hot(label, 4 * classes).float()
    worst = nn.functional.normalize(-(best - 1 / (4 * classes)))
    best = nn.functional.normalize(best - 1 / (4 * classes))
    assert loss(best, label) == pytest.approx(low, abs=1e-3)
    assert loss(worst, label) == pytest.approx(high, abs=1e-3)
    free = RotationHead(32, classes, normalize=False)
    for layer in (free.hidden, free.output):
        layer.weight.data *= 1000
    assert loss(free(torch.randn(64, 32)), label) > high


def test_a_head_begins_anew_from_its_seed():
    head, other = RotationHead(30, 5, seed=3), RotationHead(30, 5, seed=4)
    first = {name: value.clone() for name, value in head.state_dict().items()}
    assert not torch.equal(first["hidden.weight"], other.hidden.weight)
    assert first["hidden.weight"].std() == pytest.approx(0.02, rel=0.1)
    with torch.no_grad():
        head.hidden.bias.add_(1)
    head.reset(4)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in head.state_dict().items())
    head.reset(3)
    assert all(torch.equal(value, first[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (3, 5)])
def test_a_map_is_aligned_to_any_size(size):
    align = AlignHead((3, *size), (6, 4, 4))
    assert align(torch.randn(2, 3, *size)).shape == (2, 6, 4, 4)
    convolutions = [m for m in align if isinstance(m, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0]) for c in convolutions] == [
        (3, 12, 1),
        (12, 12, 3),
        (12, 6, 1),
    ]
    assert all(c.bias is None for c in convolutions)
    assert isinstance(align[0], nn.Identity) == (size == (4, 4))


def test_pooling_before_alignment_keeps_the_mean():
    align = AlignHead((3, 8, 8), (6, 4, 4))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(align[0](x), x.view(2, 3, 4, 2, 4, 2).mean((3, 5)))
