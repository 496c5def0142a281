"""Batch augmentation against one image at a time."""

import torch
import torch.nn.functional as F

from leanlight.ops.augment import AUGMENTATIONS, random_crop, random_flip


def test_a_crop_is_a_window_of_the_padded_image():
    images = torch.rand(50, 3, 7, 9)
    cropped = random_crop(images, torch.Generator().manual_seed(0), padding=2)
    top, left = torch.randint(0, 5, (2, 50), generator=torch.Generator().manual_seed(0))
    for image, crop, row, column in zip(images, cropped, top, left, strict=True):
        assert torch.equal(crop, F.pad(image, (2, 2, 2, 2))[:, row : row + 7, column : column + 9])


def test_a_flip_mirrors_about_half_of_the_images_and_leaves_the_others():
    images = torch.rand(2000, 1, 2, 3)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    untouched = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ untouched).all()
    assert 900 < mirrored.sum() < 1100


def test_every_augmentation_keeps_shape_type_and_range_and_follows_its_generator():
    images = torch.rand(8, 3, 32, 32)
    for augment in AUGMENTATIONS.values():
        first, again = (augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
        assert first.shape == images.shape
        assert first.dtype == images.dtype
        assert 0 <= first.min() <= first.max() <= 1
        assert torch.equal(first, again)
