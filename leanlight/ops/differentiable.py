"""Augmentations that gradients pass through, of the dataset-distillation literature: one random operation a batch.

Random numbers come from the generator, or from torch's own CPU state, and are drawn on the generator's device: with a
CPU generator the same images follow on every device, and nothing waits for a GPU. Empty borders are 0, which is the
mean in whitened or standardised space.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlight.contracts.batch import to_device
from leanlight.contracts.errors import UserError, nearest
from leanlight.ops.augment import AUGMENTATIONS, Augmentation

Operation = Callable[[Tensor, Callable[[], Tensor]], Tensor]
#: One source of random numbers for all images, torch's own (None), or one for each of as many equal parts of them.
Source = torch.Generator | Sequence[torch.Generator | None] | None
FromSource = Callable[[Tensor, Source], Tensor]


def _flip(image: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    return torch.where(uniform() < 0.5, image.flip(-1), image)


def sample(image: Tensor, grid: Tensor) -> Tensor:
    """What ``F.grid_sample`` gives (bilinear, zero border), with gradients that add up in one order on a GPU, too.

    PyTorch's kernel adds them atomically there, which ``trainer.deterministic`` refuses. Slower, and four times the
    memory. No gradient with respect to the grid is meant.

    Args:
        image: (N, C, H, W).
        grid: (N, H', W', 2), positions (x, y) from -1 to 1 between the outer edges.

    Returns:
        (N, C, H', W').
    """
    height, width = image.shape[-2:]
    x, y = (((grid[..., axis] + 1) * side - 1) / 2 for axis, side in ((0, width), (1, height)))
    left, top = x.floor(), y.floor()
    column, row = torch.stack([left, left + 1, left, left + 1]), torch.stack([top, top, top + 1, top + 1])
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    weight = (1 - (x - column).abs()) * (1 - (y - row).abs()) * inside
    number = torch.arange(len(image), device=image.device).view(1, -1, 1, 1)
    corners = image.movedim(1, -1)[number, row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()]
    return (corners * weight.unsqueeze(-1)).sum(0).movedim(-1, 1).contiguous()


def _affine(image: Tensor, rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Sample image (N, C, H, W) at the positions of a 2x3 matrix, of entries (N or 1, 1, 1, 1), with zero border."""
    matrix = torch.stack([torch.stack([entry.reshape(-1) for entry in row], -1) for row in rows], -2)
    matrix = matrix.expand(len(image), 2, 3).to(image.dtype)
    grid = F.affine_grid(matrix, list(image.shape), align_corners=False)
    if torch.are_deterministic_algorithms_enabled() and image.device.type != "cpu":
        return sample(image, grid)
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _rotate(image: Tensor, uniform: Callable[[], Tensor], degrees: float = 15.0) -> Tensor:
    angle = (2 * uniform() - 1) * math.radians(degrees)
    zero = torch.zeros_like(angle)
    return _affine(image, [[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero]])


def _scale(image: Tensor, uniform: Callable[[], Tensor], ratio: float = 1.2) -> Tensor:
    x, y = (1 / ratio + uniform() * (ratio - 1 / ratio) for _ in range(2))
    zero = torch.zeros_like(x)
    return _affine(image, [[x, zero, zero], [zero, y, zero]])


def _shift(image: Tensor, uniform: Callable[[], Tensor], share: float = 0.125) -> Tensor:
    """Move by a whole number of pixels, up to a share of the side."""
    height, width = image.shape[-2:]
    down, right = (
        torch.round((2 * uniform() - 1) * share * side).long().reshape(-1, 1, 1, 1) for side in (height, width)
    )
    row = torch.arange(height, device=image.device).view(1, 1, -1, 1) + down
    column = torch.arange(width, device=image.device).view(1, 1, 1, -1) + right
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    flat = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
    flat = flat.expand(len(image), image.shape[1], -1, -1).flatten(2)
    return image.flatten(2).gather(2, flat).view_as(image) * inside


def _cutout(image: Tensor, uniform: Callable[[], Tensor], share: float = 0.5) -> Tensor:
    """Blank a square of `share` of the side around a random centre."""
    height, width = image.shape[-2:]
    top, left = (torch.floor(uniform() * side) - share * side / 2 for side in (height, width))
    row = torch.arange(height, device=image.device).view(1, 1, -1, 1)
    column = torch.arange(width, device=image.device).view(1, 1, 1, -1)
    hole = (row >= top) & (row < top + share * height) & (column >= left) & (column < left + share * width)
    return image * ~hole


def _resized_crop(image: Tensor, uniform: Callable[[], Tensor], share: float = 0.25, ratio: float = 4 / 3) -> Tensor:
    """Cut out a window of at least a share of the area, with sides up to `ratio` apart, and stretch it to the whole."""
    area = share + uniform() * (1 - share)
    stretch = ratio ** (uniform() - 0.5)  # width over height is its square
    width, height = (area.sqrt() * side for side in (stretch, 1 / stretch))
    width, height = width.clamp(max=1), height.clamp(max=1)
    x, y = ((2 * uniform() - 1) * (1 - side) for side in (width, height))
    zero = torch.zeros_like(x)
    return _affine(image, [[width, zero, x], [zero, height, y]])


def _colour(image: Tensor, uniform: Callable[[], Tensor]) -> Tensor:
    """Brightness 1, saturation 2, contrast 0.5, one after the other."""
    image = image + (uniform() - 0.5)
    grey = image.mean(1, keepdim=True)
    image = (image - grey) * (uniform() * 2.0) + grey
    mean = image.mean((1, 2, 3), keepdim=True)
    return (image - mean) * (uniform() + 0.5) + mean


def one_of(image: Tensor, generator: Source = None, *, operations: Sequence[Operation], shared: bool = False) -> Tensor:
    """Apply one operation, drawn once, to the whole batch.

    With `shared`, two batches of different sizes are transformed alike when their generators start alike (Siamese
    augmentation, Zhao & Bilen 2021).

    Args:
        image: (N, C, H, W).
        generator: of all that is drawn; torch's own CPU state by default. Several: each draws for its equal part of the
            images what it would draw for that part alone.
        operations: to draw from, each (image, source of uniform numbers) → image.
        shared: whether all images get the same parameters of the operation; else each has its own.
    """
    generators = generator if isinstance(generator, Sequence) else [generator]
    parts = image.unflatten(0, (len(generators), -1))
    size = parts.shape[1]

    def apply(members: Sequence[int], images: Tensor) -> Tensor:
        def uniform() -> Tensor:
            drawn = [_uniform(1 if shared else size, generators[member]) for member in members]
            numbers = drawn[0] if len(drawn) == 1 else torch.cat([each.expand(size, 1, 1, 1) for each in drawn])
            return numbers.to(image.device, non_blocking=True)

        return operations[choices[members[0]]](images, uniform)

    choices = [int(torch.randint(len(operations), (), generator=each, device=_place(each))) for each in generators]
    if len(set(choices)) == 1:
        return apply(range(len(choices)), image)
    # Parts of the same choice are worked on together, and then put back into their order.
    order = sorted(range(len(choices)), key=choices.__getitem__)
    groups = [list(group) for _, group in itertools.groupby(order, choices.__getitem__)]
    sorted_parts = parts[to_device(torch.tensor(order), image.device)].split([len(group) for group in groups])
    done = [apply(group, own.flatten(0, 1)) for group, own in zip(groups, sorted_parts, strict=True)]
    back = to_device(torch.tensor(order).argsort(), image.device)
    return torch.cat(done).unflatten(0, (-1, size))[back].flatten(0, 1)


def _place(generator: torch.Generator | None) -> torch.device | str:
    return "cpu" if generator is None else generator.device


def _uniform(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.rand(count, 1, 1, 1, generator=generator, device=_place(generator))


def flip_then(image: Tensor, generator: Source = None, *, operation: Operation) -> Tensor:
    """Mirror each image with probability 1/2, then apply one operation, its parameters drawn for each image.

    Args:
        image: (N, C, H, W).
        generator: as of `one_of`.
        operation: as those of `one_of`.
    """
    return one_of(one_of(image, generator, operations=(_flip,)), generator, operations=(operation,))


_DSA = (_colour, _shift, _cutout, _flip, _scale, _rotate)

#: By up to 15 degrees: the "composed" variant.
flip_then_rotate: FromSource = functools.partial(flip_then, operation=_rotate)
#: By up to an eighth of the side (4 pixels of 32): what `leanlight.ops.augment.flip_and_crop` does to images of 32
#: pixels, at a hundredth of its cost under a gradient.
flip_then_shift: FromSource = functools.partial(flip_then, operation=_shift)
#: To a window of a quarter of the area to the whole.
flip_then_resized_crop: FromSource = functools.partial(flip_then, operation=_resized_crop)
flip_or_rotate: FromSource = functools.partial(one_of, operations=(_flip, _rotate))
only_shift: FromSource = functools.partial(one_of, operations=(_shift,))
rotate: FromSource = functools.partial(one_of, operations=(_rotate,))
dsa: FromSource = functools.partial(one_of, operations=_DSA)
siamese_dsa: FromSource = functools.partial(one_of, operations=_DSA, shared=True)

DIFFERENTIABLE: dict[str, FromSource] = {
    "flip_rotate": flip_or_rotate,
    "flip_then_rotate": flip_then_rotate,
    "rotate": rotate,
    "flip_then_shift": flip_then_shift,
    "flip_then_resized_crop": flip_then_resized_crop,
    "only_shift": only_shift,
    "dsa": dsa,
}

ALL_AUGMENTATIONS: dict[str, Augmentation] = {**AUGMENTATIONS, **DIFFERENTIABLE}


def find_augmentation(
    name: str | None, key: str, among: Mapping[str, Augmentation] = ALL_AUGMENTATIONS
) -> Augmentation | None:
    """Return the augmentation of that name among some, None for None; UserError naming `key` otherwise."""
    if name is not None and name not in among:
        raise UserError(f"{key}: expected one of {sorted(among)}, got {name!r}{nearest(name, among)}")
    return among[name] if name else None


def augment_each(augment: Augmentation, image: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Augment several batches, each as it would be alone with its generator; together where the augmentation can.

    Args:
        augment: one of `ALL_AUGMENTATIONS`.
        image: (S, N, C, H, W).
        generators: S of them.
    """
    for together in DIFFERENTIABLE.values():
        if together is augment:
            return together(image.flatten(0, 1), generators).unflatten(0, image.shape[:2])
    return torch.stack([augment(*each) for each in zip(image, generators, strict=True)])
