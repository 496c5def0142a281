"""Recommendations for sessions in the catalogue's own ids; without Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from leanlight.contracts import Catalogue, UserError, nearest
from lit_modules.hid.network import SessionNetwork
from lit_modules.hid.scoring import top_k
from lit_modules.nn.checks import device_of

_NAMES = 100_000  # of so many a misspelt one is looked for


@dataclass(frozen=True)
class Recommendation:
    """One item of a list.

    Args:
        item: its original id.
        score: of the network; comparable within a list alone.
        category: names of its categories, with ``;`` between them; empty without one.
        intent: numbers of its intents, likewise.
        head: whether it is among the most clicked.
    """

    item: str
    score: float
    category: str
    intent: str
    head: bool


class ItemFacts:
    """What stands beside an item in a list or a table.

    Args:
        catalogue: the items.
        pairs: (P,) items and (P,) intents from 0 that they belong to, by item; None without intents.
    """

    def __init__(self, catalogue: Catalogue, pairs: tuple[Tensor, Tensor] | None = None) -> None:
        self.catalogue = catalogue
        self.category = _joined(catalogue.item, [catalogue.categories[i] for i in catalogue.category.tolist()])
        self.intent = {} if pairs is None else _joined(pairs[0], [str(i) for i in pairs[1].tolist()])
        self.clicks, self.head = catalogue.clicks.tolist(), catalogue.head.tolist()

    @cached_property
    def number(self) -> dict[str, int]:
        """Number of each original id."""
        return {name: number for number, name in enumerate(self.catalogue.names, 1)}

    def numbers(self, session: Sequence[str]) -> list[int]:
        """Numbers of a session's original ids. Raises UserError for an unknown one."""
        for name in session:
            if name not in self.number:
                known = self.number if len(self.number) <= _NAMES else ()
                raise UserError(
                    f"session: item {name!r} is none of the {len(self.number):,} that this model knows"
                    f"{nearest(name, known)}"
                )
        return [self.number[name] for name in session]

    def of_category(self, name: str) -> Tensor:
        """(m,) bool, which items belong to a category. Raises UserError for an unknown one."""
        categories = self.catalogue.categories
        if name not in categories:
            what = f"one of {len(categories):,} categories" if categories else "none, since the data have no categories"
            raise UserError(f"category: expected {what}, got {name!r}{nearest(name, categories)}")
        mine = torch.zeros(self.catalogue.num_items, dtype=torch.bool)
        mine[self.catalogue.item[self.catalogue.category == categories.index(name)] - 1] = True
        return mine

    def recommendation(self, number: int, score: float) -> Recommendation:
        """What is told of an item."""
        category, intent = self.category.get(number, ""), self.intent.get(number, "")
        return Recommendation(self.catalogue.names[number - 1], score, category, intent, self.head[number])


def _joined(item: Tensor, what: Sequence[str]) -> dict[int, str]:
    """What belongs to each item, as one text."""
    found: dict[int, str] = {}
    for number, name in zip(item.tolist(), what, strict=True):
        found[number] = f"{found[number]};{name}" if number in found else name
    return found


@torch.no_grad()
def recommend(
    network: SessionNetwork,
    facts: ItemFacts,
    sessions: Sequence[Sequence[str]],
    k: int = 10,
    exclude_seen: bool = False,
    category: str | None = None,
    batch_size: int = 256,
) -> list[list[Recommendation]]:
    """The K best items of each session, best first, ties by the item's number; scored in one pass, in batches.

    A list is shorter than K where `exclude_seen` leaves fewer items. Of a session that is longer than the backbone can
    read its last clicks count.

    Args:
        network: on any device; it is left in evaluation mode.
        facts: of its items.
        sessions: original ids in the order of the clicks, one at least in each.
        k: items of a list (K), at most those of the catalogue, or of the category.
        exclude_seen: leave out what the session has clicked.
        category: recommend items of this category alone.
        batch_size: sessions that are scored at once.

    Raises:
        UserError: an unknown item or category, an empty session, or K out of range.
    """
    allowed = None if category is None else facts.of_category(category)
    candidates = facts.catalogue.num_items if allowed is None else int(allowed.sum())
    if not 1 <= k <= candidates:
        where = "catalogue" if category is None else f"category {category!r}"
        raise UserError(f"k: expected 1 to {candidates:,}, the items of the {where}, got {k}")
    if not all(sessions):
        raise UserError("session: expected one item at least, got an empty session")
    limit = getattr(network.backbone, "max_length", None) or 0
    clicks = [torch.tensor(facts.numbers(session)[-limit:]) for session in sessions]
    device = device_of(network)
    allowed = None if allowed is None else allowed.to(device)
    network.eval()
    answers: list[list[Recommendation]] = [[] for _ in sessions]
    # Sessions of about one length together: less padding.
    for part in torch.tensor([len(click) for click in clicks]).argsort(stable=True).split(batch_size):
        items = pad_sequence([clicks[i] for i in part.tolist()], batch_first=True).to(device)
        scores = _masked(network(items), items, allowed, exclude_seen)
        numbers, values = (found.tolist() for found in top_k(scores, k))
        for where, *found in zip(part.tolist(), numbers, values, strict=True):
            pairs = [(number, score) for number, score in zip(*found, strict=True) if score != -float("inf")]
            answers[where] = [facts.recommendation(*pair) for pair in pairs]
    return answers


def _masked(scores: Tensor, items: Tensor, allowed: Tensor | None, exclude_seen: bool) -> Tensor:
    """Scores (N, m), minus infinity for what may not be recommended."""
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    if exclude_seen:
        seen = torch.zeros(len(items), scores.shape[1] + 1, dtype=torch.bool, device=items.device)
        scores = scores.masked_fill(seen.scatter_(1, items, True)[:, 1:], -torch.inf)
    return scores
