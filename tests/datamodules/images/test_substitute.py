"""Other training sets in the place of the real one, real evaluation sets beside them."""

import pytest
import torch
from safetensors.torch import save_file

from datamodules import DistilledDataModule, ImageDataModule
from datamodules.images.module import scaled
from leanlight.contracts import ImageBatch, UserError, sha256_file
from leanlight.ops.corruptions import Corruption


def real(**arguments) -> ImageDataModule:
    data = ImageDataModule("digits", download=False, **arguments)
    data.setup()
    return data


@pytest.fixture
def distilled(tmp_path):
    tensors = {
        "images": torch.randn(20, 1, 8, 8),
        "labels": torch.eye(10).repeat(2, 1),
        "mean": torch.full((1, 1, 1), 0.3),
        "std": torch.full((1, 1, 1), 0.4),
    }
    save_file(tensors, tmp_path / "distilled.safetensors")
    data = DistilledDataModule(tmp_path, dataset="digits", download=False, batch_size=6, seed=1)
    data.setup()
    return data, tensors


def test_a_distilled_set_trains_as_it_is_and_real_images_come_into_its_space(distilled):
    data, tensors = distilled
    assert data.meta.counts["train"] == 20
    assert data.meta.class_counts == (2,) * 10
    assert data.meta.fingerprint == f"{real().meta.fingerprint}+{sha256_file(data.file)}"
    for batch in data.train_dataloader():
        assert torch.equal(data.on_after_batch_transfer(batch, 0).image, tensors["images"][batch.index])
        assert torch.equal(batch.label, tensors["labels"][batch.index])
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(data.on_after_batch_transfer(batch, 0).image, (scaled(batch).image - 0.3) / 0.4)


def test_the_order_of_a_distilled_set_is_that_of_any_set_of_its_size(distilled):
    data, _ = distilled
    order = torch.cat([batch.index for batch in data.train_dataloader()]).tolist()
    small = ImageDataModule("digits", download=False, batch_size=6, seed=1)
    small.setup()
    small.train_split = data.train_split
    assert order == torch.cat([batch.index for batch in small.train_dataloader()]).tolist()


def test_a_distilled_set_can_be_predicted_without_leaving_its_space(distilled):
    data, tensors = distilled
    data.predict_split = "train"
    images = torch.cat([data.on_after_batch_transfer(batch, 0).image for batch in data.predict_dataloader()])
    assert torch.equal(images, tensors["images"])
    assert isinstance(next(iter(data.predict_dataloader())), ImageBatch)


def test_a_distilled_set_without_its_space_is_refused(tmp_path):
    save_file({"images": torch.zeros(2, 1, 8, 8), "labels": torch.eye(10)[:2]}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="distilled: expected images, labels, and whitening or mean and std"):
        DistilledDataModule(tmp_path / "a.safetensors", dataset="digits").setup()


def test_a_distilled_set_takes_no_noise(distilled):
    with pytest.raises(UserError, match=r"train_corruption: expected none, since distilled images"):
        DistilledDataModule(distilled[0].file, dataset="digits", train_corruption=Corruption("shot", severity=1))
