"""How a selection goes through the classes: hooks for progress and for finished classes, none by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lit_modules.selection.features import Features, class_members

#: Told of every so many steps done, e.g. picks of a greedy loop.
Advance = Callable[[int], None]
#: From the features of one class, its label and `Advance` to plain tensors.
ClassStep = Callable[[Features, int, Advance], dict[str, Tensor]]


class Work:
    """Goes through classes one after the other; an heir may show progress and keep what is done."""

    def classes(self, features: Features, step: ClassStep, steps: Sequence[int]) -> list[dict[str, Tensor]]:
        """Call `step` for every class, in ascending order, and return what it gives.

        Args:
            features: of all items.
            step: its result depends on its arguments alone.
            steps: how often each class advances, for a progress bar.
        """
        return [self.one(features, label, step) for label in range(features.num_classes)]

    def one(
        self, features: Features, label: int, step: ClassStep, advance: Advance = lambda done: None
    ) -> dict[str, Tensor]:
        """The result of one class."""
        return step(features.take(class_members(features.label, label)), label, advance)
