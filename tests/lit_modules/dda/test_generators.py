"""The generator of inversion against its layers written out, and how it begins anew."""

import pytest
import torch
import torch.nn.functional as F

from leanlight.contracts import UserError
from lit_modules.dda.generators import DoublingConv2d, Generator


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("shape", "base"), [((3, 16, 16), 2), ((1, 28, 28), 2), ((4, 8, 12), 4)])
def test_it_makes_what_its_layers_written_out_make(shape, base):
    generator = Generator.fresh(shape, seeded(0), latent_size=6, width=4, base=base)
    weights = dict(generator.named_parameters())
    latent = torch.randn(5, 6, generator=seeded(1))

    def norm(x, name):
        return F.batch_norm(x, None, None, weights[f"{name}.weight"], weights[f"{name}.bias"], training=True)

    x = F.linear(latent, weights["project.weight"], weights["project.bias"])
    x = norm(x.reshape(5, base * 4, shape[1] // 4, shape[2] // 4), "maps.0")
    for conv, after in (("maps.1", "maps.2"), ("maps.4", "maps.5")):
        x = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), weights[f"{conv}.weight"], padding=1)
        x = norm(x, after)
        x = torch.where(x > 0, x, 0.2 * x)
    x = F.conv2d(x, weights["maps.7.weight"], weights["maps.7.bias"], padding=1)
    got = generator(latent)
    assert got.shape == (5, *shape)
    torch.testing.assert_close(got, 1 / (1 + (-x).exp()))
    assert weights["maps.1.weight"].shape == (8, base * 4, 3, 3)  # the wide one narrows at the first convolution
    assert weights["maps.4.weight"].shape == (4, 8, 3, 3)


def test_channels_last_changes_no_value_beyond_rounding():
    latent = torch.randn(7, 5, generator=seeded(1))
    plain, last = (
        Generator.fresh((3, 8, 8), seeded(0), latent_size=5, width=4, channels_last=channels_last)
        for channels_last in (False, True)
    )
    assert last.maps[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert last(latent).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(latent), plain(latent))


def test_beginning_anew_leaves_nothing_of_before():
    generator = Generator.fresh((1, 8, 8), seeded(0), latent_size=5, width=4)
    state = {name: value.clone() for name, value in generator.state_dict().items()}
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.1)
    for _ in range(3):
        generator(torch.randn(6, 5)).square().sum().backward()
        optimizer.step()
    assert not any(torch.equal(value, state[name]) for name, value in generator.state_dict().items())
    generator.reset(seeded(0))
    assert all(torch.equal(value, state[name]) for name, value in generator.state_dict().items())
    generator.reset(seeded(1))
    assert not torch.equal(generator.project.weight, state["project.weight"])


def test_first_weights_have_the_spread_of_the_published_ones():
    generator = Generator.fresh((3, 32, 32), seeded(0), latent_size=64, width=32)
    weight, scale = generator.project.weight, torch.cat([generator.maps[i].weight for i in (0, 2, 5)])
    assert abs(weight.mean()) < 1e-3
    assert abs(weight.std() - 0.02) < 5e-4
    assert abs(scale.mean() - 1) < 0.01
    assert 0.015 < scale.std() < 0.025
    assert not any(value.any() for name, value in generator.named_parameters() if name.endswith("bias"))


def test_making_one_draws_nothing_from_the_process():
    before = torch.get_rng_state()
    Generator.fresh((1, 8, 8), seeded(0), latent_size=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_sides_that_cannot_be_doubled_twice_are_one_line():
    with pytest.raises(UserError, match=r"^image_size: expected sides divisible by 4 .* got 8x10; .*PixelInversion"):
        Generator((1, 8, 10))
    with pytest.raises(UserError, match="width: expected an integer of at least 1"):
        Generator((1, 8, 8), width=0)


def test_doubling_inside_the_convolution_has_values_and_gradients_of_doubling_before_it():
    layer = DoublingConv2d(3, 2).double()
    x = torch.randn(2, 3, 4, 5, generator=seeded(0), dtype=torch.double, requires_grad=True)
    apart = F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, padding=1)
    assert apart.shape == (2, 2, 8, 10)
    pull = torch.randn(apart.shape, generator=seeded(1), dtype=torch.double)
    for got, expected in zip(
        (layer(x), *torch.autograd.grad((layer(x) * pull).sum(), (x, layer.weight))),
        (apart, *torch.autograd.grad((apart * pull).sum(), (x, layer.weight))),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
