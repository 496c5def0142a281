"""The classifier's benchmark compares like with like."""

import statistics

import pytest
import torch
from scipy.stats import trim_mean
from torchvision.transforms import ToTensor

from datamodules import ImageDataModule
from leanlight.benchmarks import classifier as benchmark
from leanlight.benchmarks.core import Measurement
from lit_modules.classifier import ImageClassifier
from lit_modules.nn import ConvNet, SpikingConvNet

TINY = {"in_channels": 1, "num_classes": 10, "image_size": 28, "width": 4, "depth": 2}


@pytest.fixture(scope="module")
def data():
    module = ImageDataModule(variant="subset", batch_size=64, train_fraction=0.2, seed=0)
    module.setup()
    return module


def test_the_reference_pipeline_reads_the_same_pixels_and_labels(data, tmp_path):
    reference = benchmark.torchvision_dataset(data, tmp_path, 100, ToTensor())
    assert len(reference) == 100
    assert benchmark.same_items(data, reference, 100)


def test_a_single_different_pixel_is_noticed(data, tmp_path):
    reference = benchmark.torchvision_dataset(data, tmp_path, 100, ToTensor())
    reference.data[99, 0, 0] ^= 1
    assert benchmark.same_items(data, reference, 99)
    assert not benchmark.same_items(data, reference, 100)


def test_shares_stand_outliers_and_count_checkpoints():
    cycle = [0.02] * 98 + [0.5, 0.001]
    report = {"cycle": cycle, "checkpoints": [0.2], "hooks": {"NaNGuard": [1e-4] * 100, "Watcher": [1.0] * 100}}
    assert benchmark.share_of([0.001] * 100, report, every=200) == pytest.approx(0.002 / 0.021)
    assert benchmark.guards_share(report, every=200) == pytest.approx(0.0011 / 0.02)
    values = torch.rand(100, generator=torch.Generator().manual_seed(0)).tolist()
    assert benchmark.trimmed_mean(values) == pytest.approx(trim_mean(values, 0.02))
    assert benchmark.trimmed_mean(values, 0.0) == pytest.approx(statistics.fmean(values))


@pytest.mark.parametrize(("network", "more"), [(ConvNet, {}), (SpikingConvNet, {"time_steps": 2})])
def test_switches_compute_the_same_step(network, more, data):
    measured = Measurement()
    steps = benchmark.switched_steps(
        network, {**TINY, **more}, benchmark._batch(data, 16), "tiny", measured, quick=True
    )
    assert list(steps) == ["plain", "channels_last", "bf16"]
    plain, last = (steps[name].func for name in ("plain", "channels_last"))
    for step in steps.values():
        step()
    pairs = zip(plain.network.parameters(), last.network.parameters(), strict=True)
    # Adam's first step moves every weight by the learning rate in the direction of its gradient.
    moved = torch.cat([(ours - other).abs().flatten() for ours, other in pairs])
    assert (moved < 1e-5).float().mean() > 0.99
    assert last.network.state_dict().keys() == plain.network.state_dict().keys()


def test_the_module_under_test_is_the_suites_own(data):
    module = benchmark._module(ConvNet, TINY)
    assert isinstance(module, ImageClassifier)
    before = benchmark._module(ConvNet, TINY).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
