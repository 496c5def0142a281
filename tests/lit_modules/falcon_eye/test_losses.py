"""The loss of answers against transformers' own, and what it lets through to the question."""

import pytest
import torch
import torch.nn.functional as F
from squares import labelled

from leanlight.contracts import IGNORED, learned_positions
from lit_modules.falcon_eye import SafetyEncoder
from lit_modules.falcon_eye.losses import token_loss


def made(rows=3, length=7, words=11):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(rows, length, words, generator=generator, dtype=torch.float64)
    labels = torch.randint(words, (rows, length), generator=generator)
    labels[0, :4] = labels[1, :5] = labels[2, :3] = labels[1, 6:] = IGNORED
    weights = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    return logits, labels, weights


def test_it_is_the_weighted_sum_over_learned_tokens_each_predicted_by_the_position_before():
    logits, labels, weights = made()
    expected = number = 0.0
    for row in range(3):
        for place in range(1, 7):
            if (word := int(labels[row, place])) != IGNORED:
                expected -= float(weights[row, place] * logits[row, place - 1].float().log_softmax(0)[word])
                number += float(weights[row, place])
    loss, weight = token_loss(logits, labels, weights)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(weight) == pytest.approx(number)


def test_positions_before_the_first_learned_token_can_be_left_out():
    logits, labels, weights = made()
    keep = learned_positions(labels)
    assert keep == 5  # the first learned token is the fourth of seven, and its predecessor counts
    for part, whole in zip(
        token_loss(logits[:, -keep:], labels, weights), token_loss(logits, labels, weights), strict=True
    ):
        torch.testing.assert_close(part, whole)
    assert learned_positions(torch.full((2, 4), IGNORED)) == 1


def test_a_model_has_the_loss_that_transformers_computes(backbone):
    encoder = SafetyEncoder(backbone)
    batch = encoder.encode([labelled(number) for number in range(3)], torch.arange(3), targets=True)
    output = backbone.model(**encoder.batch_inputs(batch))
    loss, number = token_loss(output.logits, batch.labels, torch.ones(batch.labels.shape))
    torch.testing.assert_close(loss / number, output.loss)
    assert int(number) == int((batch.labels != IGNORED).sum())


def test_logits_of_the_question_have_no_gradient():
    logits, labels, _ = made()
    logits.requires_grad_()
    token_loss(logits, labels, torch.ones(labels.shape))[0].backward()
    learned = F.pad(labels[:, 1:] != IGNORED, (0, 1))  # the position that predicts a learned token
    assert logits.grad[~learned].abs().max() == 0
    assert logits.grad[learned].abs().sum(1).min() > 0
