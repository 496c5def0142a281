"""Texture and views against plain Python, scipy and torch's own resizing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from leanlight.contracts import UserError
from lit_modules.adq import random_views, texture


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
