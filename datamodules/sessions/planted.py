"""Sessions with known intents, for tests and for the mechanism of a method in small."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from datamodules.sessions.clicks import Array, Items, Part, Raw, offsets_of
from leanlight.contracts import UserError
from leanlight.contracts.ranges import NonNegativeFloat, PositiveInt, Seed, UnitInterval


@dataclass(frozen=True)
class Planted:
    """Sessions that follow intents: sets of categories whose items are clicked together.

    Every click jumps to a random intent with probability `jump`, goes to one of the item's preferred successors with
    probability `follow`, and otherwise to an item of the present intent. Such an item is drawn by its category, all
    equally likely, and its popularity there, in proportion to rank^-exponent. A click is of the intent of its item.

    Names of categories are ``intent.category``, those of items ``intent.category.rank``, all from 0.

    Args:
        intents: number of intents.
        categories: of an intent.
        items: of a category.
        exponent: of popularity by rank.
        successors: preferred ones of an item, of its own intent; drawn evenly.
        min_length: clicks of the shortest sessions; lengths are drawn evenly.
        max_length: clicks of the longest sessions.
        jump: probability of a jump, in [0, 1].
        follow: probability of a preferred successor, in [0, 1 - jump].
        train_sessions: for training and validation.
        test_sessions: for test.
        seed: makes items' successors and all sessions; no other seed has a part in them.
    """

    intents: PositiveInt = 12
    categories: PositiveInt = 8
    items: PositiveInt = 25
    exponent: NonNegativeFloat = 1.2
    successors: PositiveInt = 4
    min_length: PositiveInt = 3
    max_length: PositiveInt = 8
    jump: UnitInterval = 0.2
    follow: UnitInterval = 0.5
    train_sessions: PositiveInt = 3000
    test_sessions: PositiveInt = 500
    seed: Seed = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(field.default, int) and field.name != "seed" and getattr(self, field.name) < 1:
                raise UserError(f"planted.{field.name}: expected at least 1, got {getattr(self, field.name)}")
        if not self.min_length <= self.max_length:
            raise UserError(
                f"planted.min_length: expected at most max_length ({self.max_length}), got {self.min_length}"
            )
        if self.jump < 0 or self.follow < 0 or self.jump + self.follow > 1:
            raise UserError(
                f"planted.follow: expected jump and follow from 0, in all at most 1, got {self.jump} and {self.follow}"
            )
        if self.successors >= self.categories * self.items:
            raise UserError(
                f"planted.successors: expected fewer than the other items of an intent "
                f"({self.categories * self.items - 1}), got {self.successors}"
            )

    def make(self) -> Raw:
        """The sessions, the same for equal arguments."""
        # Only random() is used: the numbers behind other methods of a generator may change with numpy's version.
        generator = np.random.Generator(np.random.PCG64(self.seed))
        successors = self._successors(generator)
        train, test = (self._sessions(generator, successors, n) for n in (self.train_sessions, self.test_sessions))
        return Raw(train, test, self._items(), "made")

    def _items(self) -> Items:
        category = np.repeat(np.arange(self.intents * self.categories), self.items)
        categories = tuple(f"{i}.{c}" for i in range(self.intents) for c in range(self.categories))
        names = tuple(f"{name}.{rank}" for name in categories for rank in range(self.items))
        return Items(names, np.arange(len(names)), category, categories)

    def _successors(self, generator: np.random.Generator) -> Array:
        """(m, successors) different items of an item's intent, without itself."""
        of_intent, count = self.categories * self.items, self.intents * self.categories * self.items
        steps = np.empty((count, 0), np.int64)  # ahead of the item, past itself, in the circle of its intent
        for taken in range(self.successors):
            step = (generator.random(count) * (of_intent - 1 - taken)).astype(np.int64)
            for other in np.sort(steps, axis=1).T:  # count on past those that are taken
                step += step >= other
            steps = np.column_stack([steps, step])
        item = np.arange(count)[:, None]
        return item // of_intent * of_intent + (item + 1 + steps) % of_intent

    def _draw(self, generator: np.random.Generator, intent: Array) -> Array:
        """An item of each intent."""
        weight = np.cumsum(np.arange(1, self.items + 1, dtype=float) ** -self.exponent)
        u = generator.random((2, len(intent)))
        rank = np.searchsorted(weight, u[0] * weight[-1], side="right")
        return ((intent * self.categories) + (u[1] * self.categories).astype(np.int64)) * self.items + rank

    def _sessions(self, generator: np.random.Generator, successors: Array, count: int) -> Part:
        spread = self.max_length - self.min_length + 1
        lengths = self.min_length + (generator.random(count) * spread).astype(np.int64)
        clicks = np.empty((count, self.max_length), np.int64)
        for step in range(self.max_length):
            choice, which, where = generator.random((3, count))
            anywhere = (where * self.intents).astype(np.int64)
            if step == 0:
                clicks[:, 0] = self._draw(generator, anywhere)
                continue
            last = clicks[:, step - 1]
            jumps, follows = choice < self.jump, choice >= 1 - self.follow
            drawn = self._draw(generator, np.where(jumps, anywhere, last // (self.categories * self.items)))
            preferred = successors[last, (which * self.successors).astype(np.int64)]
            clicks[:, step] = np.where(follows & ~jumps, preferred, drawn)
        return Part(clicks[np.arange(self.max_length) < lengths[:, None]], offsets_of(lengths))
