"""Exported classifiers run where nothing but PyTorch is installed."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from leanlight.contracts import UserError
from lit_modules.classifier import ImageClassifier
from lit_modules.classifier.export import export_network
from lit_modules.nn import ConvNet, LinearClassifier, SpikingConvNet

PLAIN = """
import sys, torch
for name in ("leanlight", "lit_modules", "datamodules", "callbacks", "lightning", "pytorch_lightning", "spikingjelly"):
    sys.modules[name] = None
for folder in sys.argv[1:]:
    image, logits = torch.load(folder + "/expected.pt", weights_only=True)
    program = torch.export.load(folder + "/network.pt2").module()
    torch.testing.assert_close(program(image), logits)
    torch.testing.assert_close(program(image[:1]), logits[:1], rtol=1e-4, atol=1e-5)
    print("same")
"""


def test_exports_give_the_same_logits_in_plain_pytorch_for_any_batch_size(tmp_path):
    torch.manual_seed(0)
    makers = {
        "convnet": lambda: ConvNet(1, width=4, depth=2, image_size=8),
        "rect": lambda: SpikingConvNet(width=4, depth=2, image_size=8, surrogate_gradient="rect_zero"),
        "atan": lambda: SpikingConvNet(width=4, depth=2, image_size=8, surrogate_gradient="atan"),
    }
    for name, make in makers.items():
        folder = tmp_path / name
        folder.mkdir()
        network = make()
        network(torch.rand(8, 1, 8, 8)).sum().backward()  # a trained network has gradients and running statistics
        weights = {key: value.clone() for key, value in network.state_dict().items()}
        export_network(network, torch.zeros(2, 1, 8, 8), folder, list("0123456789"))
        assert all(torch.equal(weights[key], value) for key, value in network.state_dict().items())
        assert network.training
        image = torch.rand(5, 1, 8, 8)
        torch.save((image, network.eval()(image).detach()), folder / "expected.pt")
        torch.testing.assert_close(load_file(folder / "weights.safetensors"), weights)
        card = json.loads((folder / "card.json").read_text())
        assert card["input"]["shape"] == ["N", 1, 8, 8]
        assert card["output"]["logits"] == ["N", 10]
        assert card["classes"] == list("0123456789")
    folders = [str(tmp_path / name) for name in makers]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *folders], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["same"] * 3, done.stderr


class FixedBatch(nn.Module):
    """A network that works for two images only."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, image):
        return self.head(image.reshape(2, 4))


def test_a_network_that_fixes_its_batch_size_is_exported_for_that_size(tmp_path):
    export_network(FixedBatch(), torch.zeros(2, 1, 2, 2), tmp_path)
    assert json.loads((tmp_path / "card.json").read_text())["input"]["shape"] == [2, 1, 2, 2]
    assert torch.export.load(tmp_path / "network.pt2").module()(torch.zeros(2, 1, 2, 2)).shape == (2, 3)


def test_a_module_that_never_saw_data_says_what_export_needs(tmp_path):
    with pytest.raises(UserError, match="image shape"):
        ImageClassifier(LinearClassifier).export(tmp_path)
