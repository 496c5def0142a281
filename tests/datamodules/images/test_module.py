"""ImageDataModule: splits, order, resume and what several processes see."""

import gzip
import hashlib
from itertools import chain
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import FederatedDataModule, ImageDataModule
from datamodules.images import sources
from datamodules.images.module import resize
from datamodules.images.splits import stratified_split
from datamodules.loaders import EvalLoader, TrainLoader, TrainOrder
from leanlight import build
from leanlight.contracts import ImageBatch, MethodData, UserError
from leanlight.ops.corruptions import Corruption


def module(**arguments) -> ImageDataModule:
    data = ImageDataModule(**({"dataset": "digits", "download": False} | arguments))
    data.setup()
    return data


def train_loader(size: int, batch_size: int, rank: int = 0, world: int = 1, seed: int = 0, drop_last: bool = False):
    order = TrainOrder(size, batch_size, seed, True, drop_last, rank, world)
    return TrainLoader(order, lambda blocks: (ImageBatch(b.float(), b, b) for b in blocks))


def eval_loader(size: int, batch_size: int, rank: int = 0, world: int = 1) -> EvalLoader:
    return EvalLoader(size, batch_size, lambda blocks: (ImageBatch(b.float(), b, b) for b in blocks), rank, world)


def positions(loader) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader]


def joined(lists) -> list[int]:
    return list(chain.from_iterable(lists))


# Splits


@pytest.mark.parametrize("dataset", ["digits", "fashion_mnist"])
def test_validation_and_training_share_no_item_and_together_are_all(dataset: str) -> None:
    data = module(dataset=dataset, variant="subset" if dataset == "fashion_mnist" else "auto", val_fraction=0.2)
    assert data.val_split is not None
    train, val = set(data.train_split.origin.tolist()), set(data.val_split.origin.tolist())
    assert not train & val
    assert train | val == set(range(len(sources.load(dataset, "none", data.variant).train[0])))


@pytest.mark.parametrize("world", [1, 2])
def test_an_epoch_of_a_number_of_batches_goes_through_all_items_as_often_as_it_takes(world: int) -> None:
    orders = [TrainOrder(10, 4, 0, rank=rank, world=world, batches=6) for rank in range(world)]
    blocks = [list(order.blocks(0)) for order in orders]
    assert {len(own) for own in blocks} == {6}
    seen = torch.cat([block for own in zip(*blocks, strict=True) for block in own])
    assert len(seen) == 24 * world
    for start in range(0, len(seen) - 10, 10):  # pass after pass, each with every item
        assert sorted(seen[start : start + 10].tolist()) == list(range(10))
    assert not torch.equal(seen[:10], seen[10:20])
    resumed = TrainOrder(10, 4, 0, world=world, batches=6)
    orders[0].position = 2
    resumed.load_state_dict(orders[0].state_dict())
    assert resumed.position == 2


@pytest.mark.parametrize(("val_fraction", "train_fraction"), [(0.1, 1.0), (0.25, 0.5), (0.0, 0.1)])
def test_every_class_keeps_its_share(val_fraction: float, train_fraction: float) -> None:
    data = module(val_fraction=val_fraction, train_fraction=train_fraction)
    official = np.bincount(sources.load("digits", "none").train[1])
    val = np.bincount(data.val_split.labels, minlength=10) if data.val_split is not None else np.zeros(10)
    assert np.abs(val - official * val_fraction).max() < 1
    assert val.sum() == round(official.sum() * val_fraction)
    assert np.abs(np.array(data.meta.class_counts) - (official - val) * train_fraction).max() < 1


def test_items_keep_their_image_and_label() -> None:
    data, raw = module(val_fraction=0.3, train_fraction=0.5), sources.load("digits", "none")
    for split in (data.train_split, data.val_split):
        assert split is not None
        assert np.array_equal(split.images, raw.train[0][split.origin])
        assert np.array_equal(split.labels, raw.train[1][split.origin])
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch.image, data.train_split.images[batch.index])
    assert torch.equal(batch.label, data.train_split.labels[batch.index])


def test_every_class_keeps_a_training_item() -> None:
    labels = np.repeat([0, 1, 2], [1, 2, 50])
    train, val = stratified_split(labels, 0.9, 0.01, 0)
    assert set(labels[train]) == {0, 1, 2}
    assert not set(train) & set(val)


def test_an_epoch_has_the_number_of_batches_that_was_asked_for() -> None:
    loader = module(train_items=50, batch_size=20, epoch_batches=7).train_dataloader()
    indices = torch.cat([batch.index for batch in loader])
    assert len(loader) == 7
    assert set(indices.bincount().tolist()) == {2, 3}


def test_the_rest_is_what_the_same_training_fraction_leaves_out() -> None:
    parts = [module(val_fraction=0.2, train_fraction=0.4, train_rest=rest) for rest in (False, True)]
    used, rest = (set(part.train_split.origin.tolist()) for part in parts)
    held_out = [set(part.val_split.origin.tolist()) for part in parts if part.val_split]
    assert held_out[0] == held_out[1]
    whole = set(module(val_fraction=0.2).train_split.origin.tolist())
    assert not used & rest
    assert used | rest == whole


def test_larger_training_fraction_contains_the_smaller() -> None:
    small, large = (set(module(train_fraction=f).train_split.origin.tolist()) for f in (0.2, 0.6))
    assert small < large


def test_split_follows_split_seed_and_not_seed() -> None:
    def held_out(**seeds: int) -> list[int]:
        split = module(**seeds).val_split
        assert split is not None
        return split.origin.tolist()

    assert held_out(seed=1) == held_out(seed=2)
    assert held_out(split_seed=1) != held_out(split_seed=2)


def test_fingerprint_changes_with_data_and_split_only() -> None:
    fingerprint = module().meta.fingerprint
    assert fingerprint == module(seed=5, batch_size=7).meta.fingerprint
    others = [module(split_seed=1), module(train_fraction=0.5), module(image_size=9), module(val_fraction=0.0)]
    assert len({fingerprint, *(data.meta.fingerprint for data in others)}) == 5


def test_meta_tells_what_is_there() -> None:
    data = module()
    assert isinstance(data, MethodData)
    assert data.meta.shape == (1, 8, 8)
    assert data.meta.counts == {"train": 1293, "val": 144, "test": 360}
    assert (data.meta.num_classes, sum(data.meta.class_counts)) == (10, 1293)


@pytest.mark.skipif(not sources.DEBIAN_FASHION_MNIST.exists(), reason="package dataset-fashion-mnist is not installed")
def test_full_fashion_mnist_is_used_where_it_is_found() -> None:
    data = module(dataset="fashion_mnist", root="none", val_fraction=0)
    content = gzip.decompress((sources.DEBIAN_FASHION_MNIST / "train-images-idx3-ubyte.gz").read_bytes())
    assert data.train_split.images.numpy().tobytes() == content[16:]
    assert data.val_dataloader() == []


def test_images_are_resized_once() -> None:
    data = module(image_size=16)
    assert data.train_split.images.shape[1:] == data.meta.shape == (1, 16, 16)
    flat = torch.full((2, 1, 8, 8), 77, dtype=torch.uint8)
    assert (resize(flat, 13) == 77).all()


# A number of training items


def test_training_items_are_counted_by_class_in_proportion() -> None:
    official = np.bincount(sources.load("digits", "none").train[1])
    for items in (10, 11, 57, 500, 1293):
        data = module(train_items=items)
        assert data.val_split is not None
        left = official - np.bincount(data.val_split.labels, minlength=10)
        assert len(data.train_split) == sum(data.meta.class_counts) == items
        assert min(data.meta.class_counts) >= 1
        assert np.abs(np.array(data.meta.class_counts) - items * left / left.sum()).max() < 1
    whole = module()
    assert torch.equal(data.train_split.origin, whole.train_split.origin)
    assert data.meta.fingerprint == whole.meta.fingerprint
    assert torch.equal(data.val_split.origin, whole.val_split.origin)


def test_more_training_items_hold_every_item_of_fewer() -> None:
    labels = np.repeat(np.arange(4), [60, 36, 3, 1])
    before: set[int] = set()
    for items in range(4, 91):
        train, val = stratified_split(labels, 0.1, 1.0, 0, items)
        assert len(set(train)) == items
        assert before < set(train)
        assert not set(train) & set(val)
        assert set(labels[train]) == {0, 1, 2, 3}
        before = set(train)


# Some of the classes


def test_chosen_classes_become_labels_in_their_order_in_every_part() -> None:
    data, whole, raw = module(classes=[7, "2", 5]), module(), sources.load("digits", "none")
    assert data.meta.classes == ("7", "2", "5")
    assert data.meta.num_classes == len(data.meta.class_counts) == 3
    parts = (
        (data.train_split, whole.train_split, raw.train),
        (data.val_split, whole.val_split, raw.train),
        (data.test_split, whole.test_split, raw.test),
    )
    for split, all_classes, (images, labels) in parts:
        assert split is not None
        assert all_classes is not None
        assert np.array_equal(split.images, images[split.origin])
        assert [(7, 2, 5)[label] for label in split.labels] == labels[split.origin].tolist()
        # Neither part takes an item that is in another one of the whole set.
        assert split.origin.tolist() == [i for i in all_classes.origin.tolist() if labels[i] in (7, 2, 5)]
    assert data.meta.counts == {"train": len(data.train_split), "val": len(data.val_split), "test": len(parts[2][0])}
    assert len({d.meta.fingerprint for d in (data, whole, module(classes=[2, 7, 5]), module(classes=[2, 7]))}) == 4
    few = module(classes=[7, 2, 5], train_items=30)
    assert few.meta.class_counts == (10, 9, 11)  # of 131, 119 and 137
    assert set(few.train_split.origin.tolist()) < set(data.train_split.origin.tolist())
    named = module(dataset="fashion_mnist", variant="subset", classes=["Bag", 1])
    assert named.meta.classes == ("Bag", "Trouser")


# Noise on training images

NOISE = Corruption("gaussian", level=0.15, seed=2)


def seen(data: ImageDataModule, folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images and positions that a Trainer hands to its steps, by part."""
    batches: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    class Looker(Recorder):
        def training_step(self, batch, batch_idx):
            batches["train"] = batch.image, batch.index
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            batches["val"] = batch.image, batch.index

        def test_step(self, batch, batch_idx):
            batches["test"] = batch.image, batch.index

        def predict_step(self, batch, batch_idx):
            batches[f"predict_{data.predict_split}"] = batch.image, batch.index

    loop, looker = trainer(folder, max_epochs=1), Looker()
    loop.fit(looker, datamodule=data)
    loop.test(looker, datamodule=data, verbose=False)
    loop.predict(looker, datamodule=data)
    return batches


def test_noise_is_on_training_and_validation_images_and_goes_by_the_item_alone(tmp_path: Path) -> None:
    raw = torch.from_numpy(sources.load("digits", "none").train[0]).float() / 255
    wanted = NOISE(raw, torch.arange(len(raw)))
    for number, arguments in enumerate(
        [
            {"predict_split": "train"},
            {"val_fraction": 0.3, "predict_split": "val"},
            {"classes": [3, 1], "batch_size": 90},
        ]
    ):
        data = module(**({"train_corruption": NOISE, "batch_size": 2000, "eval_batch_size": 2000} | arguments))
        got = seen(data, tmp_path / str(number))
        assert data.val_split is not None
        for name, origin in (("train", data.train_split.origin), ("val", data.val_split.origin)):
            for part in {name, f"predict_{name}"} & got.keys():
                image, index = got[part]
                assert torch.equal(image, wanted[origin[index]])
        clean = data.test_split.images.float() / 255
        assert all(torch.equal(got[part][0], clean[got[part][1]]) for part in {"test", "predict_test"} & got.keys())
        assert not data.train_split.images.is_floating_point()  # what the split holds is clean
    assert not torch.equal(wanted, raw)


def test_augmentation_comes_after_noise_and_identity_does_not_hide_it(tmp_path: Path) -> None:
    data = module(train_corruption=NOISE, augment="flip", batch_size=2000)
    image, index = seen(data, tmp_path)["train"]
    noisy = data.as_seen(data.train_split.batch(index), "train").image
    flipped = (image == noisy.flip(-1)).flatten(1).all(1)
    assert ((image == noisy).flatten(1).all(1) | flipped).all()
    assert 0 < flipped.sum() < len(image)


def test_a_validation_part_of_its_own_shares_no_noise_with_training(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = np.full((4, 1, 8, 8), 128, np.uint8), np.arange(4) % 2
    raw = sources.Raw((images, labels), (images, labels), ("a", "b"), "here", (images, labels))
    monkeypatch.setattr(sources, "load", lambda *_: raw)
    data = module(train_corruption=NOISE)
    assert data.val_split is not None
    every = torch.arange(4)
    both = torch.cat([data.as_seen(data.train_split.batch(every), "train").image,
                      data.as_seen(data.val_split.batch(every), "val").image])  # fmt: skip
    assert len(both.unique(dim=0)) == 8
    assert (data.as_seen(data.test_split.batch(every), "test").image == 128 / 255).all()


def test_clients_of_a_federation_hold_noisy_images_of_the_chosen_classes() -> None:
    data = FederatedDataModule(
        3, dataset="digits", download=False, train_corruption=NOISE, classes=[4, 9], train_items=90
    )
    data.setup()
    raw = torch.from_numpy(sources.load("digits", "none").train[0]).float() / 255
    wanted = NOISE(raw, torch.arange(len(raw)))
    assert data.class_matrix.shape == (3, 2)
    assert sum(data.client_sizes) == 90
    for client in range(3):
        held = data.client_data(client)
        assert torch.equal(held.image, wanted[data.train_split.origin[held.index]])


def test_noise_classes_and_items_are_said_in_a_config(tmp_path: Path) -> None:
    few = {"train_items": 60, "classes": [3, 5], "train_corruption": {"name": "gaussian", "level": 0.15}}
    overrides = {f"data.init_args.{name}": value for name, value in few.items()}
    overrides |= {"model.init_args.network.init_args.num_classes": 2, "trainer.default_root_dir": str(tmp_path)}
    data = build("classifier/digits_small", overrides).data
    assert (data.train_items, list(data.classes), data.train_corruption) == (
        60,
        [3, 5],
        Corruption("gaussian", level=0.15),
    )
    with pytest.raises(UserError, match=r"train_corruption.*did you mean 'gaussian'") as caught:
        build("classifier/digits_small", {"data.init_args.train_corruption": {"name": "gausian", "severity": 1}})
    assert "\n" not in str(caught.value)


# Order


def test_an_epoch_has_every_item_once_in_another_order_each_epoch() -> None:
    loader = train_loader(103, 10)
    first = positions(loader)
    assert [len(b) for b in first] == [10] * 10 + [3]
    assert sorted(joined(first)) == list(range(103))
    loader.sampler.set_epoch(1)
    second = positions(loader)
    assert second != first
    loader.sampler.set_epoch(0)
    assert positions(loader) == first == positions(train_loader(103, 10))
    assert positions(train_loader(103, 10, seed=1)) != first


def test_order_does_not_touch_the_global_random_state() -> None:
    before = torch.get_rng_state()
    positions(train_loader(50, 7))
    assert torch.equal(before, torch.get_rng_state())


def test_order_follows_the_seed_of_seed_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert positions(module().train_dataloader()) == positions(module(seed=7).train_dataloader())
    assert positions(module().train_dataloader()) != positions(module(seed=8).train_dataloader())


@pytest.mark.parametrize("stop", [0, 1, 4, 10, 11])
def test_resume_inside_an_epoch_equals_an_undisturbed_epoch(stop: int) -> None:
    undisturbed = train_loader(103, 10)
    undisturbed.sampler.set_epoch(3)
    expected = positions(undisturbed)
    interrupted = train_loader(103, 10)
    interrupted.sampler.set_epoch(3)
    iterator = iter(interrupted)
    seen = [next(iterator).index.tolist() for _ in range(stop)]
    resumed = train_loader(103, 10)
    iterator = iter(resumed)  # Lightning makes the iterator first, then chooses the epoch
    resumed.load_state_dict(interrupted.state_dict())
    resumed.sampler.set_epoch(3)
    rest = [batch.index.tolist() for batch in iterator]
    assert seen + rest == expected if stop < len(expected) else seen == expected
    resumed.sampler.set_epoch(4)
    undisturbed.sampler.set_epoch(4)
    assert positions(resumed) == positions(undisturbed)


def test_epoch_cut_short_starts_the_next_at_its_beginning() -> None:
    loader = train_loader(100, 10)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    loader.sampler.set_epoch(1)
    assert len(positions(loader)) == 10


@pytest.mark.parametrize("change", [{"size": 99}, {"seed": 1}])
def test_position_of_another_order_is_refused(change: dict) -> None:
    loader = train_loader(100, 10)
    next(iter(loader))
    with pytest.raises(UserError, match="stands inside an epoch"):
        train_loader(**({"size": 100, "batch_size": 10, "seed": 0} | change)).load_state_dict(loader.state_dict())


def test_position_in_batches_of_another_size_misses_no_item() -> None:
    loader, other = train_loader(100, 10), train_loader(100, 7)
    iterator = iter(loader)
    seen = torch.cat([next(iterator).index for _ in range(3)])
    other.load_state_dict(loader.state_dict())
    rest = torch.cat([batch.index for batch in other])
    assert len(rest) == 100 - 28
    assert torch.equal(torch.cat([seen, rest]).unique(), torch.arange(100))


def test_position_carries_over_to_two_processes_with_the_same_global_batch() -> None:
    one = train_loader(100, 10)
    iterator = iter(one)
    next(iterator)
    state = one.state_dict()
    two = [train_loader(100, 5, rank, 2) for rank in range(2)]
    for loader in two:
        loader.load_state_dict(state)
    together = [a + b for a, b in zip(*map(positions, two), strict=True)]
    assert together == [batch.index.tolist() for batch in iterator]


# Several processes


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_together_see_the_global_batches_of_one_process(world: int, drop_last: bool) -> None:
    one = positions(train_loader(100, 4 * world, drop_last=drop_last))
    ranks = [positions(train_loader(100, 4, rank, world, drop_last=drop_last)) for rank in range(world)]
    together = [joined(blocks) for blocks in zip(*ranks, strict=True)]
    whole = 100 // (4 * world)
    assert together[:whole] == one[:whole]
    assert len(together) == len(one)
    for blocks, expected in zip(list(zip(*ranks, strict=True))[whole:], one[whole:], strict=True):
        assert len({len(block) for block in blocks}) == 1  # equal sizes, filled up by fewer than `world` items
        assert joined(blocks)[: len(expected)] == expected
        assert len(joined(blocks)) - len(expected) < world


def test_tail_is_filled_up_even_when_it_exceeds_the_set() -> None:
    ranks = [positions(train_loader(1, 4, rank, 3)) for rank in range(3)]
    assert ranks == [[[0]]] * 3


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 65, 100, 129])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_has_every_item_once_and_as_many_batches_on_every_rank(
    size: int, batch_size: int, world: int
) -> None:
    if size < world:
        with pytest.raises(UserError, match="cannot be spread"):
            eval_loader(size, batch_size, 0, world)
        return
    loaders = [eval_loader(size, batch_size, rank, world) for rank in range(world)]
    ranks = [positions(loader) for loader in loaders]
    assert joined(joined(ranks)) == list(range(size))
    assert {len(batches) for batches in ranks} == {len(loaders[0])}
    assert all(1 <= len(batch) <= max(batch_size, min(world, 2)) for batches in ranks for batch in batches)


def test_data_module_takes_its_share_of_distributed_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = module(batch_size=16, eval_batch_size=32), []
    for rank in range(2):
        monkeypatch.setattr("datamodules.loaders.rank_and_world", lambda rank=rank: (rank, 2))
        monkeypatch.setattr("datamodules.images.module.rank_and_world", lambda rank=rank: (rank, 2))
        seen.append((positions(data.train_dataloader()), positions(data.test_dataloader())))
    monkeypatch.undo()
    data.batch_size = 32
    one = positions(data.train_dataloader())
    assert [a + b for a, b in zip(seen[0][0], seen[1][0], strict=True)][:-1] == one[:-1]
    assert joined(seen[0][1] + seen[1][1]) == list(range(360))


# With Lightning


class Recorder(pl.LightningModule):
    """Remembers the items of every training step, and can stop in the middle as if killed."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.images: dict[str, torch.Tensor] = {}
        self.stop_at = stop_at

    def training_step(self, batch: ImageBatch, batch_idx: int) -> torch.Tensor:
        if self.stop_at is not None and self.global_step == self.stop_at:
            raise InterruptedError
        self.seen.append(batch.index.tolist())
        self.images["train"] = batch.image
        return self.weight * batch.image.mean()

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self.images["val"] = batch.image

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> torch.Tensor:
        return batch.index

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder: Path, **arguments) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        **({"max_epochs": 3, "enable_checkpointing": False} | arguments),
    )  # fmt: skip


@pytest.mark.parametrize("stop_at", [2, 7, 12])
def test_trainer_resumed_inside_an_epoch_sees_the_remaining_batches(tmp_path: Path, stop_at: int) -> None:
    arguments = {"batch_size": 256, "seed": 1}  # 6 batches an epoch
    whole = Recorder()
    trainer(tmp_path).fit(whole, datamodule=module(**arguments))
    assert len(whole.seen) == 18

    keeper = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
    first = Recorder(stop_at)
    with pytest.raises(InterruptedError):
        trainer(tmp_path, callbacks=[keeper], enable_checkpointing=True).fit(first, datamodule=module(**arguments))
    second = Recorder()
    trainer(tmp_path).fit(second, datamodule=module(**arguments), ckpt_path=tmp_path / "last.ckpt")
    assert first.seen + second.seen == whole.seen


def test_images_reach_steps_as_floats_and_only_training_is_augmented(tmp_path: Path) -> None:
    data, recorder = module(batch_size=2000, eval_batch_size=2000, augment="shift"), Recorder()
    trainer(tmp_path, max_epochs=1).fit(recorder, datamodule=data)
    assert data.val_split is not None
    assert torch.equal(recorder.images["val"], data.val_split.images.float() / 255)
    image, original = recorder.images["train"], data.train_split.images[recorder.seen[0]].float() / 255
    assert image.dtype == torch.float32
    assert not torch.equal(image, original)
    # A shift by up to two pixels each way: some window of the padded original.
    padded = torch.nn.functional.pad(original, (2, 2, 2, 2))
    windows = torch.stack([padded[..., i : i + 8, j : j + 8] for i in range(5) for j in range(5)])
    assert (windows == image).flatten(2).all(-1).any(0).all()


def test_overfitting_keeps_the_same_batches(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer(tmp_path, overfit_batches=2).fit(recorder, datamodule=module(batch_size=64))
    assert recorder.seen[0:2] == recorder.seen[2:4] == recorder.seen[4:6]


def test_prediction_goes_through_the_test_part_in_order(tmp_path: Path) -> None:
    predicted = trainer(tmp_path).predict(Recorder(), datamodule=module(eval_batch_size=100))
    assert predicted is not None
    assert torch.cat(predicted).tolist() == list(range(360))


# Identity: what was published was made of exactly these items in exactly this order


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        ({}, "29fd11336deba818"),
        ({"val_fraction": 0.2, "train_fraction": 0.5, "split_seed": 3, "image_size": 12}, "be35d600e419b009"),
        ({"dataset": "fashion_mnist", "variant": "subset"}, "58cd3509b96148c8"),
    ],
)
def test_fingerprints_are_those_of_the_published_results(arguments: dict, start: str) -> None:
    assert module(**arguments).meta.fingerprint.startswith(start)


def test_order_is_that_of_the_published_results() -> None:
    order = torch.tensor(joined(positions(module(seed=3).train_dataloader())))
    assert hashlib.sha256(order.numpy().tobytes()).hexdigest().startswith("e0cc07d7924f1d92")


# Wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "cifar_10"}, "did you mean 'cifar10'"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"batch_size": -3}, "batch_size: expected at least 1, got -3"),
        ({"eval_batch_size": 0}, "eval_batch_size"),
        ({"image_size": -1}, "image_size"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"val_fraction": -0.1}, "val_fraction"),
        ({"train_fraction": 0.0}, "train_fraction"),
        ({"train_fraction": 1.1}, "train_fraction"),
        ({"train_rest": True}, "train_rest"),
        ({"augment": "flipp"}, "did you mean 'flip'"),
        ({"variant": "small"}, "variant"),
        ({"predict_split": "all"}, "predict_split: expected one of train, val, test, got 'all'"),
        ({"dataset": "image_folder"}, "path"),
        ({"dataset": "digits", "path": "x"}, "path"),
        ({"dataset": "digits", "variant": "subset"}, "fashion_mnist only"),
        ({"train_items": 0}, "train_items: expected at least 1, got 0"),
        ({"train_items": 9}, r"train_items: expected 10 \(one of each class\) to 1,293 \(all that train\), got 9"),
        ({"train_items": 1294}, r"train_items: expected 10 .* to 1,293 .* got 1,294"),
        ({"train_items": 50, "train_fraction": 0.5}, "train_items: expected none with train_fraction 0.5"),
        ({"classes": []}, r"classes: expected at least one, and each once; got \[\]"),
        ({"classes": [1, "1"]}, r"classes: expected at least one, and each once; got \[1, '1'\]"),
        ({"classes": [10]}, "classes: expected names, or numbers from 0 to 9; got 10"),
        ({"classes": [-1]}, "classes: expected names, or numbers from 0 to 9; got -1"),
        (
            {"dataset": "fashion_mnist", "variant": "subset", "classes": ["Bags"]},
            "classes: expected names, .* got 'Bags' .did you mean 'Bag'.*",
        ),
        ({"dataset": "digits", "val_fraction": 0.0001}, "leaves none for validation"),
    ],
)
def test_wrong_input_is_one_line_that_names_it(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        module(**arguments)
    assert "\n" not in str(caught.value)


def test_batch_larger_than_the_set_with_drop_last_is_explained() -> None:
    with pytest.raises(UserError, match="lower batch_size"):
        module(batch_size=5000, drop_last=True).train_dataloader()


def test_root_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LEANLIGHT_DATA", str(tmp_path))
    with pytest.raises(UserError, match=str(tmp_path)):
        ImageDataModule("cifar10", download=False).ensure_available()


@pytest.mark.parametrize("world", [1, 2])
def test_a_batch_of_replicas_holds_that_of_each_seed_one_after_another(world):
    for rank in range(world):
        together = TrainOrder(11, 4, 7, rank=rank, world=world, replicas=3)
        alone = [TrainOrder(11, 4, 7 + replica, rank=rank, world=world) for replica in range(3)]
        for epoch in range(2):
            for order in (together, *alone):
                order.set_epoch(epoch)
            for got, *own in zip(together.blocks(0), *(order.blocks(0) for order in alone), strict=True):
                assert torch.equal(got, torch.cat(own))
