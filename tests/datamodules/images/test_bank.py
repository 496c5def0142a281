"""Training on banks: which images, with which labels, and no real one among them."""

import json
from pathlib import Path

import banks
import numpy as np
import pytest
import torch

from datamodules import BankDataModule, ImageDataModule
from datamodules.images import sources
from datamodules.images.module import resize
from datamodules.images.sources import Raw
from leanlight.contracts import InMemoryImages, TracedImages, UserError


@pytest.fixture
def bank(tmp_path):
    return banks.originals(tmp_path / "bank")


@pytest.fixture
def varied(tmp_path, bank):
    return [bank, banks.variations(tmp_path / "variations", bank)]


def data(folders, **arguments) -> BankDataModule:
    made = BankDataModule(folders, **{"dataset": "digits", "download": False, "batch_size": 6, "seed": 1} | arguments)
    made.ensure_available()
    made.setup()
    return made


def levels(split) -> list[int]:
    """The grey level of every image of a hand-made bank."""
    assert (split.images.flatten(1).amin(1) == split.images.flatten(1).amax(1)).all()
    return split.images[:, 0, 0, 0].tolist()


def test_banks_train_and_validate_and_real_images_test(varied):
    made = data(varied, val_fraction=0.5)
    assert isinstance(made, InMemoryImages)
    assert isinstance(made, TracedImages)
    assert made.data_free
    assert not getattr(ImageDataModule, "data_free", False)
    real = ImageDataModule("digits", download=False)
    real.setup()
    assert torch.equal(made.test_split.images, real.test_split.images)
    assert set(levels(made.train_split)) | set(levels(made.val_split)) <= set(range(20)) | set(range(100, 120))
    assert made.meta.counts == {"train": 20, "val": 10, "test": 360}
    assert made.meta.class_counts == (2,) * 10
    assert made.meta.source == "a bank of 20, 10 of 40 variations; tests on scikit-learn"
    for batch in made.train_dataloader():
        assert torch.equal(batch.image, made.train_split.images[batch.index])
        assert torch.equal(batch.label, made.train_split.labels[batch.index])


def test_no_real_training_image_decides_anything(bank, monkeypatch):
    before, load = data([bank]), sources.load

    def other(*arguments, **more) -> Raw:
        raw = load(*arguments, **more)
        return Raw((255 - raw.train[0][:50], raw.train[1][:50]), raw.test, raw.classes, raw.source)

    monkeypatch.setattr(sources, "load", other)
    after = data([bank])
    assert after.meta == before.meta
    assert torch.equal(after.train_split.images, before.train_split.images)


def test_held_out_originals_take_their_variations_along(varied):
    made = data(varied, val_fraction=0.5, keep="all", split_seed=3)
    held = levels(made.val_split)
    assert sorted(level % 10 for level in held) == list(range(10))  # one of the two of each class
    trained = [level for level in range(20) if level not in held]
    assert levels(made.train_split) == [*trained, *(level for i in trained for level in (100 + i, 150 + i))]
    assert levels(data(varied, val_fraction=0.5, split_seed=3).val_split) == held
    assert levels(data(varied, val_fraction=0.5, split_seed=4).val_split) != held


def test_the_filter_decides_which_variations_train(varied):
    def variations(**arguments) -> list[int]:
        made = data(varied, val_fraction=0.0, **arguments)
        assert levels(made.train_split)[:20] == list(range(20))
        return levels(made.train_split)[20:]

    assert variations() == list(range(100, 120))
    assert variations(keep="all") == [level for i in range(20) for level in (100 + i, 150 + i)]
    # Scores are 1 - i / 100 of the first variation of item i, and a tenth less of the second.
    assert variations(omega=0.88) == [100, 150, 101, 151, 102, 152, *range(103, 113)]
    drawn = variations(keep="random", omega=0.88)
    assert len(drawn) == len(set(drawn)) == 16
    assert drawn == variations(keep="random", omega=0.88) != variations(omega=0.88)
    assert drawn != variations(keep="random", omega=0.88, split_seed=1)


def test_random_variations_are_as_many_as_those_kept_of_training_sources(varied):
    for arguments in ({}, {"label": "drop_if_disagree"}):
        arguments |= {"val_fraction": 0.5, "omega": 0.88}
        kept, drawn = data(varied, **arguments), data(varied, keep="random", **arguments)
        assert drawn.meta.counts == kept.meta.counts
        assert not {level % 50 for level in levels(drawn.train_split)} & set(levels(drawn.val_split))


def test_labels_of_variations(varied):
    labels = {}
    for label in ("inherit", "teacher", "drop_if_disagree"):
        split = data(varied, label=label, val_fraction=0.0).train_split
        assert split.labels[:20].tolist() == [i % 10 for i in range(20)]
        labels[label] = dict(zip(levels(split)[20:], split.labels[20:].tolist(), strict=True))
    items = range(20)
    assert labels["inherit"] == {100 + i: i % 10 for i in items}
    assert labels["teacher"] == {100 + i: (i + (i % 3 == 0)) % 10 for i in items}
    assert labels["drop_if_disagree"] == {100 + i: i % 10 for i in items if i % 3}


def test_fewer_originals_leave_with_their_variations(varied):
    made = data(varied, items=10, val_fraction=0.2)
    used = levels(made.train_split)
    assert made.meta.counts == {"train": 16, "val": 2, "test": 360}
    assert used[8:] == [100 + level for level in used[:8]]
    assert levels(data(varied, items=10, val_fraction=0.2, split_seed=1).train_split) != used
    with pytest.raises(UserError, match=r"items: expected at most 20, the originals of .*bank; got 21"):
        data(varied, items=21)


def test_a_bank_is_predicted_whole_in_its_order_without_a_copy_of_it(bank):
    made = data([bank], val_fraction=0.0, predict_split="train", eval_batch_size=7)
    batches = list(made.predict_dataloader())
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(20))
    assert torch.cat([batch.image for batch in batches])[:, 0, 0, 0].tolist() == list(range(20))
    assert made.origin("train").tolist() == list(range(20))
    assert made.originals_sha256 == banks.digest(bank / "bank.safetensors")
    assert made.train_split.images.data_ptr() == made._banks[0].images.data_ptr()
    mapped = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else str(bank / "bank.safetensors")
    assert str(bank / "bank.safetensors") in mapped


def test_the_real_images_are_brought_to_the_size_of_the_bank(tmp_path):
    made = data([banks.originals(tmp_path / "small", shape=(1, 4, 4))], image_size=4)
    assert made.meta.shape == made.test_split.images.shape[1:] == (1, 4, 4)


def test_a_fingerprint_names_the_banks_and_follows_what_is_trained_on(varied):
    print_of = [data(varied, **change).meta.fingerprint for change in ({}, {"omega": 0.88}, {"label": "teacher"})]
    assert len(set(print_of)) == 3
    for folder in varied:
        for name in ("bank.safetensors", "manifest.csv"):
            assert banks.digest(folder / name) in print_of[0]


def test_noise_instead_is_uniform_and_a_function_of_the_split_seed_and_the_number():
    made = data([], instead="noise", items=400, val_fraction=0.0)
    images = made.train_split.images
    assert images.shape == (400, 1, 8, 8)
    assert made.train_split.labels.tolist() == [0] * 400
    counts = torch.bincount(images.flatten().long(), minlength=256)
    assert (counts > 50).all()
    assert (counts < 150).all()
    assert torch.equal(data([], instead="noise", items=30, val_fraction=0.0).train_split.images, images[:30])
    assert not torch.equal(
        data([], instead="noise", items=30, val_fraction=0.0, split_seed=1).train_split.images, images[:30]
    )
    assert data([], instead="noise", items=400).meta.counts == {"train": 360, "val": 40, "test": 360}


def test_another_set_instead_is_brought_to_the_shape_of_the_real_one():
    made = data([], instead="fashion_mnist", items=50, val_fraction=0.0)
    raw = sources.load("fashion_mnist", made.root, download=False)
    known = {image.numpy().tobytes() for image in resize(torch.from_numpy(raw.train[0].copy()), 8)}
    found = [image.numpy().tobytes() for image in made.train_split.images]
    assert len(set(found)) == 50
    assert set(found) <= known
    assert made.train_split.labels.tolist() == [0] * 50
    assert made.meta.name == "digits"
    assert made.meta.source == "50 images of fashion_mnist; tests on scikit-learn"


def test_a_set_that_is_missing_is_named_before_anything_runs(tmp_path):
    made = BankDataModule(dataset="digits", instead="cifar10", items=5, root=tmp_path, download=False)
    with pytest.raises(UserError, match="CIFAR-10 was not found"):
        made.ensure_available()


def test_a_set_of_attributes_has_no_classes_to_distil(bank, monkeypatch):
    images, attributes = np.zeros((6, 1, 8, 8), np.uint8), np.ones((6, 2), np.int64)
    monkeypatch.setattr(
        sources, "load", lambda *_, **__: Raw((images, attributes), (images, attributes), ("a", "b"), "")
    )
    with pytest.raises(UserError, match="dataset: expected images of one class each, digits has attributes"):
        data([bank])


@pytest.mark.parametrize(("own", "other"), [(1, 3), (3, 1)])
def test_channels_of_another_set_are_averaged_or_repeated(own, other, monkeypatch):
    random = np.random.default_rng(0)
    labels = np.arange(10) % 2

    def part(channels: int) -> tuple[np.ndarray, np.ndarray]:
        return random.integers(0, 256, (10, channels, 8, 8), dtype=np.uint8), labels

    raw = {"digits": Raw(part(own), part(own), ("0", "1"), "here"), "mnist": Raw(part(other), part(other), (), "there")}
    monkeypatch.setattr(sources, "load", lambda name, *_, **__: raw[name])
    made = data([], instead="mnist", items=10, val_fraction=0.0)
    theirs = raw["mnist"].train[0]
    expected = np.repeat(theirs, 3, 1) if own == 3 else np.rint(theirs.mean(1, keepdims=True, dtype=np.float64))
    assert torch.equal(made.train_split.images, torch.from_numpy(expected.astype(np.uint8)))


def damage(name):
    def cut(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])

    return cut


def empty(folder):
    record = json.loads((folder / "bank.json").read_text())
    made = banks.write(folder.parent / "empty", np.zeros((0, 1, 8, 8), np.uint8), [], record["classes"])
    for name in ("bank.safetensors", "manifest.csv", "bank.json"):
        (made / name).replace(folder / name)


def other_manifest(folder):
    made = banks.originals(folder.parent / "other", items=30)
    (made / "manifest.csv").replace(folder / "manifest.csv")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage("bank.safetensors"), r"banks: .*bank.safetensors is cut, or of another bank: its sha256 is not"),
        (damage("bank.json"), r"banks: .*bank.json is damaged"),
        (other_manifest, r"banks: .*manifest.csv is cut, or of another bank: its sha256 is not the manifest_sha256"),
        (empty, r"banks: .*bank is empty; leanlight run dda/pipelines"),
        (
            lambda folder: (folder / "bank.json").unlink(),
            r"banks: expected the folder of a bank.*none in .*; leanlight run",
        ),
        (lambda folder: (folder / "manifest.csv").unlink(), r"banks: .* is not whole: it lacks manifest.csv"),
    ],
)
def test_a_bank_that_is_not_whole_is_named_before_anything_runs(bank, harm, message):
    harm(bank)
    made = BankDataModule([bank], dataset="digits", download=False)
    with pytest.raises(UserError, match=message):
        made.ensure_available()


def test_banks_that_do_not_belong_together_are_refused(tmp_path, varied):
    bank, variations = varied
    other = banks.originals(tmp_path / "other", items=30)
    for folders, message in (
        ([other, variations], r"banks: .*variations holds variations of another bank than .*other"),
        ([variations], r"banks: expected a bank of originals first; .*variations holds variations"),
        ([bank, other], r"banks: expected variations after the first bank; .*other holds originals"),
        ([], r"banks: expected the folders of banks, got none; leanlight run dda/pipelines/fashion_mnist_small"),
    ):
        with pytest.raises(UserError, match=message):
            data(folders)


def test_banks_for_other_images_or_classes_are_refused(tmp_path, bank):
    with pytest.raises(
        UserError, match=r"banks: expected images of shape \(1, 4, 4\), as digits has here; .*\(1, 8, 8\)"
    ):
        data([bank], image_size=4)
    with pytest.raises(
        UserError, match=r"banks: expected the classes \('0', .*, as digits has here; .* has \('0', '1'\)"
    ):
        data([banks.originals(tmp_path / "two", classes=2)])


@pytest.mark.parametrize("keep", ["kept", "random"])
def test_a_filter_that_keeps_nothing_is_told_the_highest_score(varied, keep):
    with pytest.raises(
        UserError, match=r"omega: expected at most 1, the highest score of a variation; 1.01 keeps none"
    ):
        data(varied, omega=1.01, keep=keep)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep": "best"}, "keep: expected one of kept, all, random, got 'best'"),
        ({"label": "own"}, "label: expected one of inherit, teacher, drop_if_disagree, got 'own'"),
        ({"omega": 0.5, "keep": "all"}, "omega: expected none with keep: all"),
        ({"items": 0}, "items: expected at least 1, got 0"),
        ({"instead": "digits", "items": 5}, "instead: expected noise or another set than digits, whose images may not"),
        ({"instead": "nois", "items": 5}, "data set 'nois' is unknown"),
        ({"instead": "vtab", "items": 5}, "instead: expected noise or a set that needs no path, got vtab"),
        ({"instead": "noise"}, "items: expected how many images of noise take the place of banks"),
        ({"instead": "fashion_mnist", "items": 10**6}, "items: expected at most .*, the images of fashion_mnist; got"),
        ({"val_fraction": 0.01}, "val_fraction: 0.01 of 20 items leaves none for validation"),
    ],
)
def test_bad_arguments_are_named(bank, arguments, message):
    with pytest.raises(UserError, match=message):
        data([bank], **arguments)
