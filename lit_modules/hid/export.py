"""Take a trained recommender out of the suite: a network, a table of its items, and how to recommend with them."""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path

import torch

from leanlight.contracts import atomic_path, atomic_write
from lit_modules.export import write_program
from lit_modules.hid.network import SessionNetwork
from lit_modules.hid.recommend import ItemFacts

_USE = """\
import csv
import torch

items = list(csv.DictReader(open("items.csv", encoding="utf-8", newline="")))
number = {row["item"]: int(row["number"]) for row in items}
network = torch.export.load("network.pt2").module()
session = torch.tensor([[number[item] for item in ("FIRST", "SECOND")]])
scores = network(session)[0]
scores[session[0] - 1] = -torch.inf  # without what was clicked
for score, place in zip(*scores.topk(10)):
    print(items[place]["item"], float(score), items[place]["category"])
"""


def export_recommender(network: SessionNetwork, facts: ItemFacts, directory: Path) -> list[Path]:
    """Write ``network.pt2``, ``items.csv``, ``items.safetensors`` and ``card.json``; return their paths.

    ``torch.export.load("network.pt2").module()(items)`` gives scores (N, m) for items (N, L) int64 by their numbers,
    padded with 0 behind, for any N and L up to the backbone's ``max_length`` (for one size alone where a network fixes
    it; the card says which). ``items.csv`` has a row an item: original id, number, category, intent, clicks in
    training, head. ``items.safetensors`` has ``embedding`` (m + 1, d), row 0 being padding; a network without
    embeddings has no such file. ``card.json`` describes them and has lines that recommend.

    Args:
        network: trained; it stays where it is.
        facts: of its items.
        directory: where to; it exists.
    """
    program, table, tensors, card = (
        directory / name for name in ("network.pt2", "items.csv", "items.safetensors", "card.json")
    )
    exported = copy.deepcopy(network).cpu().eval()
    example = torch.tensor([[1, 2, 1], [2, 0, 0]])
    longest = getattr(network.backbone, "max_length", None)
    any_size = write_program(exported, example, program, length_dim=1, longest=longest)
    sizes = ["N", "L"] if any_size else list(example.shape)
    atomic_write(table, _table(facts))
    files = [program, table]
    if network.trains:
        from safetensors.torch import save_file

        with atomic_path(tensors) as part:
            save_file({"embedding": exported.backbone.item_embedding().detach().contiguous().clone()}, part)
        files.append(tensors)
    first = facts.catalogue.names[:2]
    content = {
        "network": type(network.backbone).__name__,
        "input": {"shape": sizes, "dtype": "int64", "meaning": "numbers of the clicked items, 0 behind them"},
        "output": {
            "shape": [sizes[0], facts.catalogue.num_items],
            "meaning": "score of the item with number column + 1",
        },
        "longest": longest,
        "items": facts.catalogue.num_items,
        "categories": len(facts.catalogue.categories),
        "parameters": sum(parameter.numel() for parameter in exported.parameters()),
        "torch": str(torch.__version__),
        "use": _USE.replace('"FIRST", "SECOND"', ", ".join(json.dumps(name) for name in first)).splitlines(),
    }
    atomic_write(card, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return [*files, card]


def _table(facts: ItemFacts) -> str:
    """The items in the order of their numbers, as CSV."""
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["item", "number", "category", "intent", "clicks", "head"])
    for number, name in enumerate(facts.catalogue.names, 1):
        known = facts.category.get(number, ""), facts.intent.get(number, "")
        rows.writerow([name, number, *known, facts.clicks[number], int(facts.head[number])])
    return text.getvalue()
