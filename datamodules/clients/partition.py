"""Spread a labelled set over the clients of a federation: pure functions of (labels, parameters, seed).

Every scheme returns one sorted array of positions a client. Positions are disjoint; each scheme says whether it uses
all of them. A scheme that cannot be met ends with one UserError after a bounded number of tries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from leanlight.contracts import UserError
from leanlight.contracts.ranges import NonNegativeInt, PositiveFloat, PositiveInt

Parts = list[np.ndarray]
_TRIES = 1000
# A split whose first draws each leave so many clients short is not drawn on: the chance of a draw that leaves none is
# about e^-20, since clients fall short nearly independently.
_FIRST, _HOPELESS = 10, 20


class Partition:
    """Base of all schemes: how the training items of a federation are spread over its clients."""

    def split(self, labels: np.ndarray, clients: int, seed: int) -> Parts:
        """Spread items; raises UserError when it cannot be done.

        Args:
            labels: (N,) int class of every item.
            clients: number of clients.
            seed: makes everything random in it.

        Returns:
            `clients` sorted arrays of positions in `labels`.
        """
        raise NotImplementedError


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def _check(labels: np.ndarray, clients: int, smallest: int = 1) -> None:
    if clients < 1:
        raise UserError(f"clients: expected at least 1, got {clients}")
    if clients * smallest > len(labels):
        raise UserError(
            f"clients: {clients} of at least {smallest} items each need more than the {len(labels):,} there are"
        )


@dataclass(frozen=True)
class IID(Partition):
    """A random permutation cut into parts of equal size (they differ by one at most). Uses all items."""

    def split(self, labels: np.ndarray, clients: int, seed: int) -> Parts:
        _check(labels, clients)
        return [np.sort(part) for part in np.array_split(_generator(seed).permutation(len(labels)), clients)]


@dataclass(frozen=True)
class Dirichlet(Partition):
    """Label skew: each class is spread over clients by a Dirichlet(alpha) draw (Wang et al. 2020, FedMA).

    Uses all items.

    Args:
        alpha: concentration α > 0; the smaller, the fewer classes a client has.
        min_size: items that every client has at least, else all is drawn anew; 0 allows empty clients.
        capped: whether a client that holds its share N / clients or more gets no further class.
    """

    alpha: PositiveFloat = 0.3
    min_size: NonNegativeInt = 1
    capped: bool = True

    def split(self, labels: np.ndarray, clients: int, seed: int) -> Parts:
        if self.alpha <= 0:
            raise UserError(f"alpha: expected a positive number, got {self.alpha}")
        _check(labels, clients, self.min_size)
        generator, fewest = _generator(seed), clients
        for tries in range(1, _TRIES + 1):
            parts = self._draw(labels, clients, generator)
            short = sum(len(part) < self.min_size for part in parts)
            if not short:
                return parts
            fewest = min(fewest, short)
            if tries == _FIRST and fewest > _HOPELESS:
                break
        raise UserError(
            f"partition: no Dirichlet({self.alpha}) split of {len(labels):,} items over {clients} clients gave each "
            f"{self.min_size} items in {tries} tries, {fewest} clients were short at best; lower min_size or clients, "
            "or raise alpha"
        )

    def _draw(self, labels: np.ndarray, clients: int, generator: np.random.Generator) -> Parts:
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        held, room = np.zeros(clients, int), len(labels) / clients
        for label in np.unique(labels):
            members = generator.permutation(np.flatnonzero(labels == label))
            # Without the cap one client can draw most of every class (Wang et al. stop giving at the mean size).
            open_to = held < room if self.capped else np.ones(clients, bool)
            weight = generator.dirichlet(np.full(clients, self.alpha)) * open_to
            if weight.sum() == 0:  # rounding: everybody who has room drew 0
                weight = open_to.astype(float)
            cuts = np.rint(np.cumsum(weight / weight.sum())[:-1] * len(members)).astype(int)
            for client, piece in enumerate(np.split(members, cuts)):
                parts[client].append(piece)
                held[client] += len(piece)
        return [np.sort(np.concatenate(part)) for part in parts]


@dataclass(frozen=True)
class QuantitySkew(Partition):
    """Sizes by a Dirichlet(alpha) draw, contents IID. Uses all items.

    Args:
        alpha: concentration α > 0; the smaller, the more the sizes differ.
        guarantee_all_classes: give each client one item of each class first.
    """

    alpha: PositiveFloat = 0.5
    guarantee_all_classes: bool = False

    def split(self, labels: np.ndarray, clients: int, seed: int) -> Parts:
        classes = np.unique(labels)
        smallest = len(classes) if self.guarantee_all_classes else 1
        _check(labels, clients, smallest)
        generator = _generator(seed)
        order = generator.permutation(len(labels))
        first: list[list[int]] = [[] for _ in range(clients)]
        if self.guarantee_all_classes:
            for label in classes:
                members = order[labels[order] == label][:clients]
                if len(members) < clients:
                    raise UserError(f"class {label} has {len(members)} items, fewer than the {clients} clients")
                for client, member in enumerate(members):
                    first[client].append(int(member))
            taken = np.concatenate([np.asarray(part) for part in first])
            order = order[~np.isin(order, taken)]
        sizes = _sizes(len(order), clients, self.alpha, 0 if self.guarantee_all_classes else 1, generator)
        rest = np.split(order, np.cumsum(sizes)[:-1])
        return [np.sort(np.concatenate([np.asarray(a, int), b])) for a, b in zip(first, rest, strict=True)]


def _sizes(total: int, clients: int, alpha: float, least: int, generator: np.random.Generator) -> np.ndarray:
    """Sizes that sum to `total`, each at least `least`, the rest by a Dirichlet draw and largest remainder."""
    share = generator.dirichlet(np.full(clients, alpha))
    exact = share * (total - least * clients)
    sizes = np.floor(exact).astype(int)
    missing = total - least * clients - int(sizes.sum())
    sizes[np.argsort(sizes - exact, kind="stable")[:missing]] += 1
    return sizes + least


@dataclass(frozen=True)
class ClassesPerClient(Partition):
    """Each client owns `classes` classes: class ``i mod C`` and others at random (NIID-Bench, Li et al. 2022).

    A class is cut evenly among its owners. Leaves out the items of a class that nobody owns.

    Args:
        classes: classes of a client, 1 to C.
    """

    classes: PositiveInt = 3

    def split(self, labels: np.ndarray, clients: int, seed: int) -> Parts:
        names = np.unique(labels)
        if not 1 <= self.classes <= len(names):
            raise UserError(f"classes: expected 1 to {len(names)}, got {self.classes}")
        _check(labels, clients)
        generator = _generator(seed)
        own = np.zeros((clients, len(names)), bool)
        for client in range(clients):
            own[client, client % len(names)] = True
            others = np.flatnonzero(~own[client])
            own[client, generator.choice(others, self.classes - 1, replace=False)] = True
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for column, label in enumerate(names):
            owners = np.flatnonzero(own[:, column])
            members = generator.permutation(np.flatnonzero(labels == label))
            for owner, part in zip(owners, np.array_split(members, max(1, len(owners))), strict=False):
                parts[owner].append(part)
        return [np.sort(np.concatenate(part)) for part in parts]


@dataclass(frozen=True)
class Shards(Partition):
    """Sort by label, cut into ``clients * shards`` equal shards, deal `shards` to each (McMahan et al. 2017).

    Uses all items.

    Args:
        shards: shards of a client; 2 in McMahan et al.
    """

    shards: PositiveInt = 2

    def split(self, labels: np.ndarray, clients: int, seed: int) -> Parts:
        if self.shards < 1:
            raise UserError(f"shards: expected at least 1, got {self.shards}")
        _check(labels, clients, self.shards)
        generator = _generator(seed)
        order = generator.permutation(len(labels))
        order = order[np.argsort(labels[order], kind="stable")]
        pieces = np.array_split(order, clients * self.shards)
        dealt = generator.permutation(len(pieces)).reshape(clients, self.shards)
        return [np.sort(np.concatenate([pieces[i] for i in row])) for row in dealt]


@dataclass(frozen=True)
class ClassImbalance(Partition):
    """Make the whole set imbalanced, then spread it: the first half of the classes is kept, of each other 1 / ratio.

    Drawn without replacement; leaves out what the imbalance drops.

    Args:
        ratio: of the sizes of an early and a late class, at least 1.
        alpha: concentration α > 0 of the draw that spreads the set.
        spread: by ``label`` (`Dirichlet`, capped) or by ``quantity`` (`QuantitySkew`).
        min_size: items that every client has at least, where it is spread by label.
    """

    ratio: PositiveFloat = 3.0
    alpha: PositiveFloat = 0.3
    spread: Literal["label", "quantity"] = "label"
    min_size: NonNegativeInt = 1

    def split(self, labels: np.ndarray, clients: int, seed: int) -> Parts:
        if self.ratio < 1:
            raise UserError(f"ratio: expected at least 1, got {self.ratio}")
        generator, names = _generator(seed), np.unique(labels)
        kept = []
        for column, label in enumerate(names):
            members = generator.permutation(np.flatnonzero(labels == label))
            kept.append(members if column < len(names) / 2 else members[: max(1, round(len(members) / self.ratio))])
        chosen = np.sort(np.concatenate(kept))
        scheme = Dirichlet(self.alpha, self.min_size) if self.spread == "label" else QuantitySkew(self.alpha)
        return [chosen[part] for part in scheme.split(labels[chosen], clients, seed + 1)]


def class_matrix(labels: np.ndarray, parts: Parts, num_classes: int) -> np.ndarray:
    """(clients, num_classes) int: how many items of each class a client holds.

    Args:
        labels: (N,) int class of every item.
        parts: positions of the items of every client.
        num_classes: number of columns.
    """
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])
