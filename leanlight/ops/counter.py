"""Random numbers that are a function of a seed, an item and an element, by a hash of a counter instead of a generator.

An item's numbers are the same in a batch of any size and order, on any number of processes, and on any device up to
rounding: there is no state to restore.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leanlight.contracts.rng import derived_seed


def _int32(value: int) -> int:
    return (value + 2**31) % 2**32 - 2**31


def _int64(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _fold(x: Tensor, bits: int) -> Tensor:
    """x ^ (x >> bits) in place; the shift is logical: torch's own repeats the sign."""
    width = 8 * x.element_size()
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (width - bits)) - 1))


def item_keys(stream: int, index: Tensor) -> Tensor:
    """(N, 2) int32 keys, by SplitMix64 (Steele, Lea and Flood 2014) of a stream's number and the item's."""
    x = index.to(torch.int64) * _int64(0x9E3779B97F4A7C15) + _int64(stream)
    x = _fold(x, 30).mul_(_int64(0xBF58476D1CE4E5B9))
    x = _fold(_fold(x, 27).mul_(_int64(0x94D049BB133111EB)), 31)
    return torch.stack([x.to(torch.int32), (x >> 32).to(torch.int32)], 1)


def random_bits(keys: Tensor, count: int, first: int = 0) -> Tensor:
    """32 random bits for each of `count` elements of every item.

    A mixer of 32-bit words with little bias (``triple32`` of C. Wellons's hash prospector); one half of the key enters
    before it, the other inside, so that no two items walk through the same numbers.

    Args:
        keys: (N, 2) int32, of `item_keys`.
        count: elements of an item.
        first: number of the first element.

    Returns:
        (N, count) int32, uniform over all values.
    """
    element = torch.arange(first, first + count, device=keys.device, dtype=torch.int32)
    x = _fold(element * _int32(0x9E3779B1) + keys[:, :1], 17).mul_(_int32(0xED5AD4BB))
    x = _fold(x, 11).add_(keys[:, 1:]).mul_(_int32(0xAC4C1B51))
    return _fold(_fold(x, 15).mul_(0x31848BAB), 14)


def uniform(bits: Tensor) -> Tensor:
    """float32 on [0, 1], from int32 random bits."""
    return bits.to(torch.float32).mul_(2.0**-32).add_(0.5)


def normal(keys: Tensor, count: int) -> Tensor:
    """(N, count) standard normal float32 numbers by the transform of Box and Muller; keys: of `item_keys`."""
    half = (count + 1) // 2
    bits = random_bits(keys, 2 * half)
    # Without its sign a word has 31 bits: the radius reaches 6.7.
    near = (bits[:, :half] & (2**31 - 1)).to(torch.float32).add_(0.5).mul_(2.0**-31)
    radius = near.log_().mul_(-2).clamp_(min=0).sqrt_()
    angle = bits[:, half:].to(torch.float32).mul_(math.pi * 2.0**-31)
    return torch.cat([angle.cos() * radius, angle.sin_().mul_(radius)], 1)[:, :count]


def noise(seed: int, index: Tensor, size: int) -> Tensor:
    """Standard normal vectors of items.

    Args:
        seed: of the stream.
        index: (N,) int64 number of each item.
        size: elements of a vector.

    Returns:
        (N, size) float32.
    """
    return normal(item_keys(derived_seed(seed, "noise"), index), size)


def labels(seed: int, index: Tensor, num_classes: int) -> Tensor:
    """Classes of items, uniformly drawn.

    Args:
        seed: of the stream.
        index: (N,) int64 number of each item.
        num_classes: number of classes.

    Returns:
        (N,) int64 in [0, num_classes).
    """
    bits = random_bits(item_keys(derived_seed(seed, "labels"), index), 1)[:, 0].to(torch.int64) + 2**31
    return bits * num_classes >> 32


def pixels(seed: int, index: Tensor, size: int) -> Tensor:
    """Uniformly drawn grey levels of items.

    Args:
        seed: of the stream.
        index: (N,) int64 number of each item.
        size: pixels of an item, over all channels.

    Returns:
        (N, size) uint8.
    """
    return random_bits(item_keys(derived_seed(seed, "pixels"), index), size).bitwise_and_(255).to(torch.uint8)
