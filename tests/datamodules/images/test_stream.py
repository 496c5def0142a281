"""Pictures through workers: the same order, resume and crops however they are read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageFolderStream
from leanlight.contracts import ImageBatch, MethodData, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 4)):
        for name in ("cat", "dog"):
            (base / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (30 + i, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(base / part / name / f"{i:02}.png")
    return base


def stream(folder: Path, **arguments) -> ImageFolderStream:
    defaults = {"image_size": 16, "batch_size": 4, "num_workers": 0, "val_fraction": 0.25, "seed": 0}
    data = ImageFolderStream(folder, **(defaults | arguments))
    data.setup()
    return data


def equal(left: list[ImageBatch], right: list[ImageBatch]) -> bool:
    names = ("image", "label", "index")
    return len(left) == len(right) and all(
        torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(left, right, strict=True) for name in names
    )


def test_batches_are_uint8_and_meta_counts_files(folder: Path) -> None:
    data = stream(folder)
    assert isinstance(data, MethodData)
    assert data.meta.counts == {"train": 18, "val": 6, "test": 8}
    batches = list(data.train_dataloader())
    assert [b.image.shape for b in batches] == [(4, 3, 16, 16)] * 4
    assert batches[0].image.dtype == torch.uint8
    assert data.on_after_batch_transfer(batches[0], 0).image.max() <= 1


def test_weights_travel_with_their_items_and_every_item_knows_its_picture(folder: Path) -> None:
    data = stream(folder, num_workers=2)
    assert next(iter(data.train_dataloader())).weight is None
    weight = torch.rand(18)
    data.splits["train"] = data.splits["train"]._replace(weight=weight)
    for batch in data.train_dataloader():
        assert torch.equal(batch.weight, weight[batch.index])
    names = sorted(path.relative_to(folder) for path in (folder / "train").glob("*/*"))
    for split in ("train", "val"):
        found = [path.relative_to(folder) for path in data.splits[split].paths]
        assert [names[i] for i in data.origin(split)] == found
    assert torch.equal(data.origin("test"), torch.arange(8))


def test_workers_change_nothing(folder: Path) -> None:
    assert equal(list(stream(folder).train_dataloader()), list(stream(folder, num_workers=2).train_dataloader()))


def test_resume_inside_an_epoch_gives_the_same_crops(folder: Path) -> None:
    whole, interrupted, resumed = (stream(folder).train_dataloader() for _ in range(3))
    iterator = iter(interrupted)
    next(iterator)
    resumed.load_state_dict(interrupted.state_dict())
    assert equal(list(resumed), list(whole)[1:])


def test_crops_differ_between_epochs(folder: Path) -> None:
    loader = stream(folder, batch_size=18).train_dataloader()
    first = next(iter(loader))
    loader.sampler.set_epoch(1)
    second = next(iter(loader))
    assert not torch.equal(first.image[first.index.argsort()], second.image[second.index.argsort()])


def test_evaluation_has_every_file_once(folder: Path) -> None:
    data = stream(folder, eval_batch_size=3)
    assert torch.cat([b.index for b in data.test_dataloader()]).tolist() == list(range(8))
    assert torch.cat([b.label for b in data.test_dataloader()]).tolist() == [0] * 4 + [1] * 4
    assert torch.cat([b.index for b in data.val_dataloader()]).tolist() == list(range(6))


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        stream(tmp_path)


@pytest.mark.parametrize(
    "arguments", [{"batch_size": 0}, {"num_workers": -1}, {"val_fraction": 0.0}, {"min_scale": 2.0}]
)
def test_wrong_input_is_refused(folder: Path, arguments: dict) -> None:
    with pytest.raises(UserError):
        stream(folder, **arguments)


@pytest.mark.parametrize(("split", "items"), [("train", 18), ("val", 6), ("test", 8)])
def test_any_part_is_predicted_in_order_and_items_can_be_left_out(folder: Path, split: str, items: int) -> None:
    data = stream(folder, predict_split=split, eval_batch_size=4)
    assert torch.cat([batch.index for batch in data.predict_dataloader()]).tolist() == list(range(items))
    data.skip_predicted(torch.arange(4))
    assert torch.cat([batch.index for batch in data.predict_dataloader()]).tolist() == list(range(4, items))
