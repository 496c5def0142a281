"""Memory of a training step from shapes alone, against arithmetic and against real tensors."""

import pytest
import torch
from torch import nn

from leanlight.__main__ import main
from leanlight.contracts import HasStep, TrainingStep
from leanlight.estimate import Estimate, estimate_step, saved_bytes
from leanlight.experiment import build
from leanlight.registry import METHODS

FLOAT = 4
# See docs/scaling.md.
NOT_ESTIMATED = {
    "at_bptt": "DatasetDistillation",
    "hid": "SessionRecommender",
    "tical": "EmotionRecognition",
    "falcon_eye": "SafetyJudge",
}
ESTIMATED = [method.smallest for name, method in METHODS.items() if name not in NOT_ESTIMATED]


class Tiny(nn.Module):
    """3 → 4 → 2 numbers, and one that is not trained."""

    def __init__(self, copies=0):
        super().__init__()
        self.copies = copies
        self.network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        self.register_buffer("scale", torch.ones(1))

    def training_parts(self, shape):
        optimizer = torch.optim.Adam(self.network.parameters())
        return TrainingStep(self.network, shape, optimizer, self.copies)


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_a_tiny_network_takes_what_arithmetic_says(copies):
    found, _ = estimate_step(Tiny(copies), (5, 3))
    numbers = 3 * 4 + 4 + 4 * 2 + 2
    trained = max(1, copies)
    assert found == Estimate(
        weights=FLOAT * (numbers + 1 + copies * numbers),
        gradients=FLOAT * numbers * trained,
        optimizer_state=FLOAT * (2 * numbers + 4),  # two moments a number, one step count a tensor
        batch=FLOAT * 5 * 3,
        activations=FLOAT * 5 * 4,  # what ReLU gives, kept once by it and by the second layer
    )


def test_under_bf16_activations_are_kept_in_two_bytes_and_weights_are_cast():
    found, _ = estimate_step(Tiny(), (5, 3), "bf16-mixed")
    half, cast = 2, 4 * 2  # the second layer's weights, for the gradient of its input
    assert found.activations == half * (5 * 3 + 5 * 4 + cast)
    assert found.weights == FLOAT * (3 * 4 + 4 + 4 * 2 + 2 + 1)


@pytest.mark.parametrize("name", ESTIMATED)
def test_activations_of_a_method_are_those_that_real_tensors_keep(name, tmp_path):
    made = build(name, {"trainer.default_root_dir": str(tmp_path)})
    made.model.train()
    found, step = estimate_step(made.model, made.data.step_shape)
    real = made.model.training_parts(made.data.step_shape)
    assert found.activations == saved_bytes(real.network, torch.rand(step.shape)) > 0
    assert found.total > found.activations


def test_data_know_the_shape_of_a_training_batch_before_they_are_loaded(tmp_path):
    for name in (METHODS["classifier"].smallest, "classifier/fashion_mnist_small", "dsqn/catch_small"):
        data = build(name, {"trainer.default_root_dir": str(tmp_path)}).data
        early = data.step_shape
        data.ensure_available()
        data.setup("fit")
        assert early == (data.batch_size, *data.meta.shape)


def test_the_command_prints_the_estimate_for_devices_that_are_not_there_and_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", "classifier/cifar10", "--config", "trainer/gpus", "--estimate"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "ImageClassifier, " in shown
    assert "x 3 x 32 x 32, 32-true" in shown
    sizes = [float(line.split()[-2].replace(",", "")) for line in shown.splitlines() if line.endswith("MiB")]
    assert len(sizes) == 6
    assert sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=0.05)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("method", "module"), NOT_ESTIMATED.items())
def test_a_method_that_cannot_say_so_is_one_line(method, module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", METHODS[method].smallest, "--estimate"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert module in line
    assert "--estimate" in line


def test_a_network_whose_shapes_depend_on_values_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_modules.nn.ConvNet.forward", lambda self, x: self.head(x[x > 0.5]))
    assert main(["fit", "--config", "classifier/fashion_mnist_small", "--estimate"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "cannot be followed by shapes alone" in line


def test_a_module_is_asked_by_its_protocol():
    assert isinstance(Tiny(), HasStep)
    assert not isinstance(nn.Linear(1, 1), HasStep)
