"""Sampling against diffusers' own pipeline and against a loop by hand in float64."""

import pytest
import torch

from leanlight.contracts import MissingExtraError, UserError
from lit_modules.dda import sampling

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return (
        diffusers.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            add_attention=False,
        )
        .eval()
        .requires_grad_(False)
    )


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_samples_are_those_of_diffusers_own_pipeline(unet, spacing):
    seeds = [3, 4, 2**55]
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    noise = sampling.start_noise(sampling.generators(seeds), (1, 8, 8), "cpu")
    drawn = sampling.sample(lambda x, t: unet(x, t).sample, scheduler, noise, 5)
    pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(timestep_spacing=spacing))
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = pipeline(3, generator=generators, num_inference_steps=5, output_type="pt").images
    assert torch.equal((drawn / 2 + 0.5).clamp(0, 1), expected)


@pytest.mark.parametrize(("strength", "made"), [(0.05, 1), (0.3, 3), (0.5, 5), (1.0, 10)])
def test_sdedit_noises_up_to_its_time_and_goes_down_by_ddim(strength, made):
    """The answer is a smooth function of image and time; the loop by hand follows the paper's equations."""
    image, noise = torch.rand(2, 1, 4, 4).double() * 2 - 1, torch.randn(2, 1, 4, 4).double()

    def denoise(x, t):
        return torch.tanh(0.3 * x + t / 1000)

    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - beta, 0)
    times = [100 * i for i in range(10)][:made][::-1]
    t = times[0]
    x = alpha_bar[t].sqrt() * image + (1 - alpha_bar[t]).sqrt() * noise
    for number, t in enumerate(times):
        eps = denoise(x, t)
        clean = ((x - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()).clamp(-1, 1)
        before = alpha_bar[times[number + 1]] if number + 1 < made else torch.tensor(1.0).double()
        x = before.sqrt() * clean + (1 - before).sqrt() * eps
    asked = []

    def recorded(x, t):
        asked.append(t)
        return denoise(x, t)

    got = sampling.sdedit(recorded, diffusers.DDIMScheduler(), image, noise, strength, 10)
    assert asked == times
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)  # diffusers keeps its schedule in float32


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan")])
def test_a_strength_outside_of_0_to_1_is_one_line(strength):
    with pytest.raises(UserError, match="strength: expected a number above 0 and at most 1, got"):
        sampling.check_strength(strength)


def test_guidance_goes_from_the_answer_without_embedding_to_that_with_it():
    def network(x, t, embedding):
        return x * t + embedding[:, :1, None, None]

    x, embedding = torch.randn(3, 1, 2, 2), torch.randn(3, 4)
    without, given = network(x, 7, torch.zeros(3, 4)), network(x, 7, embedding)
    for guidance in (0.0, 0.5, 1.0, 3.0):
        got = sampling.guided(network, embedding, guidance)(x, 7)
        torch.testing.assert_close(got, without + guidance * (given - without))


def test_noise_of_an_image_depends_on_its_seed_alone():
    together = sampling.start_noise(sampling.generators([5, 6, 7]), (1, 4, 4), "cpu")
    assert torch.equal(together[1:2], sampling.start_noise(sampling.generators([6]), (1, 4, 4), "cpu"))
    assert not torch.equal(together[0], together[1])


def test_chunks_are_all_of_one_size_and_give_back_as_many_as_came():
    sizes = []

    def double(x, y):
        sizes.append(len(x))
        return 2 * x + y

    x, y = torch.arange(7), torch.arange(7) * 10
    assert torch.equal(sampling.in_chunks(double, 3, x, y), 2 * x + y)
    assert sizes == [3, 3, 3]


def test_without_diffusers_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r"diffusers.*leanlight\[diffusion\]"):
        sampling.require_diffusers()
