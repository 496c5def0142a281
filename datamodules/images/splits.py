"""Which items of a labelled set are trained on, which are held out, and which classes are kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from leanlight.contracts import UserError, nearest


def _share(counts: np.ndarray, fraction: float) -> np.ndarray:
    """Split ``round(fraction * sum(counts))`` over the classes in proportion, by largest remainder."""
    # Rounding each class by itself would miss the total by up to half the number of classes.
    exact = counts * fraction
    shares = np.floor(exact).astype(int)
    missing = round(float(exact.sum())) - shares.sum()
    shares[np.argsort(shares - exact, kind="stable")[:missing]] += 1
    return shares


def stratified_split(
    labels: np.ndarray,
    val_fraction: float,
    train_fraction: float,
    seed: int,
    train_items: int | None = None,
    classes: Sequence[int] | None = None,
    rest: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Positions (train, val), each sorted, with the same fraction of every class; no position is in both.

    Every class keeps one training item at least. Attributes (2-D labels) are not stratified.

    Args:
        labels: (N,) int64 classes or (N, K) attributes.
        val_fraction: share held out, in [0, 1).
        train_fraction: share of the rest that is kept, in (0, 1]; a larger share holds every item of a smaller one.
        seed: makes the permutation of each class.
        train_items: number of training items kept of those, in proportion to the classes; None: all.
        classes: labels whose items are kept, held out as they would be among all; None: all.
        rest: keep what `train_fraction` leaves out instead.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    groups = np.zeros(len(labels), int) if labels.ndim > 1 else labels
    present, counts = np.unique(groups, return_counts=True)
    held_out = np.minimum(_share(counts, val_fraction), counts - 1)
    kept = np.maximum(1, _share(counts - held_out, train_fraction))
    train, val = [], []
    for label, first, count in zip(present, held_out, kept, strict=True):
        members = generator.permutation(np.flatnonzero(groups == label))
        if classes is None or label in classes:
            val.append(members[:first])
            train.append(members[first + count :] if rest else members[first : first + count])
            if not len(train[-1]):
                raise UserError(
                    f"train_rest: train_fraction {train_fraction} leaves nothing of class {label} out; lower it"
                )
    chosen = np.concatenate(train) if train_items is None else _first_items(train, train_items)
    return np.sort(chosen), np.sort(np.concatenate(val))


def _first_items(parts: Sequence[np.ndarray], items: int) -> np.ndarray:
    """The first members of each class, `items` in all: one of each, the rest in proportion.

    By Webster's rule, an order of all members: more items hold every item of fewer, which largest remainders do not
    promise.
    """
    available = sum(map(len, parts))
    if not len(parts) <= items <= available:
        raise UserError(
            f"train_items: expected {len(parts)} (one of each class) to {available:,} (all that train), got {items:,}"
        )
    rank = [(np.arange(len(part)) + 0.5) / len(part) for part in parts]
    for one in rank:
        one[0] = 0
    return np.concatenate(parts)[np.argsort(np.concatenate(rank), kind="stable")[:items]]


def find_classes(wanted: Sequence[int | str], names: Sequence[str]) -> tuple[int, ...]:
    """Labels of classes that are named or numbered.

    Args:
        wanted: each a number from 0 or a name.
        names: of all classes; index = label.

    Raises:
        UserError: an unknown class, one that is there twice, or none.
    """
    found = []
    for one in wanted:
        if one in names:
            found.append(names.index(str(one)))
        elif isinstance(one, int) and 0 <= one < len(names):
            found.append(int(one))
        else:
            near = nearest(one, names) if isinstance(one, str) else ""
            raise UserError(f"classes: expected names, or numbers from 0 to {len(names) - 1}; got {one!r}{near}")
    if not found or len(set(found)) < len(found):
        raise UserError(f"classes: expected at least one, and each once; got {list(wanted)}")
    return tuple(found)
