"""Published CIFAR ResNets → weights of CifarResNet, against the network written down here once more."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from leanlight.contracts import UserError
from lit_modules.frozen import frozen_network
from lit_modules.nn import CifarResNet

WIDTH, BLOCKS, CLASSES = 4, 2, 7


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[3] / "scripts" / "convert_cifar_resnet.py"
    spec = importlib.util.spec_from_file_location("convert_cifar_resnet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published():
    """A state dict of the published kind at random, as the files of 2018 have it: without counts of batches."""
    generator = torch.Generator().manual_seed(0)
    state = {}

    def norm(name, channels):
        for what in ("weight", "bias", "running_mean", "running_var"):
            state[f"module.{name}.{what}"] = 0.5 + torch.rand(channels, generator=generator)

    def conv(name, channels, out):
        state[f"module.{name}.weight"] = 0.3 * torch.randn(out, channels, 3, 3, generator=generator)

    conv("conv1", 3, WIDTH)
    norm("bn1", WIDTH)
    channels = WIDTH
    for stage in (1, 2, 3):
        out = WIDTH * 2 ** (stage - 1)
        for block in range(BLOCKS):
            for number, size in ((1, channels), (2, out)):
                conv(f"layer{stage}.{block}.conv{number}", size, out)
                norm(f"layer{stage}.{block}.bn{number}", out)
            channels = out
    state["module.linear.weight"] = torch.randn(CLASSES, channels, generator=generator)
    state["module.linear.bias"] = torch.randn(CLASSES, generator=generator)
    return state


def answers(state, image):
    """What such a network gives in evaluation, of images in [0, 1]."""

    def norm(x, name):
        mean, var, weight, bias = (
            state[f"module.{name}.{what}"].view(-1, 1, 1) for what in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(x, name, stride=1):
        return F.conv2d(x, state[f"module.{name}.weight"], stride=stride, padding=1)

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    x = norm(conv((image - mean) / std, "conv1"), "bn1").relu()
    for stage in (1, 2, 3):
        for block in range(BLOCKS):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            y = norm(conv(x, f"{name}.conv1", stride), f"{name}.bn1").relu()
            y = norm(conv(y, f"{name}.conv2"), f"{name}.bn2")
            if stride == 2:
                quarter = y.shape[1] // 4
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
            x = (x + y).relu()
    return x.mean((2, 3)) @ state["module.linear.weight"].T + state["module.linear.bias"]


@pytest.mark.parametrize("nested", [True, False])
def test_a_converted_network_answers_as_the_published_one(script, tmp_path, nested):
    state = published()
    torch.save({"state_dict": state, "best_prec1": 91.7} if nested else state, tmp_path / "resnet.th")
    script.convert(tmp_path / "resnet.th", tmp_path / "out.safetensors")
    make = partial(CifarResNet, num_classes=CLASSES, depth=6 * BLOCKS + 2, width=WIDTH)
    network = frozen_network(make, tmp_path / "out.safetensors", "weights")
    image = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(network(image), answers(state, image), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("module.layer3.1.conv1.weight"), "SOURCE: expected conv1, as many blocks in layer1"),
        (
            lambda state: state.update({"module.layer2.0.shortcut.0.weight": torch.ones(1)}),
            r"option A\), got layer2.0.sh",
        ),
        (lambda state: state.pop("module.layer1.0.bn1.bias"), "SOURCE: .*missing features.3.bn1.bias"),
    ],
)
def test_other_networks_are_refused(script, tmp_path, change, message):
    state = published()
    change(state)
    torch.save(state, tmp_path / "resnet.th")
    with pytest.raises(UserError, match=message):
        script.convert(tmp_path / "resnet.th", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_name_of_another_kind_is_refused(script, tmp_path):
    with pytest.raises(UserError, match=r"OUT: expected a name that ends in .safetensors, got .*out.pt"):
        script.convert(tmp_path / "resnet.th", tmp_path / "out.pt")
