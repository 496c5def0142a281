"""Masks, salience and filling of patches against loops and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datamodules import ImageDataModule
from leanlight.contracts import UserError
from lit_modules.adq.patches import (
    PatchDrop,
    kept_patches,
    mae_filling,
    mean_filling,
    paste,
    patch_values,
    salience,
    to_image,
    to_patches,
    train_mae,
)
from lit_modules.nn import ConvNet
from lit_modules.nn.features import FeatureClassifier


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("drop", [0, 0.1, 0.2, 0.25, 0.5, 0.75])
def test_so_many_patches_are_kept_as_the_paper_counts_and_the_best_ones(drop):
    value = torch.rand(5, 196, generator=generator())
    kept = kept_patches(value, drop)
    assert kept.sum(1).tolist() == [math.floor(196 * (100 - round(drop * 100)) / 100)] * 5
    assert all(value[i][kept[i]].min() >= value[i][~kept[i]].max() for i in range(5) if drop)
    assert kept_patches(torch.zeros(1, 4), 0.5).tolist() == [[True, True, False, False]]


def test_a_share_that_keeps_no_patch_is_refused():
    with pytest.raises(UserError, match=r"drop_ratio: 0.9 of 4 patches keeps none"):
        kept_patches(torch.rand(1, 4), 0.9)
    for share in (-0.1, 1.0):
        with pytest.raises(UserError, match="drop_ratio: expected a share in"):
            PatchDrop(share)


@pytest.mark.parametrize("reconstructor", ["none", "mean_fill", "tiny_mae"])
@pytest.mark.parametrize("patch_select", ["gradcam", "random"])
def test_pictures_lose_so_many_patches_and_keep_the_others_bit_by_bit(reconstructor, patch_select):
    image = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8, generator=generator())
    network = ConvNet(1, 3, 4, 1, "none", 8).eval()
    rule = PatchDrop(0.2, 2, patch_select, reconstructor, steps=2)
    result = rule.rebuild(image, network, image, seed=0)
    assert result.dtype == torch.uint8
    changed = (to_patches(result.float(), 2) != to_patches(image.float(), 2)).any(2).sum(1)
    assert changed.tolist() == [0 if reconstructor == "none" else 4] * 5  # 16 patches less floor(12.8)
    assert torch.equal(result, rule.rebuild(image, network, image, seed=0))


def test_patches_are_read_row_by_row_and_put_together_again():
    image = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    patches = to_patches(image, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4], image[1, :, 2:4, 2:4].flatten())
    assert torch.equal(to_image(patches, (4, 6), 2), image)


def test_visible_pixels_stay_bit_by_bit_and_others_are_clamped_to_8_bits():
    image = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=generator())
    kept = kept_patches(torch.rand(4, 16, generator=generator()), 0.3)
    filling = torch.randn(4, 3, 8, 8, generator=generator()) * 2
    result = paste(image, filling, kept, 2)
    assert result.dtype == torch.uint8
    for i in range(4):
        for row in range(8):
            for column in range(8):
                pixel = result[i, :, row, column]
                if kept[i, row // 2 * 4 + column // 2]:
                    assert torch.equal(pixel, image[i, :, row, column])
                else:
                    expected = [min(max(round(float(v) * 255), 0), 255) for v in filling[i, :, row, column]]
                    assert pixel.tolist() == expected


def test_the_mean_filling_is_the_mean_of_visible_pixels():
    image = torch.rand(2, 3, 4, 4, generator=generator())
    kept = torch.tensor([[True, False, True, False], [False, True, False, False]])
    filling = mean_filling(image, kept, 2)
    assert torch.allclose(filling[0, :, 0, 0], image[0, :, :, :2].flatten(1).mean(1))
    assert torch.allclose(filling[1, :, 3, 3], image[1, :, :2, 2:].flatten(1).mean(1))


class Tanh(FeatureClassifier):
    """Feature maps with slopes that differ from place to place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.normalize, self.features = nn.Identity(), nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, stride=2), nn.ReLU())
        self.pool, self.head = nn.Sequential(nn.Tanh(), nn.Flatten()), nn.Linear(3 * 16, 4)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.5)


def test_salience_is_grad_cam_plus_plus_summed_place_by_place():
    network, image = Tanh().double(), torch.rand(3, 1, 8, 8, generator=generator()).double()
    found = salience(network, image)
    for i in range(3):
        maps = network.forward_features(image[i : i + 1]).detach().requires_grad_()
        logits = network.forward_head(maps)[0]
        (slope,) = torch.autograd.grad(logits[int(logits.argmax())], maps)
        expected = torch.zeros(4, 4).double()
        for k in range(3):
            a, g = maps[0, k].detach(), slope[0, k]
            weight = sum(
                float(g[u, v] ** 2 / (2 * g[u, v] ** 2 + (a * g[u, v] ** 3).sum())) * max(float(g[u, v]), 0.0)
                for u in range(4)
                for v in range(4)
            )
            expected += weight * a
        expected = expected.clamp_min(0)
        expected = (expected - expected.min()) / (expected.max() - expected.min())
        assert torch.allclose(found[i], expected, rtol=1e-6)


class Brightness(FeatureClassifier):
    """The brighter an image, the more of class 1; its maps are the pixels."""

    def __init__(self):
        super().__init__()
        self.normalize, self.features = nn.Identity(), nn.Identity()
        self.pool, self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(1, 2)
        self.head.weight.data = torch.tensor([[0.0], [1.0]])
        self.head.bias.data.zero_()


def test_patches_are_worth_most_where_the_predicted_class_is_seen():
    image = torch.full((1, 1, 16, 16), 0.1)
    image[..., 4:8, 8:12] = 1.0
    value = patch_values(image, 4, Brightness(), generator())
    assert value.argmax().item() == 1 * 4 + 2
    assert torch.equal(patch_values(image, 4, Brightness(), generator(1)), value)


def test_an_image_without_salience_keeps_numbers():
    value = patch_values(torch.zeros(2, 1, 8, 8), 2, ConvNet(1, 3, 4, 1, "none", 8).eval(), generator())
    assert value.isfinite().all()


def test_random_patches_are_a_function_of_the_generator():
    image = torch.zeros(3, 1, 8, 8)
    assert torch.equal(patch_values(image, 2, None, generator(1)), patch_values(image, 2, None, generator(1)))
    assert not torch.equal(patch_values(image, 2, None, generator(1)), patch_values(image, 2, None, generator(2)))


def test_what_has_no_patches_or_maps_is_refused():
    with pytest.raises(UserError, match="patch: expected a side that divides 8 x 8 pixels, got 3"):
        patch_values(torch.zeros(1, 1, 8, 8), 3, None, generator())
    with pytest.raises(
        UserError, match=r"network: Grad-CAM.. needs feature maps of forward_features, a Linear has none"
    ):
        patch_values(torch.zeros(1, 1, 8, 8), 2, nn.Linear(8, 8), generator())


def noise_ratio(image, result, kept, patch):
    """PSNR over the dropped patches, dB."""
    hidden = ~kept.view(-1, 1, image.shape[2] // patch, image.shape[3] // patch)
    hidden = F.interpolate(hidden.float(), image.shape[2:]).bool().expand_as(image)
    return float(-10 * torch.log10(((image.float() - result.float()) / 255)[hidden].square().mean()))


@pytest.mark.slow
def test_an_autoencoder_fills_digits_better_than_their_mean_and_leaves_random_states_alone():
    data = ImageDataModule(dataset="digits")
    data.setup()
    state = torch.get_rng_state()
    network = train_mae(data.train_split.images, 2, 0.2, seed=0, steps=200)
    assert torch.equal(state, torch.get_rng_state())
    image = data.test_split.images
    kept = kept_patches(patch_values(image, 2, None, generator()), 0.2)
    scaled = image.float() / 255
    mean = noise_ratio(image, paste(image, mean_filling(scaled, kept, 2), kept, 2), kept, 2)
    learned = noise_ratio(image, paste(image, mae_filling(network, scaled, kept, 2), kept, 2), kept, 2)
    assert mean > noise_ratio(image, paste(image, torch.zeros_like(scaled), kept, 2), kept, 2) + 1
    assert learned > mean + 2
