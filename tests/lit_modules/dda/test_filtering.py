"""The filter against cosines by hand."""

import math

import pytest
import torch

from lit_modules.dda.filtering import cosine_scores, keep_above, keep_top


def embeddings(sources=5, variations=3, size=7):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sources, size, generator=generator), torch.randn(sources, variations, size, generator=generator)


def by_hand(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


@pytest.mark.parametrize("centre", [False, True])
def test_scores_are_cosines_with_the_own_source(centre):
    source, variations = embeddings()
    mean = source.mean(0) if centre else None
    scores = cosine_scores(source, variations, mean)
    taken = mean.tolist() if centre else [0.0] * source.shape[1]

    def moved(vector):
        return [x - m for x, m in zip(vector.tolist(), taken, strict=True)]

    for i in range(len(source)):
        for k in range(variations.shape[1]):
            assert scores[i, k] == pytest.approx(by_hand(moved(source[i]), moved(variations[i, k])), abs=1e-6)


def test_the_same_embedding_scores_exactly_1_even_where_it_is_0_or_the_mean():
    source, _ = embeddings()
    source[0] = 0
    source[1] = source.mean(0)
    for mean in (None, source.mean(0), source[1]):
        scores = cosine_scores(source, source[:, None].expand(-1, 4, -1), mean)
        assert torch.equal(scores, torch.ones(5, 4))
        assert keep_above(scores, 1.0).all()


def test_raw_scores_do_not_change_when_embeddings_are_scaled():
    source, variations = embeddings()
    scaled = cosine_scores(source * torch.rand(5, 1).add(0.1), variations * torch.rand(5, 3, 1).add(0.1))
    torch.testing.assert_close(scaled, cosine_scores(source, variations))


def test_centring_separates_embeddings_that_are_not_negative():
    generator = torch.Generator().manual_seed(0)
    source, others = torch.rand(200, 64, generator=generator), torch.rand(200, 1, 64, generator=generator)
    assert cosine_scores(source, others).mean() > 0.7
    assert cosine_scores(source, others, source.mean(0)).mean().abs() < 0.02


def test_fewer_are_kept_as_omega_rises_and_none_above_1():
    scores = cosine_scores(*embeddings(50))
    kept = [int(keep_above(scores, omega).sum()) for omega in (-1.0, -0.5, 0.0, 0.5, 0.9, 1.01)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == scores.numel()
    assert kept[-1] == 0


def test_the_best_share_is_kept_and_of_equal_scores_the_first():
    scores = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.7, 0.5]])
    assert keep_top(scores, 0.5).tolist() == [[True, False], [True, False], [True, False]]
    assert not keep_top(scores, 0.0).any()
    assert keep_top(scores, 1.0).all()
