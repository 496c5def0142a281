"""Sampling in a fixed order against PyTorch's kernel."""

import pytest
import torch
import torch.nn.functional as F

from leanlight.ops import differentiable
from leanlight.ops.differentiable import DIFFERENTIABLE, sample


def torch_sample(image, grid):
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def positions(count, height, width, generator):
    grid = 3 * torch.rand(count, height, width, 2, generator=generator) - 1.5  # a third of it outside
    grid[0, 0, 0] = torch.tensor([1.0, -1.0])  # on the edge itself
    return grid


def test_sampling_has_the_values_and_the_gradient_of_torch():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(5, 3, 7, 9, generator=generator, dtype=torch.double, requires_grad=True)
    grid = positions(5, 4, 6, generator).double()
    seen = []
    for sampled in (sample(image, grid), torch_sample(image, grid)):
        (gradient,) = torch.autograd.grad(sampled.tanh().square().sum(), image)
        seen.append((sampled, gradient))
    assert seen[0][1].abs().max() > 0.1
    for ours, theirs in zip(*seen, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_sampling_can_be_differentiated_twice_which_torch_cannot():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 1, 3, 4, generator=generator, dtype=torch.double, requires_grad=True)
    grid = positions(2, 2, 3, generator).double()
    assert torch.autograd.gradgradcheck(lambda x: sample(x, grid).tanh(), image)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.gradgradcheck(lambda x: torch_sample(x, grid).tanh(), image)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_deterministic_rotations_on_an_accelerator_do_without_the_atomic_kernel(name, deterministic, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("grid_sampler_2d_backward_cuda does not have a deterministic implementation")

    augment = DIFFERENTIABLE[name]
    images = torch.rand(4, 3, 8, 8)
    expected = [augment(images, torch.Generator().manual_seed(seed)) for seed in range(12)]
    monkeypatch.setattr(F, "grid_sample", refuse)
    for seed in range(12):
        on_device = augment(images.to("meta"), torch.Generator().manual_seed(seed))
        assert on_device.shape == images.shape
    monkeypatch.setattr(F, "grid_sample", sample_as_torch)
    for seed, image in enumerate(expected):
        assert torch.allclose(augment(images, torch.Generator().manual_seed(seed)), image, atol=3e-6)


def sample_as_torch(image, grid, **options):
    return sample(image, grid)


def test_on_a_cpu_torch_samples_also_when_deterministic(deterministic, monkeypatch):
    monkeypatch.setattr(differentiable, "sample", None)
    assert DIFFERENTIABLE["rotate"](torch.rand(2, 1, 8, 8)).shape == (2, 1, 8, 8)
