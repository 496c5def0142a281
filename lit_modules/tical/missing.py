"""Clips that lose a modality: a function of seed, moment and clip, not of batch, order or process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from leanlight.contracts import MultimodalBatch, derived_seed
from leanlight.ops.counter import item_keys, random_bits, uniform


def lose(batch: MultimodalBatch, shares: Mapping[str, float], seed: int, moment: int | str) -> MultimodalBatch:
    """Take modalities from some clips, as if they had never had them; each clip keeps one that it has.

    Args:
        batch: of any part of the data.
        shares: by modality, the share of the clips that lose it, in [0, 1).
        seed: of the draw.
        moment: of the draw: a training step or the name of a part.
    """
    names = list(batch.features)
    present = torch.stack([batch.present[name] for name in names], 1)
    keys = item_keys(derived_seed(seed, "missing", moment), batch.index)
    drawn = uniform(random_bits(keys, len(names)))
    # As many comparisons as modalities: a tensor of the shares would have to be copied to the device.
    lost = torch.stack([drawn[:, place] < shares.get(name, 0.0) for place, name in enumerate(names)], 1)
    last = drawn.masked_fill(~present, -1.0).argmax(1)  # kept where else nothing would be
    nothing = (lost | ~present).all(1)
    lost = lost & ~(nothing[:, None] & (torch.arange(len(names), device=last.device) == last[:, None]))
    kept = dict(zip(names, (present & ~lost).unbind(1), strict=True))
    return replace(
        batch,
        features={name: _zeroed(x, kept[name]) for name, x in batch.features.items()},
        length={name: x * kept[name] for name, x in batch.length.items()},
        present=kept,
    )


def _zeroed(x: Tensor, kept: Tensor) -> Tensor:
    return x.masked_fill(~kept.view(-1, *[1] * (x.ndim - 1)), 0.0)
