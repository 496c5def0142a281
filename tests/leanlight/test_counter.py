import torch
from scipy import stats

from leanlight.ops.counter import labels, noise, pixels


def test_noise_is_standard_normal_and_a_function_of_seed_and_item():
    index = torch.arange(2_000)
    drawn = noise(3, index, 16)
    assert stats.kstest(drawn.flatten().double().numpy(), "norm").pvalue > 1e-3
    order = torch.randperm(2_000)[:7]
    torch.testing.assert_close(noise(3, order, 16), drawn[order], rtol=0, atol=0)
    assert not torch.equal(noise(4, index, 16), drawn)


def test_labels_are_uniform_and_a_function_of_seed_and_item():
    index = torch.arange(5_000)
    drawn = labels(0, index, 7)
    assert stats.chisquare(drawn.bincount(minlength=7).numpy()).pvalue > 1e-3
    assert drawn.bincount().numel() == 7
    torch.testing.assert_close(labels(0, index[[4_000, 3]], 7), drawn[[4_000, 3]], rtol=0, atol=0)


def test_latents_and_labels_of_one_item_come_from_streams_of_their_own():
    index = torch.arange(4_000)
    first, drawn = noise(0, index, 1)[:, 0], labels(0, index, 2)
    assert abs(float(first[drawn == 0].mean() - first[drawn == 1].mean())) < 0.15


def test_pixels_are_uniform_and_a_function_of_seed_and_item():
    drawn = pixels(3, torch.arange(300), 64)
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (300, 64)
    counts = torch.bincount(drawn.flatten().long(), minlength=256)
    assert abs(drawn.double().mean() - 127.5) < 2
    assert (counts > 35).all()
    assert (counts < 125).all()
    assert torch.equal(pixels(3, torch.tensor([9, 2]), 64), drawn[[9, 2]])
    assert not torch.equal(pixels(4, torch.arange(300), 64), drawn)
