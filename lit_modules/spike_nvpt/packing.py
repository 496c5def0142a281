"""Bits of prompts in bytes: eight in one, the first highest, as ``numpy.packbits`` has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leanlight.contracts import UserError


def pack(bits: Tensor) -> Tensor:
    """Bits of any shape → (⌈n / 8⌉,) uint8; the last byte is filled up with zeros.

    Args:
        bits: bool, or numbers of which 0 is the only false one.
    """
    flat = torch.zeros(-(-bits.numel() // 8) * 8, dtype=torch.bool, device=bits.device)
    flat[: bits.numel()] = bits.flatten() != 0
    return (flat.view(-1, 8) * _places(bits.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """What `pack` gave → bits of `shape`, bool. Raises UserError for a shape that has not as many."""
    count = int(torch.tensor(shape).prod())
    if -(-count // 8) != packed.numel():
        raise UserError(f"shape: expected up to {8 * packed.numel()} bits in {packed.numel()} bytes, got {count}")
    flat = (packed[:, None] & _places(packed.device)) != 0
    return flat.flatten()[:count].reshape(tuple(shape))


def _places(device: torch.device) -> Tensor:
    return torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=device)
