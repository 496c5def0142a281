"""Scores against plain Python, scipy and published numbers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from leanlight.contracts import UserError
from lit_modules.adq import random_views, texture
from lit_modules.adq.scores import (
    _heads,
    bin_spread,
    contrastive_diversity,
    importance,
    info_nce,
    mean_cosine_diversity,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def texture_by_scipy(image, patch):
    """The texture level of one image (C, H, W), patch by patch in float64."""
    grey = image[0] if len(image) == 1 else 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    high, wide = min(patch, grey.shape[0]), min(patch, grey.shape[1])
    levels = []
    for top in range(0, grey.shape[0] - high + 1, high):
        for left in range(0, grey.shape[1] - wide + 1, wide):
            part = grey[top : top + high, left : left + wide].double().numpy()
            edges = [np.abs(ndimage.sobel(part, axis, mode="mirror")) for axis in (0, 1)]
            levels.append((edges[0] / 2 + edges[1] / 2).mean())
    return np.mean(levels)


@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 32, 32), (3, 70, 100), (1, 28, 28), (1, 8, 8), (3, 20, 80)])
def test_texture_is_scipys_sobel_averaged_over_whole_patches(shape):
    image = torch.rand(5, *shape, generator=generator())
    expected = torch.tensor([texture_by_scipy(each, 32) for each in image])
    assert torch.allclose(texture(image).double(), expected, rtol=1e-5)


def test_texture_of_a_constant_image_is_0_and_of_an_edge_in_closed_form():
    assert texture(torch.full((2, 3, 32, 32), 0.7)).abs().max() < 1e-5
    edge = torch.zeros(1, 1, 32, 32)
    edge[..., 16:] = 1
    # |Sobel_x| is 4 in the two columns at the edge, |Sobel_y| is 0.
    assert texture(edge).item() == pytest.approx(0.5 * 4 * 2 / 32)
    assert texture(edge.transpose(2, 3)).item() == pytest.approx(0.5 * 4 * 2 / 32)


def test_an_edge_between_two_patches_is_no_texture():
    edge = torch.zeros(1, 1, 32, 64)
    edge[..., 32:] = 1
    assert texture(edge).item() == 0


def test_noise_has_more_texture_than_a_slope():
    slope = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    assert texture(torch.rand(1, 1, 32, 32, generator=generator())) > 5 * texture(slope)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 4, 8, 8),
        torch.zeros(1, 8, 8),
        torch.zeros(2, 1, 1, 8),
    ],
)
def test_texture_refuses_other_than_grey_or_rgb_floats(image):
    with pytest.raises(UserError, match=r"image: expected float \(N, 1 or 3, H, W\)"):
        texture(image)


def crops_of_ramps(height, width, count, seed=0):
    """Views of images whose channels are row and column of each pixel, which say where a view was cut."""
    rows = torch.arange(height).view(1, 1, height, 1).expand(1, 1, height, width)
    columns = torch.arange(width).view(1, 1, 1, width).expand(1, 1, height, width)
    return random_views(torch.cat([rows, columns], dim=1).float(), count, generator(seed))[0]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (24, 40)])
def test_a_view_is_a_crop_resized_bilinearly_and_perhaps_mirrored(height, width):
    image = torch.rand(1, 1, height, width, generator=generator())
    views = random_views(image, 200, generator(3))[0, :, 0]
    mirrored = 0
    for view, (rows, columns) in zip(views, crops_of_ramps(height, width, 200, seed=3), strict=True):
        top, bottom = round(rows.min().item()), round(rows.max().item())
        left, right = round(columns.min().item()), round(columns.max().item())
        crop = image[:, :, top : bottom + 1, left : right + 1]
        expected = F.interpolate(crop, (height, width), mode="bilinear", align_corners=False)[0, 0]
        if columns[0, 0] > columns[0, -1]:
            expected, mirrored = expected.flip(1), mirrored + 1
        assert torch.allclose(view, expected, atol=1e-4)
    assert 70 < mirrored < 130


def test_crops_have_8_to_100_percent_of_the_area_and_lie_everywhere():
    rows, columns = crops_of_ramps(64, 64, 2000).unbind(1)
    high, wide = rows.amax((1, 2)) - rows.amin((1, 2)) + 1, columns.amax((1, 2)) - columns.amin((1, 2)) + 1
    area, ratio = high * wide / 64**2, wide / high
    assert 0.07 < area.min() < 0.1
    assert 0.97 < area.max() <= 1
    assert ratio.min() > 0.7
    assert ratio.max() < 1.43
    assert area.mean() == pytest.approx(0.5, abs=0.06)
    assert rows.amin() == columns.amin() == 0
    assert rows.amax().round() == columns.amax().round() == 63


def test_a_wide_strip_falls_back_to_the_largest_crop_that_is_not_too_wide():
    rows, columns = crops_of_ramps(4, 400, 50).unbind(1)
    assert (columns.amax((1, 2)) - columns.amin((1, 2))).max() <= 5
    assert rows.amax().round() == 3


def test_views_are_a_function_of_the_generator_and_with_one_a_picture_of_the_picture_alone():
    image = torch.rand(6, 3, 16, 16, generator=generator())
    assert torch.equal(random_views(image, 2, generator(1)), random_views(image, 2, generator(1)))
    assert not torch.equal(random_views(image, 2, generator(1)), random_views(image, 2, generator(2)))
    together = random_views(image, 2, [generator(seed) for seed in range(6)])
    parts = [random_views(image[i : i + 2], 2, [generator(i), generator(i + 1)]) for i in (0, 2, 4)]
    assert torch.equal(together, torch.cat(parts))
    assert together.shape == (6, 2, 3, 16, 16)


def test_diversity_of_equal_rows_is_1_and_of_n_orthonormal_ones_n():
    same, orthonormal = torch.ones(6, 1, 8), torch.eye(8)[:6].unsqueeze(1)
    bins = torch.tensor([0] * 6 + [1] * 6)
    found = mean_cosine_diversity(torch.cat([same, orthonormal]), bins, 2, heads=0)
    assert found.tolist() == pytest.approx([1, 6])


def test_rows_that_cancel_out_count_as_orthogonal():
    views = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])
    assert mean_cosine_diversity(views, torch.tensor([0]), 1, heads=0).item() == pytest.approx(2)


@pytest.mark.parametrize("heads", [0, 1, 3])
def test_diversity_is_one_over_the_mean_of_all_cosines(heads):
    views, bins = torch.randn(50, 2, 16, generator=generator()).relu(), torch.arange(50) % 3
    expected = torch.zeros(3)
    for head in _heads(16, heads):
        for n in range(3):
            rows = head(views[bins == n].flatten(0, 1)).detach()
            expected[n] += 1 / F.cosine_similarity(rows[:, None], rows[None], dim=2).mean() / max(heads, 1)
    assert mean_cosine_diversity(views, bins, 3, heads).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_heads_are_the_same_whatever_was_drawn_before():
    views, bins = torch.randn(20, 2, 16, generator=generator()).relu(), torch.arange(20) % 2
    first = mean_cosine_diversity(views, bins, 2)
    state = torch.get_rng_state()
    assert torch.equal(first, mean_cosine_diversity(views, bins, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, mean_cosine_diversity(views, bins, 2, heads=1))


def test_info_nce_by_hand():
    rows = torch.randn(4, 2, 3, generator=generator())
    loss = 0.0
    for i in range(4):
        for own, other in ((0, 1), (1, 0)):
            cosine = [float(F.cosine_similarity(rows[i, own], rows[j, other], 0)) for j in range(4)]
            loss -= np.log(np.exp(cosine[i] / 0.07) / sum(np.exp(c / 0.07) for c in cosine)) / 8
    assert info_nce(rows).item() == pytest.approx(loss, rel=1e-5)


def clustered(bins, spread, seed=0):
    """Views near items that lie around one point, at a distance that depends on the bin."""
    draw = generator(seed)
    items = 1 + torch.tensor(spread)[bins].unsqueeze(1) * torch.randn(len(bins), 16, generator=draw)
    return items.unsqueeze(1) + 0.05 * torch.randn(len(bins), 2, 16, generator=draw)


@pytest.mark.parametrize("heads", [0, 2])
def test_contrastive_diversity_is_larger_where_items_differ(heads):
    bins = torch.arange(600) % 3
    found = contrastive_diversity(clustered(bins, [0.05, 0.2, 0.8]), bins, 3, heads, epochs=2)
    assert found[0] < found[1] < found[2] <= 0


def test_the_size_of_a_bin_plays_no_part_in_contrastive_diversity():
    bins = (torch.arange(1100) >= 100).long()
    small, large = contrastive_diversity(clustered(bins, [0.2, 0.2]), bins, 2, heads=0)
    assert small.item() == pytest.approx(large.item(), rel=0.15)
    # Judged with all of its negatives, the large bin would seem far less diverse.
    assert -info_nce(clustered(bins, [0.2, 0.2])[bins == 1]) < 1.5 * large


@pytest.mark.parametrize(("views", "bins"), [(torch.zeros(4, 1, 2), [0, 0, 1, 1]), (torch.zeros(3, 2, 2), [0, 0, 1])])
def test_contrastive_diversity_needs_a_positive_and_a_negative(views, bins):
    with pytest.raises(UserError, match="contrastive needs two views and bins of two items"):
        contrastive_diversity(views, torch.tensor(bins), 2)


#: Texture by bin and diversity, already brought to [0, 1], of the authors' bins of CIFAR-10, and their importances.
TEXTURE = [0.32309, 0.32225, 0.32143, 0.32184, 0.31931, 0.31929, 0.32007, 0.31492, 0.31082, 0.30686]
DIVERSITY = [0, 0.037, 0.133, 0.259, 0.327, 0.411, 0.269, 0.592, 0.767, 1]
PUBLISHED = [1, 0.985, 1.031, 1.182, 1.094, 1.176, 1.083, 1.089, 1.011, 1]


def test_importance_gives_the_ten_published_numbers():
    found = importance(torch.tensor(TEXTURE).double(), torch.tensor(DIVERSITY).double())
    assert found.tolist() == pytest.approx(PUBLISHED, abs=2e-3)


def test_importance_lies_in_0_to_2_and_a_score_without_differences_adds_nothing():
    a, b = torch.rand(2, 10, generator=generator()).double()
    found = importance(a, b)
    assert found.min() >= 0
    assert found.max() <= 2
    assert torch.equal(importance(a, torch.full((10,), 3.0).double()), importance(a))
    assert importance(torch.ones(1)).item() == 0


def test_spread_is_the_mean_distance_to_the_own_class():
    x, label = torch.randn(30, 4, generator=generator()), torch.arange(30) % 2
    bins = torch.arange(30) % 5
    centre = [x[label == c].mean(0) for c in (0, 1)]
    expected = [np.mean([float((x[i] - centre[label[i]]).norm()) for i in range(n, 30, 5)]) for n in range(5)]
    assert bin_spread(x, label, 2, bins, 5).tolist() == pytest.approx(expected, rel=1e-5)
