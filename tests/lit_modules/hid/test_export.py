"""An exported recommender answers in plain PyTorch as it does here, for sessions of any number and length."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from session_networks import ITEMS, NETWORKS, catalogue, make

from lit_modules.hid.export import export_recommender
from lit_modules.hid.recommend import ItemFacts, recommend

PLAIN = """
import sys
for name in ("leanlight", "lit_modules", "datamodules", "callbacks", "lightning", "pytorch_lightning", "safetensors"):
    sys.modules[name] = None
"""


@pytest.mark.parametrize("name", NETWORKS)
def test_an_export_takes_sessions_of_any_number_and_length(tmp_path, name):
    network = make(name)
    export_recommender(network, ItemFacts(catalogue()), tmp_path)
    program = torch.export.load(tmp_path / "network.pt2").module()
    for shape in ((1, 1), (1, 2), (3, 1), (5, 9), (2, 3)):
        items = torch.randint(1, ITEMS + 1, shape)
        items[-1, shape[1] // 2 + 1 :] = 0
        with torch.no_grad():
            torch.testing.assert_close(program(items), network(items), msg=lambda text, shape=shape: f"{shape}: {text}")


def test_the_lines_of_the_card_recommend_where_only_torch_is(tmp_path):
    network, facts = make("STAMP"), ItemFacts(catalogue(), (torch.arange(1, ITEMS + 1), torch.arange(ITEMS) % 4))
    files = export_recommender(network, facts, tmp_path)
    assert sorted(path.name for path in files) == ["card.json", "items.csv", "items.safetensors", "network.pt2"]
    card = json.loads((tmp_path / "card.json").read_text())
    assert len(card["use"]) <= 12
    code = PLAIN + "\n".join(card["use"])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (expected,) = recommend(network, facts, [catalogue().names[:2]], exclude_seen=True)
    assert [line.split(" ", 1)[0] for line in done.stdout.splitlines()] == [one.item for one in expected]


def test_the_table_has_every_item_with_its_facts(tmp_path):
    network, facts = make("STAMP"), ItemFacts(catalogue(), (torch.tensor([1, 3, 3]), torch.tensor([2, 0, 1])))
    export_recommender(network, facts, tmp_path)
    with open(tmp_path / "items.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    items = catalogue()
    assert [row["item"] for row in rows] == list(items.names)
    assert [int(row["number"]) for row in rows] == list(range(1, ITEMS + 1))
    assert [int(row["clicks"]) for row in rows] == items.clicks[1:].tolist()
    assert [row["head"] == "1" for row in rows] == items.head[1:].tolist()
    assert [row["intent"] for row in rows[:3]] == ["2", "", "0;1"]
    assert rows[0]["category"] == "hats"
    assert rows[3]["category"] == 'hats;a "b", c'
    embedding = load_file(tmp_path / "items.safetensors")["embedding"]
    assert torch.equal(embedding, network.backbone.item_embedding())
