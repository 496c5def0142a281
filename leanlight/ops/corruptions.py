"""Noise on images, in batches: a function of the seed, the kind and strength of the noise, the item and the element.

The formulas and levels are those of ImageNet-C and CIFAR-C (Hendrycks and Dietterich 2019, arXiv:1903.12261).
Randomness comes from a hash of a counter, not from a generator: an item's noise is the same in a batch of any size and
order, on any number of processes, and on any device up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from leanlight.contracts.errors import UserError, nearest
from leanlight.contracts.rng import derived_seed
from leanlight.ops.counter import item_keys, normal, random_bits, uniform

Scale = Literal["auto", "imagenet_c", "cifar_c"]
NOISES = ("gaussian", "shot", "impulse", "speckle")
# Strength at severities 1 to 5: standard deviation (gaussian, speckle), photons at white (shot), share hit (impulse).
LEVELS: dict[str, dict[str, tuple[float, ...]]] = {
    "imagenet_c": {
        "gaussian": (0.08, 0.12, 0.18, 0.26, 0.38),
        "shot": (60, 25, 12, 5, 3),
        "impulse": (0.03, 0.06, 0.09, 0.17, 0.27),
        "speckle": (0.15, 0.20, 0.35, 0.45, 0.60),
    },
    "cifar_c": {
        "gaussian": (0.04, 0.06, 0.08, 0.09, 0.10),
        "shot": (500, 250, 100, 75, 50),
        "impulse": (0.01, 0.02, 0.03, 0.05, 0.07),
        "speckle": (0.06, 0.10, 0.12, 0.16, 0.20),
    },
}
_SMALL = 64  # pixels a side up to which `auto` takes the levels of CIFAR-C
_BLOCK = 2**17  # values worked on at once on a CPU: its temporaries stay in the cache
_FINE = 256  # steps between two neighbouring 8-bit values that shot noise tells apart
_MAX_PHOTONS = 1e5
_COLUMNS = 1024  # of a table that begins with the count 0 for all levels


def gaussian(image: Tensor, z: Tensor, sigma: float) -> Tensor:
    """x + σz, clipped to [0, 1]; z: standard normal, shaped like the image."""
    return (image + sigma * z).clamp(0, 1)


def speckle(image: Tensor, z: Tensor, sigma: float) -> Tensor:
    """x + xσz, clipped to [0, 1]; z: standard normal, shaped like the image."""
    return (image + image * z * sigma).clamp(0, 1)


def impulse(image: Tensor, u: Tensor, p: float) -> Tensor:
    """A share p of the values becomes 0 or 1, half each; u: uniform on [0, 1], shaped like the image.

    Every value is hit by itself, as in ImageNet-C: of a pixel, one channel may be hit and another not.
    """
    pepper, salt = (u + (1 - p / 2)).floor_(), (u + p / 2).floor_()  # 0 and 1 where hit; masks take three times as long
    return image.maximum(salt.to(image.dtype)).minimum(pepper.to(image.dtype))


def shot(image: Tensor, bits: Tensor, photons: float, more_bits: Callable[[], Tensor] | None = None) -> Tensor:
    """Poisson(xc)/c, clipped to [0, 1].

    Counts come from tables of the 256 levels of 8-bit pixels. A pixel between two levels gets the count of the lower
    one plus an independent count for what is above it: their sum is Poisson distributed, too. Pixels are told apart in
    steps of 1/65280.

    Args:
        image: any shape, in [0, 1].
        bits: 32 random bits a value, int32, shaped like the image.
        photons: c, expected number at white.
        more_bits: gives 32 further bits a value, for images with pixels between the levels; None: there are none.
    """
    fine = (image.to(torch.float32) * (255.0 * _FINE)).round_().to(torch.int32).clamp_(0, 255 * _FINE)
    count = _draw(fine >> 8, bits, photons, 255)
    # Looking whether any pixel lies between levels would make the host wait for an accelerator.
    if more_bits is not None and (image.device.type != "cpu" or bool((fine & (_FINE - 1)).max())):
        count = count + _draw(fine & (_FINE - 1), more_bits(), photons / 255, _FINE)
    return count.to(image.dtype).div_(photons).clamp_(max=1)


@dataclass(frozen=True)
class Corruption:
    """One kind of noise at one strength.

    Args:
        name: gaussian, shot, impulse or speckle.
        severity: 1 to 5, a level of `scale`; or give `level`.
        level: the strength itself: σ of gaussian and speckle, in [0, 1]-pixels; share p of values of impulse; number
            of photons c at white of shot, which is the weaker the more there are.
        scale: whose levels the severities are; auto: CIFAR-C up to 64 pixels a side, ImageNet-C beyond.
        seed: of the noise.
    """

    name: str
    severity: int | None = None
    level: float | None = None
    scale: Scale = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in NOISES:
            raise UserError(f"name: expected one of {', '.join(NOISES)}; got {self.name!r}{nearest(self.name, NOISES)}")
        if (self.severity is None) == (self.level is None):
            got = "neither" if self.level is None else "both"
            raise UserError(f"severity: expected either severity or level for {self.name} noise; got {got}")
        if self.severity is not None and self.severity not in range(1, 6):
            raise UserError(f"severity: expected a whole number from 1 to 5, got {self.severity}")
        most = {"shot": _MAX_PHOTONS, "impulse": 1.0}.get(self.name, math.inf)
        if self.level is not None and not 0 < self.level <= most:
            end = "" if math.isinf(most) else f", at most {most:g}"
            raise UserError(f"level: expected a positive number{end} for {self.name} noise, got {self.level}")
        if self.scale not in get_args(Scale):
            raise UserError(f"scale: expected one of {', '.join(get_args(Scale))}; got {self.scale!r}")

    def strength(self, height: int, width: int) -> float:
        """What the formula takes: σ, p or c for images of this size in pixels."""
        if self.level is not None:
            return self.level
        auto = "cifar_c" if max(height, width) <= _SMALL else "imagenet_c"
        return LEVELS[auto if self.scale == "auto" else self.scale][self.name][(self.severity or 1) - 1]

    def __call__(self, image: Tensor, index: Tensor) -> Tensor:
        """Images with noise, in [0, 1].

        Args:
            image: (N, C, H, W) floating point in [0, 1].
            index: (N,) int64 number of each item: equal items of equal number get equal noise.
        """
        strength = self.strength(*image.shape[-2:])
        stream = derived_seed(self.seed, self.name, self.severity if self.level is None else float(self.level))
        flat, noisy = image.flatten(1), torch.empty_like(image, memory_format=torch.contiguous_format)
        for rows in _blocks(image):
            noisy.view_as(flat)[rows] = self._apply(flat[rows], item_keys(stream, index[rows]), strength)
        return noisy

    def _apply(self, image: Tensor, keys: Tensor, strength: float) -> Tensor:
        count = image.shape[1]
        if self.name == "gaussian":
            return gaussian(image, normal(keys, count).to(image.dtype), strength)
        if self.name == "speckle":
            return speckle(image, normal(keys, count).to(image.dtype), strength)
        if self.name == "impulse":
            return impulse(image, uniform(random_bits(keys, count)), strength)
        return shot(image, random_bits(keys, count), strength, lambda: random_bits(keys, count, count))


def _blocks(image: Tensor) -> Iterator[slice]:
    """All items at once, on a CPU as many as its cache holds."""
    n = len(image)
    step = max(1, _BLOCK // max(1, image[:1].numel())) if image.device.type == "cpu" else max(1, n)
    return (slice(start, start + step) for start in range(0, n, step))


# -- counts of photons


def _draw(level: Tensor, bits: Tensor, photons: float, levels: int) -> Tensor:
    """int32 counts, Poisson distributed with rate photons · level / levels, by one look at a table each."""
    entries, lowest, log2 = _tables_on(photons, levels, level.device)
    low, rest = (1 << log2) - 1, (1 << (32 - log2)) - 1
    column = (bits >> (32 - log2)).bitwise_and_(low)
    entry = entries.index_select(0, (level << log2).bitwise_or_(column).flatten()).view_as(level)
    other = entry & low
    own = (bits & rest).sub_((entry >> log2).bitwise_and_(rest)) >> 31  # all ones where the column's own count is kept
    count = column.bitwise_xor_(other).bitwise_and_(own).bitwise_xor_(other)
    return count if lowest is None else count.add_(lowest.index_select(0, level.flatten()).view_as(level))


@lru_cache(maxsize=64)
def _tables_on(photons: float, levels: int, device: torch.device) -> tuple[Tensor, Tensor | None, int]:
    entries, lowest, log2 = _tables(photons, levels)
    return entries.to(device), None if lowest is None else lowest.to(device), log2


@lru_cache(maxsize=32)
def _tables(photons: float, levels: int) -> tuple[Tensor, Tensor | None, int]:
    """Alias tables (Walker 1977) of the Poisson distributions of rates photons · level / levels, level 0 to `levels`.

    Of K columns, drawn with equal chance, each stands for its own count and for one other, in a proportion that 32 -
    log2(K) further bits decide. Probabilities are multiples of 2**-32.

    Returns:
        (levels + 1) · K int32 entries, each the own share above and the other count in the lower log2(K) bits; the
        count (levels + 1,) int32 that the first column of each level stands for, None where it is 0; log2(K).
    """
    rate = torch.arange(levels + 1, dtype=torch.float64)[:, None] * (photons / levels)
    most, lowest = rate + 8 * rate.sqrt() + 20, torch.zeros_like(rate)  # beyond `most` lies less than 2**-32
    if float(most.max()) > _COLUMNS:
        lowest = (rate - 8 * rate.sqrt() - 10).floor().clamp(min=0)
    log2 = math.ceil(math.log2(float((most - lowest).max())))
    count = lowest + torch.arange(2**log2)
    density = (torch.xlogy(count, rate) - rate - torch.lgamma(count + 1)).exp()
    weight = (density / density.sum(1, keepdim=True) * 2.0**32).round().long()
    weight.scatter_add_(1, weight.argmax(1, keepdim=True), 2**32 - weight.sum(1, keepdim=True))
    share, other = _alias(weight, 2 ** (32 - log2))
    entries = (share << log2) | other
    return entries.to(torch.int32).flatten(), lowest.to(torch.int32).flatten() if lowest.any() else None, log2


def _alias(weight: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Fill columns of one capacity with weights, at most two in a column, for all rows at once.

    The heaviest columns fill up the light ones one after the other; one that has become light is filled by the next.

    Args:
        weight: (R, K) int64; each row sums to K · capacity.
        capacity: of a column.

    Returns:
        own share of each column, below `capacity`, and the number of the column that fills the rest; (R, K) int64.
    """
    rows, columns = weight.shape
    order = weight.sort(dim=1, stable=True).indices
    share, other = weight.clone(), torch.arange(columns).repeat(rows, 1)
    row = torch.arange(rows)
    light, heavy = torch.zeros(rows, dtype=torch.long), torch.full((rows,), columns - 1)
    left = weight[row, order[row, heavy]]  # of the heavy column at work
    for _ in range(columns - 1):
        small, large = order[row, light], order[row, heavy]
        spent = left < capacity
        filled, by = torch.where(spent, large, small), torch.where(spent, order[row, heavy - 1], large)
        own = torch.where(spent, left, weight[row, small])
        share[row, filled], other[row, filled] = own, by
        left = torch.where(spent, weight[row, by], left) - (capacity - own)
        light, heavy = light + ~spent, heavy - spent.long()
    last = order[row, heavy]
    share[row, last], other[row, last] = left, last
    return share.clamp_(max=capacity - 1), other
