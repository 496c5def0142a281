"""Pictures cut into strips, some with a strip of another class: modalities whose conflicts are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from datamodules.emotion.clips import Array, Clips
from datamodules.images import sources
from leanlight.contracts import UserError
from leanlight.contracts.ranges import NonNegativeFloat, PositiveInt, Seed, UnitInterval

STRIPS = ("left", "middle", "right")
Pictures = Literal["digits", "mnist"]
_SIZES = {"digits": (900, 200, 697), "mnist": (4000, 1000, 5000)}


@dataclass(frozen=True)
class PlantedConflicts:
    """Pictures of digits in three strips of columns, each strip a modality; not emotions.

    A share of the clips has one strip, any of the three, from another picture of the same part and of another class,
    all of these equally likely. The label is the class of the other two strips. Outer strips are a third of the
    columns, rounded up. The first pictures of the set are for training, those after them for validation, the last
    ones for test.

    Args:
        pictures: ``digits``: scikit-learn's, 8x8; ``mnist``: 28x28.
        train: clips for training; default 900 of ``digits``, 4,000 of ``mnist``.
        val: clips for validation; default 200 or 1,000.
        test: clips for test; default 697 or 5,000.
        conflict: probability of a foreign strip, in [0, 1].
        noise: standard deviation of the Gaussian noise on grey levels from 0 to 1.
        seed: makes foreign strips and noise; no other seed has a part in them.
    """

    pictures: Pictures = "digits"
    train: PositiveInt | None = None
    val: PositiveInt | None = None
    test: PositiveInt | None = None
    conflict: UnitInterval = 0.4
    noise: NonNegativeFloat = 0.3
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.pictures not in (known := get_args(Pictures)):
            raise UserError(f"planted.pictures: expected one of {', '.join(known)}, got {self.pictures!r}")
        for part, least in (("train", 1), ("val", 0), ("test", 1)):
            size = getattr(self, part)
            if size is not None and size < least:
                raise UserError(f"planted.{part}: expected at least {least}, got {size}")
        if not 0 <= self.conflict <= 1:
            raise UserError(f"planted.conflict: expected a probability, got {self.conflict}")
        if not self.noise >= 0:
            raise UserError(f"planted.noise: expected a number from 0, got {self.noise}")

    def make(self, root: Path, download: bool = False) -> Clips:
        """The clips, the same for equal arguments.

        Args:
            root: folder of data sets, where MNIST may lie.
            download: whether MNIST may be downloaded.
        """
        raw = sources.load(self.pictures, root, download=download)
        images = np.concatenate([raw.train[0], raw.test[0]])
        labels = np.concatenate([raw.train[1], raw.test[1]])
        chosen = self._chosen(len(images))
        parts = np.repeat(list(chosen), [len(rows) for rows in chosen.values()])
        # Only random() is used: the numbers behind other methods of a generator may change with numpy's version.
        generator = np.random.Generator(np.random.PCG64(self.seed))
        picture = np.concatenate([self._pictures(generator, labels, rows) for rows in chosen.values()])
        own = labels[np.concatenate(list(chosen.values()))]
        side = images.shape[-1]
        outer = -(-side // 3)
        bounds = (0, outer, side - outer, side)
        return Clips(
            names=tuple(f"{part}_{row}" for part, rows in chosen.items() for row in range(len(rows))),
            features={
                name: self._noisy(generator, images[picture[:, strip], 0, :, bounds[strip] : bounds[strip + 1]])
                for strip, name in enumerate(STRIPS)
            },
            label=own,
            classes=raw.classes,
            unimodal={name: labels[picture[:, strip]] for strip, name in enumerate(STRIPS)},
            conflict=(labels[picture] != own[:, None]).any(axis=1),
            splits={"official": parts},
            source=f"pictures of {raw.source}",
        )

    def _chosen(self, available: int) -> dict[str, Array]:
        """Positions of the pictures of each part."""
        train, val, test = (
            default if size is None else size
            for size, default in zip((self.train, self.val, self.test), _SIZES[self.pictures], strict=True)
        )
        if train + val + test > available:
            raise UserError(
                f"planted.train: expected train, val and test to be at most {available:,} in all, the pictures of "
                f"{self.pictures}, got {train + val + test:,}"
            )
        order = np.arange(available)
        return {"train": order[:train], "val": order[train : train + val], "test": order[available - test :]}

    def _pictures(self, generator: np.random.Generator, labels: Array, rows: Array) -> Array:
        """(n, 3) positions of the pictures from which the strips of each clip are taken."""
        own = labels[rows]
        conflicted, which, donor = generator.random((3, len(rows)))
        by_class = np.argsort(own, kind="stable")
        counts = np.bincount(own)
        others = len(rows) - counts[own]
        # Counted among the pictures of other classes: past the block of the clip's own class.
        place = (donor * others).astype(np.int64)
        place += np.where(place >= (counts.cumsum() - counts)[own], counts[own], 0)
        picture = np.repeat(rows[:, None], len(STRIPS), axis=1)
        foreign = np.flatnonzero((conflicted < self.conflict) & (others > 0))
        picture[foreign, (which[foreign] * len(STRIPS)).astype(np.int64)] = rows[by_class[place[foreign]]]
        return picture

    def _noisy(self, generator: np.random.Generator, strips: Array) -> Array:
        """(n, pixels) float32 grey levels with noise."""
        from scipy.special import ndtri

        levels = strips.reshape(len(strips), -1) / 255
        if self.noise:
            levels += self.noise * ndtri(np.maximum(generator.random(levels.shape), 2.0**-54))
        return levels.astype(np.float32)
