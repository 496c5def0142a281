"""An exported network of emotions answers in plain PyTorch as it does here, for clips of any number and length."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from leanlight.contracts import Modality
from lit_modules.tical import ConsistencyAssessment, Encoding, Geometry, LateFusion, MulT, SoftStages, ThreeStages
from lit_modules.tical.export import export_emotions
from lit_modules.tical.network import EmotionNetwork, Facts

PLAIN = """
import sys
for name in ("leanlight", "lit_modules", "datamodules", "callbacks", "lightning", "pytorch_lightning", "safetensors"):
    sys.modules[name] = None
"""
MODALITIES = {"text": Modality(6), "audio": Modality(5, 9), "video": Modality(4, 7)}
CLASSES = ("angry", "calm", "happy")
SIZE = Encoding(dim=8, layers=1, heads=2)
NETWORKS = {
    "tical": (ThreeStages, ConsistencyAssessment(dim=3, length=12)),
    "lorentz": (ThreeStages, ConsistencyAssessment(geometry=Geometry("lorentz"), dim=3, length=12)),
    "lstm": (partial(ThreeStages, encoding=Encoding(dim=8, layers=1, heads=2, sequence="lstm")), None),
    "soft": (SoftStages, ConsistencyAssessment("soft", dim=3, length=12)),
    "late": (LateFusion, None),
    "mult": (partial(MulT, dim=8, heads=2, levels=1, memory_levels=1), None),
}


def clips(count, steps=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    features = {
        name: torch.randn(*((count, steps) if one.longest else (count,)), one.width, generator=generator)
        for name, one in MODALITIES.items()
    }
    length = {name: torch.arange(count) % steps + 1 for name, one in MODALITIES.items() if one.longest}
    present = {name: torch.ones(count, dtype=torch.bool) for name in MODALITIES}
    present["audio"][1::3] = False
    length["audio"] = length["audio"] * present["audio"]
    return features, length, present


def make(name, outputs=3):
    torch.manual_seed(4)
    kind, assessment = NETWORKS[name]
    body = (kind if isinstance(kind, partial) else partial(kind, encoding=SIZE))(MODALITIES, outputs)
    facts = Facts(MODALITIES, CLASSES, (-1.0, 1.0) if outputs == 1 else None, {}, tuple(f"clip {i}" for i in range(40)))
    network = EmotionNetwork(body, facts, outputs, assessment).eval()
    network.scaling = {"text": (torch.full((6,), 0.5), torch.full((6,), 2.0))}
    if assessment is not None:
        with torch.no_grad():
            points = network.judge(*clips(40)).points
            label = torch.arange(40) % 3
            network.lists.add(points, label, torch.arange(40), torch.arange(40) % 2 == 0, torch.rand(40))
        network.assessing = True
    return network


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        else:
            same(found[name], value)


@pytest.mark.parametrize("name", NETWORKS)
def test_an_export_takes_raw_clips_of_any_number_and_length(tmp_path, name):
    network = make(name)
    export_emotions(network, tmp_path)
    program = torch.export.load(tmp_path / "network.pt2").module()
    assert json.loads((tmp_path / "card.json").read_text())["any_size"]
    for count, steps in ((1, 1), (1, 4), (5, 2), (3, 7)):
        features, length, present = clips(count, steps, seed=count)
        scaled = {**features, "text": (features["text"] - 0.5) / 2}
        with torch.no_grad():
            same(program(features, length, present), network(scaled, length, present))


def test_the_lines_of_the_card_recognise_a_clip_where_only_torch_is(tmp_path):
    network = make("tical")
    files = export_emotions(network, tmp_path)
    assert sorted(path.name for path in files) == ["card.json", "clips.csv", "network.pt2", "network.safetensors"]
    card = json.loads((tmp_path / "card.json").read_text())
    assert len(card["use"]) <= 12
    done = subprocess.run(
        [sys.executable, "-c", PLAIN + "\n".join(card["use"])], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    features = {name: torch.zeros(*((1, 4) if one.longest else (1,)), one.width) for name, one in MODALITIES.items()}
    features["text"] = (features["text"] - 0.5) / 2
    length = {name: torch.tensor([4]) for name in ("audio", "video")}
    with torch.no_grad():
        expected = network(features, length, {name: torch.ones(1, dtype=torch.bool) for name in MODALITIES})
    assert lines[0].split(" ")[0] == CLASSES[int(expected["probabilities"].argmax())]
    assert float(lines[1].split()[1]) == pytest.approx(float(expected["consistency"]), abs=1e-5)
    for line, name in zip(lines[2:], MODALITIES, strict=True):
        assert line.startswith(f"{name} {CLASSES[int(expected['says'][name])]} ")
        assert line.endswith(f"clip {int(expected['anchor'][name])}")


def test_a_network_of_scores_gives_scores_and_its_weights_are_the_trained_ones(tmp_path):
    network = make("late", outputs=1)
    export_emotions(network, tmp_path)
    features, length, present = clips(4)
    features["text"] = features["text"] * 2 + 0.5
    program = torch.export.load(tmp_path / "network.pt2").module()
    with torch.no_grad():
        found = program(features, length, present)["score"]
        torch.testing.assert_close(found, network(clips(4)[0], length, present)["score"], rtol=1e-4, atol=1e-5)
    saved = load_file(tmp_path / "network.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
