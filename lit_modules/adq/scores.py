"""What bins are scored by: texture and diversity, and the importance they add up to."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlight.contracts import UserError, derived_seed, isolated_rng

#: Random crops as the authors draw them, the defaults of torchvision's RandomResizedCrop.
CROP_AREA, CROP_RATIO, CROP_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
#: Numbers a projection head gives, items of a step of its training, items projected at once.
HEAD_WIDTH, CONTRAST_BATCH, CHUNK = 128, 256, 4096


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
    patches = image[:, 0].unfold(1, high, high).unfold(2, wide, wide).reshape(-1, 1, high, wide)
    x = F.pad(patches, (1, 1, 1, 1), mode="reflect")[:, 0]
    # Smoothed along one axis, differences along the other: 3 to 6 times as fast as convolution on a CPU.
    rows, columns = x[:, :-2] + 2 * x[:, 1:-1] + x[:, 2:], x[..., :-2] + 2 * x[..., 1:-1] + x[..., 2:]
    edges = (rows[..., 2:] - rows[..., :-2]).abs() + (columns[:, 2:] - columns[:, :-2]).abs()
    return edges.view(len(image), -1).mean(1) / 2


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


def bin_means(value: Tensor, bin: Tensor, num_bins: int) -> Tensor:
    """(m,) or (m, D) float64 means over the items of each bin.

    Args:
        value: (N,) or (N, D) numbers of the items.
        bin: (N,) int64 bin of each item, each bin with at least one.
        num_bins: number of bins m.
    """
    total = torch.zeros(num_bins, *value.shape[1:], dtype=torch.float64)
    total.index_add_(0, bin, value.double())
    return total / bin.bincount(minlength=num_bins).view(-1, *[1] * (value.ndim - 1))


def within_classes(value: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(N,) float64 numbers less the mean of their class, over its standard deviation; 0 where that is 0.

    Args:
        value: (N,) numbers.
        label: (N,) int64 classes, each with at least one item.
        num_classes: number of classes.
    """
    centred = value.double() - bin_means(value, label, num_classes)[label]
    deviation = bin_means(centred.square(), label, num_classes).sqrt()[label]
    return torch.where(deviation > 0, centred / deviation.clamp_min(1e-300), 0.0)


def bin_spread(embedding: Tensor, label: Tensor, num_classes: int, bin: Tensor, num_bins: int) -> Tensor:
    """(m,) float64 mean distance of a bin's items to the mean of their own class.

    Args:
        embedding: (N, D) vectors.
        label: (N,) int64 classes.
        num_classes: number of classes.
        bin: (N,) int64 bin of each item.
        num_bins: number of bins m.
    """
    centre = bin_means(embedding, label, num_classes)
    distance = torch.cat(
        [
            (part.double() - centre[own]).norm(dim=1)
            for part, own in zip(embedding.split(CHUNK), label.split(CHUNK), strict=True)
        ]
    )
    return bin_means(distance, bin, num_bins)


def mean_cosine_diversity(views: Tensor, bin: Tensor, num_bins: int, heads: int = 3) -> Tensor:
    """(m,) float64: one over the mean cosine of all pairs of views of a bin, each view with itself included.

    That is 1 for equal vectors and n for n orthogonal ones, which is also the most it may be. Vectors first pass a
    projection head with random weights, always the same ones; the result is the mean over several heads.

    Args:
        views: (N, V, D) vectors of the views.
        bin: (N,) int64 bin of each item.
        num_bins: number of bins m.
        heads: heads to average over; 0 compares the vectors as they are.
    """
    found = [_one_over_mean_cosine(views, bin, num_bins, head) for head in _heads(views.shape[2], heads)]
    return torch.stack(found).mean(0)


def _one_over_mean_cosine(views: Tensor, bin: Tensor, num_bins: int, head: nn.Module) -> Tensor:
    with torch.no_grad():
        rows = [F.normalize(head(part.float()), dim=2).mean(1) for part in views.split(CHUNK)]
    # The mean over all pairs is the squared length of the mean.
    square = bin_means(torch.cat(rows), bin, num_bins).square().sum(1)
    most = bin.bincount(minlength=num_bins) * views.shape[1]
    return 1 / square.maximum(1 / most)


def contrastive_diversity(views: Tensor, bin: Tensor, num_bins: int, heads: int = 3, epochs: int = 5) -> Tensor:
    """(m,) float64: how well the two views of an item are told from those of others in its bin, minus InfoNCE.

    The head is trained on all items with the same loss. Every bin is judged with the same number of negatives, so that
    its size plays no part; the result is the mean over several heads.

    Args:
        views: (N, V, D) vectors of the views, of which the first two are used.
        bin: (N,) int64 bin of each item.
        num_bins: number of bins m.
        heads: heads to train and average over; 0 compares the vectors as they are.
        epochs: passes over the items for each head.

    Raises:
        UserError: fewer than two views, or a bin with fewer than two items.
    """
    smallest = int(bin.bincount(minlength=num_bins).min())
    if views.shape[1] < 2 or smallest < 2:
        raise UserError(
            f"diversity: contrastive needs two views and bins of two items, got {views.shape[1]} and {smallest}"
        )
    pairs = views[:, :2].float()
    found = []
    for number, head in enumerate(_heads(views.shape[2], heads)):
        generator = torch.Generator().manual_seed(derived_seed("adq contrast", number))
        if heads:
            _train_head(head, pairs, epochs, generator)
        with torch.no_grad():
            rows = torch.cat([head(part) for part in pairs.split(CHUNK)])
        group = min(smallest, CONTRAST_BATCH)
        found.append(torch.stack([_separation(rows[bin == n], group, generator) for n in range(num_bins)]))
    return torch.stack(found).mean(0)


def _heads(width: int, count: int) -> list[nn.Module]:
    """Projection heads D-D-ReLU-128 with random weights that are a function of their number alone."""
    made: list[nn.Module] = []
    for number in range(count):
        with isolated_rng(derived_seed("adq head", number)):
            made.append(nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, HEAD_WIDTH)))
    return made or [nn.Identity()]


def _train_head(head: nn.Module, pairs: Tensor, epochs: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    for _ in range(epochs):
        for items in torch.randperm(len(pairs), generator=generator).split(CONTRAST_BATCH):
            if len(items) > 1:
                optimizer.zero_grad()
                info_nce(head(pairs[items])).backward()
                optimizer.step()


def _separation(rows: Tensor, group: int, generator: torch.Generator) -> Tensor:
    """Minus the mean InfoNCE over random groups of a bin; what fills no whole group is left out."""
    order = torch.randperm(len(rows), generator=generator)[: len(rows) // group * group]
    return -torch.stack([info_nce(rows[items]).double() for items in order.split(group)]).mean()


def info_nce(rows: Tensor, temperature: float = 0.07) -> Tensor:
    """Cross-entropy of finding an item's other view among the other views of all items, both ways; a scalar.

    Args:
        rows: (N, 2, D) vectors of two views, of any length.
        temperature: that cosines are divided by.
    """
    first, second = F.normalize(rows, dim=2).unbind(1)
    similarity = first @ second.T / temperature
    own = torch.arange(len(rows), device=rows.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2


def importance(*scores: Tensor) -> Tensor:
    """(m,) sum of scores, each brought to [0, 1] over the bins; a score that is the same for all bins counts as 0.

    Args:
        scores: (m,) each.
    """
    total = torch.zeros_like(scores[0])
    for score in scores:
        low, high = score.min(), score.max()
        total += (score - low) / (high - low) if high > low else 0
    return total
