"""Parts that share no prompt, picture or topic, and have the same labels in the same shares as far as that goes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from leanlight.contracts import SAFETY_FIELDS, SafetySample, UserError

#: What keeps samples together; ``file``: the publisher's parts, and groups where these have none for validation.
Scheme = Literal["file", "group", "topic", "source"]


def keys_of(samples: Sequence[SafetySample], scheme: str) -> list[str]:
    """By sample, the name of what must not be in two parts.

    By group that is the sample's own, or else its picture, whatever is asked about it, or else its instruction but for
    case and spaces.
    """
    if scheme in ("topic", "source"):
        keys = [getattr(sample, scheme) for sample in samples]
        if "" in keys:
            raise UserError(f"split: {scheme}, but sample {samples[keys.index('')].id!r} has no {scheme}")
        return keys

    def group(sample: SafetySample) -> str:
        if sample.group:
            return f"group {sample.group}"
        if sample.image is not None:
            return f"picture {sample.image.sha256}"
        words = sample.instruction.casefold().split()
        return f"instruction {' '.join(words)}" if words else f"sample {sample.id}"

    return [group(sample) for sample in samples]


def deal(
    samples: Sequence[SafetySample], scheme: str, shares: Sequence[float], seed: int, purpose: str
) -> npt.NDArray[np.int64]:
    """Deal samples out to parts, those of one key to the same part.

    Keys of one kind, those of which the same fields are harmful anywhere, are dealt out together, the largest first,
    each to the part that lacks most (the rule of Sainte-Laguë, which favours neither large parts nor small ones).

    Args:
        samples: N of them.
        scheme: ``group``, ``topic`` or ``source``; ``file`` is as ``group``.
        shares: of the parts, summing to 1.
        seed: makes the order of keys of one size.
        purpose: told apart from others with the same seed.

    Returns:
        (N,) int64, the number of each sample's part.
    """
    members: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys_of(samples, scheme)):
        members.setdefault(key, []).append(row)
    # Only random() is used: the numbers behind other methods of a generator may change with numpy's version.
    generator = np.random.Generator(np.random.PCG64([seed, *purpose.encode()]))
    rank = generator.random(len(members))
    kinds: dict[tuple[bool, ...], list[tuple[int, float, list[int]]]] = {}
    for position, rows in enumerate(members.values()):
        kind = tuple(any(samples[row].labels.get(field, False) for row in rows) for field in SAFETY_FIELDS)
        kinds.setdefault(kind, []).append((-len(rows), rank[position], rows))
    part = np.zeros(len(samples), np.int64)
    total = [0] * len(shares)
    for kind in sorted(kinds):
        filled = [0] * len(shares)
        for _, _, rows in sorted(kinds[kind]):
            wanting = [
                ((filled[p] + len(rows) / 2) / share, (total[p] + len(rows) / 2) / share, p)
                for p, share in enumerate(shares)
            ]
            chosen = min(wanting)[-1]
            part[rows] = chosen
            filled[chosen] += len(rows)
            total[chosen] += len(rows)
    return part
