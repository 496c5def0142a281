"""What bins are scored by: texture, and the views that diversity is measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts import UserError

#: Random crops as the authors draw them, the defaults of torchvision's RandomResizedCrop.
CROP_AREA, CROP_RATIO, CROP_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


def texture(image: Tensor, patch: int = 32) -> Tensor:
    """(N,) texture levels: the mean of ½|Sobel_x| + ½|Sobel_y| over the patches of each image.

    Every patch is filtered by itself with its border reflected. Ragged borders are dropped; along a side shorter than
    a patch, the patch is as short as the side, so a smaller image is one patch.

    Args:
        image: (N, C, H, W) float in [0, 1], not normalised; grey (C = 1) or RGB (C = 3), sides of at least 2 pixels.
        patch: side of a square patch L, pixels.

    Raises:
        UserError: images of another kind.
    """
    if not image.is_floating_point() or image.ndim != 4 or image.shape[1] not in (1, 3) or min(image.shape[2:]) < 2:
        raise UserError(
            f"image: expected float (N, 1 or 3, H, W) of at least 2x2 pixels, got {image.dtype} {tuple(image.shape)}"
        )
    if image.shape[1] == 3:
        grey = torch.tensor([0.299, 0.587, 0.114], dtype=image.dtype, device=image.device)
        image = (image * grey.view(1, 3, 1, 1)).sum(1, keepdim=True)
    high, wide = min(patch, image.shape[2]), min(patch, image.shape[3])
    patches = image[:, 0].unfold(1, high, high).unfold(2, wide, wide)
    padded = F.pad(patches.reshape(-1, 1, high, wide), (1, 1, 1, 1), mode="reflect")
    sobel = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=image.dtype, device=image.device)
    edges = F.conv2d(padded, torch.stack([sobel, sobel.T]).unsqueeze(1)).abs()
    return edges.view(len(image), -1).mean(1)


def random_views(image: Tensor, count: int, generator: torch.Generator | Sequence[torch.Generator]) -> Tensor:
    """(N, count, C, H, W) random crops of each image at the image's own size, half of them mirrored.

    A crop has 8 to 100 % of the area and sides in a ratio of 3/4 to 4/3; it is enlarged bilinearly.

    Args:
        image: (N, C, H, W) float.
        count: views of each image, V.
        generator: on the CPU; one for all images, or one for each, which makes views independent of batches.
    """
    n, channels, height, width = image.shape
    draws = CROP_TRIES * 2 + 3
    if isinstance(generator, torch.Generator):
        drawn = torch.rand(n, count, draws, generator=generator)
    else:
        drawn = torch.stack([torch.rand(count, draws, generator=own) for own in generator])
    drawn = drawn.view(n * count, draws)
    high, wide = _crop_sides(drawn[:, :-3].view(-1, CROP_TRIES, 2), height, width)
    rows = _sampled_pixels(high, drawn[:, -3], height)
    columns = _sampled_pixels(wide, drawn[:, -2], width)
    columns = torch.where(drawn[:, -1:] < 0.5, columns.flip(1), columns)
    grid = torch.stack([columns[:, None, :].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)], dim=-1).to(
        image
    )
    repeated = image.unsqueeze(1).expand(-1, count, -1, -1, -1).reshape(n * count, channels, height, width)
    views = F.grid_sample(repeated, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return views.view(n, count, channels, height, width)


def _crop_sides(drawn: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Heights and widths (B,) of crops, whole pixels: the first of several tries that fits, else all it can be.

    Args:
        drawn: (B, tries, 2) uniform numbers, for area and ratio.
        height: of the image H.
        width: of the image W.
    """
    area = (CROP_AREA[0] + drawn[..., 0] * (CROP_AREA[1] - CROP_AREA[0])) * height * width
    low, high = (math.log(bound) for bound in CROP_RATIO)
    ratio = (low + drawn[..., 1] * (high - low)).exp()
    wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
    first = fits.int().argmax(1, keepdim=True)
    whole = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    widest, tallest = min(width, round(height * whole)), min(height, round(width / whole))
    wide = torch.where(fits.any(1), wide.gather(1, first)[:, 0], torch.tensor(float(widest)))
    tall = torch.where(fits.any(1), tall.gather(1, first)[:, 0], torch.tensor(float(tallest)))
    return tall, wide


def _sampled_pixels(crop: Tensor, drawn: Tensor, size: int) -> Tensor:
    """(B, size) where a crop is sampled along one axis, in [-1, 1] over the whole image.

    Args:
        crop: (B,) length of the crop, pixels.
        drawn: (B,) uniform numbers that place it.
        size: length of the image, and of what is made of the crop.
    """
    start = (drawn * (size - crop + 1)).floor().clamp(max=size - crop)
    pixel = (torch.arange(size) + 0.5) * (crop / size).unsqueeze(1) - 0.5
    # Not beyond the middle of the crop's outer pixels: what lies around the crop must not shine through.
    pixel = torch.minimum(pixel.clamp(min=0), crop.unsqueeze(1) - 1) + start.unsqueeze(1)
    return (pixel * 2 + 1) / size - 1
