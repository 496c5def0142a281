"""Small recommenders with a catalogue of their own, and no Trainer."""

from functools import partial

import torch

from leanlight.contracts import Catalogue, Sessions
from lit_modules.hid import (
    GCEGNN,
    LAPSR,
    SRGNN,
    STAMP,
    GRU4Rec,
    ItemKNN,
    Popularity,
    Scoring,
    SessionNetwork,
    SessionPopularity,
    TailNet,
)

ITEMS = 30
NETWORKS = {
    "GRU4Rec": (partial(GRU4Rec, dim=6), None),
    "STAMP": (partial(STAMP, dim=6), None),
    "SRGNN": (partial(SRGNN, dim=6), None),
    "GCEGNN": (partial(GCEGNN, dim=6), None),
    "TailNet": (partial(STAMP, dim=6), partial(TailNet, dim=6)),
    "LAPSR": (partial(STAMP, dim=6), LAPSR),
    "Popularity": (Popularity, None),
    "SessionPopularity": (SessionPopularity, None),
    "ItemKNN": (ItemKNN, None),
}


def catalogue():
    clicks = torch.arange(ITEMS + 1) % 7 + 1
    clicks[0] = 0
    item = torch.cat([torch.arange(1, ITEMS + 1), torch.tensor([4])])  # item 4 has two categories
    category = torch.cat([torch.arange(1, ITEMS + 1) % 3, torch.tensor([2])])
    order = item.argsort(stable=True)
    names = tuple(f"item, {i}" if i == 2 else f"p{100 - i}" for i in range(1, ITEMS + 1))
    return Catalogue(
        names=names,
        categories=("shoes", "hats", 'a "b", c'),
        item=item[order],
        category=category[order],
        clicks=clicks,
        head=clicks > 5,
    )


def make(name):
    backbone, plugin = NETWORKS[name]
    torch.manual_seed(0)
    network = SessionNetwork(backbone(ITEMS), Scoring(), plugin and plugin())
    sessions = Sessions(torch.randint(1, ITEMS + 1, (60,)), torch.arange(0, 61, 5))
    for part in (network.backbone, network.plugin):
        if part is not None:
            part.prepare(catalogue(), sessions)
    return network.eval()
