"""Parts, order, padding and batches, with an encoder that takes a token a word."""

import json
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules import SafetyDataModule, Shapes, XSTest
from datamodules.loaders import TrainLoader
from datamodules.safety.order import LengthOrder
from leanlight.contracts import (
    ResumablePrediction,
    SafetyData,
    SafetySample,
    SampleEncoder,
    TokenBatch,
    UserError,
)


class Words:
    """A token a word: its length. The target is a token a label. Counts what it encodes."""

    pad_id = 99

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def _ids(self, sample: SafetySample, targets: bool) -> tuple[list[int], list[int]]:
        prompt = [len(word) for word in f"{sample.instruction} {sample.response}".split()]
        return prompt, [50 + int(label) for label in sample.labels.values()] if targets else []

    def lengths(self, samples: Sequence[SafetySample], targets: bool) -> Tensor:
        return torch.tensor([sum(map(len, self._ids(sample, targets))) for sample in samples])

    def encode(self, samples: Sequence[SafetySample], index: Tensor, targets: bool) -> TokenBatch:
        self.encoded += [sample.id for sample in samples]
        pairs = [self._ids(sample, targets) for sample in samples]
        width = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids, mask, labels = (torch.full((len(samples), width), value) for value in (self.pad_id, 0, -100))
        for row, (prompt, answer) in enumerate(pairs):
            length = len(prompt) + len(answer)
            place = slice(0, length) if targets else slice(width - length, width)
            ids[row, place] = torch.tensor(prompt + answer)
            mask[row, place] = 1
            if targets:
                labels[row, len(prompt) : length] = torch.tensor(answer)
        shown = [sample.image is not None for sample in samples]
        pixels = tuple(
            sample.image.pixels().float().view(3, -1).T if sample.image else torch.zeros(0, 3) for sample in samples
        )
        grid = torch.tensor([[1, 2, 2] if has else [0, 0, 0] for has in shown])
        return TokenBatch(ids, mask, labels if targets else None, (ids == 3).long() * mask, pixels, grid, index)


def rows(count: int = 120) -> list[dict]:
    generator = np.random.default_rng(0)
    return [
        {
            "id": f"s{number}",
            "prompt": f"Prompt  {number // 3} " + "word " * int(generator.integers(1, 5))
            if number % 3
            else f"prompt {number // 3}",
            "answer": "word " * int(generator.lognormal(3, 0.8)),
            "group": f"g{number // 3}",
            "topic": f"t{number // 3 % 6}",
            "source": f"m{number % 3}",
            "instruction_label": int(number // 3 % 2),
            "response_label": int(generator.random() < 0.3),
        }
        for number in range(count)
    ]


def write(folder: Path, count: int = 120, **changes) -> str:
    """Changes: a value of every row, or None for no such column."""
    path = folder / "samples.jsonl"
    made = [{**row, **changes} for row in rows(count)]
    path.write_text("\n".join(json.dumps({k: v for k, v in row.items() if v is not None}) for row in made))
    return str(path)


def ready(dataset: str = "jsonl", **arguments) -> SafetyDataModule:
    data = SafetyDataModule(dataset, **arguments)
    data.setup()
    data.encoder = Words()
    return data


def ids(data: SafetyDataModule, part: str) -> list[str]:
    return [sample.id for sample in data.samples(part)]


def same(ours: TokenBatch, theirs: TokenBatch) -> bool:
    tensors = ("input_ids", "attention_mask", "labels", "token_types", "grid", "index")
    equal = all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in tensors)
    return equal and all(torch.equal(*pair) for pair in zip(ours.pixel_values, theirs.pixel_values, strict=True))


# ---- parts ----


@pytest.mark.parametrize("scheme", ["group", "topic", "source"])
def test_parts_share_no_group_topic_or_source(tmp_path, scheme):
    path = write(tmp_path)
    data = ready(path=path, split=scheme, test_fraction=0.3, val_fraction=0.3)
    parts = {part: data.samples(part) for part in ("train", "val", "test")}
    assert sorted(chain.from_iterable(ids(data, part) for part in parts)) == sorted(row["id"] for row in rows())
    keys = [{getattr(sample, scheme) for sample in samples} for samples in parts.values()]
    assert all(keys)
    assert sum(map(len, keys)) == len(set.union(*keys))
    again = ready(path=path, split=scheme, test_fraction=0.3, val_fraction=0.3, seed=5)
    assert again.meta.fingerprint == data.meta.fingerprint


def test_another_split_seed_makes_other_parts(tmp_path):
    path = write(tmp_path)
    first, second = ready(path=path), ready(path=path, split_seed=1)
    assert ids(first, "test") != ids(second, "test")
    assert first.meta.fingerprint != second.meta.fingerprint


def test_groups_are_prompts_but_for_case_and_space_and_pictures_where_there_are_some(tmp_path):
    for number in range(8):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / f"{number}.png")
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / f"copy{number}.png")
    pictured = [
        {"prompt": "the same", "answer": "a", "image": f"{name}{number}.png", "response_label": 0}
        for number in range(8)
        for name in ("", "copy")
    ]
    plain = [
        {"prompt": prompt, "answer": str(number), "response_label": 1}
        for number in range(10)
        for prompt in (f"Say {number}", f" say  {number}\n")
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, pictured + plain)))
    data = ready(path=str(path), test_fraction=0.5, val_fraction=0)
    test = {int(name) - 1 for name in ids(data, "test")}
    assert 0 < len(test & set(range(16))) < 16
    assert 0 < len(test & set(range(16, 36))) < 20
    assert {position ^ 1 for position in test} == test  # both of a pair


def test_folds_are_a_partition_and_labels_have_the_same_shares_in_all_parts(tmp_path):
    path = write(tmp_path, 300, group=None)
    tested = []
    for fold in range(5):
        data = ready(path=path, fold=fold, val_fraction=0.25)
        tested += ids(data, "test")
        assert 50 <= len(ids(data, "test")) <= 70
        for part in ("train", "val", "test"):
            harmful, count = data.meta.harmful["instruction"][part], data.meta.counts[part]
            assert abs(harmful / count - 0.5) < 0.06
    assert sorted(tested) == sorted(row["id"] for row in rows(300))


def test_single_samples_are_split_in_exact_shares_of_every_kind(tmp_path):
    path = tmp_path / "samples.jsonl"
    made = [{"prompt": f"p {n}", "answer": "a", "response_label": int(n % 5 == 0)} for n in range(500)]
    path.write_text("\n".join(map(json.dumps, made)))
    data = ready(path=str(path), test_fraction=0.2, val_fraction=0.25)
    assert data.meta.counts == {"train": 300, "val": 100, "test": 100}
    assert data.meta.harmful == {"response": {"train": 60, "val": 20, "test": 20}}


def test_published_parts_are_kept_and_validation_is_held_out_where_there_is_none(tmp_path):
    made = [{**row, "split": "train" if n < 90 else "test"} for n, row in enumerate(rows())]
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, made)))
    data = ready(path=str(path))
    assert ids(data, "test") == [f"s{n}" for n in range(90, 120)]
    assert sorted(ids(data, "train") + ids(data, "val")) == sorted(f"s{n}" for n in range(90))
    assert data.meta.counts["val"] == 9
    assert ready(path=str(path), val_fraction=0).val_dataloader() == []
    assert set(ids(ready(path=str(path), split="group"), "test")) != {f"s{n}" for n in range(90, 120)}


def test_fewer_training_items_are_among_more_and_leave_the_rest_as_it_is(tmp_path):
    path = write(tmp_path)
    whole, some, few = (ready(path=path, train_items=count) for count in (None, 40, 10))
    assert set(ids(few, "train")) < set(ids(some, "train")) < set(ids(whole, "train"))
    assert (len(ids(some, "train")), len(ids(few, "train"))) == (40, 10)
    assert ids(few, "test") == ids(whole, "test")


def test_without_labels_all_is_for_test_and_nothing_trains(tmp_path):
    data = ready(path=write(tmp_path, instruction_label=None, response_label=None))
    assert data.meta.counts == {"train": 0, "val": 0, "test": 120}
    assert (data.meta.fields, data.meta.harmful) == ((), {})
    with pytest.raises(UserError, match=r"have no labels, so nothing can be trained"):
        data.train_dataloader()
    with pytest.raises(UserError, match=r"predict_split: train, but that part has no sample"):
        ready(path=data.path, predict_split="train").predict_dataloader()


# ---- what it tells ----


def test_meta_counts_pictures_and_harm_as_a_loop_does():
    data = ready("shapes", shapes=Shapes(train=60, val=20, test=30))
    assert isinstance(data, SafetyData)
    assert isinstance(data, ResumablePrediction)
    assert isinstance(data.encoder, SampleEncoder)
    meta = data.meta
    assert meta.fields == ("instruction", "image", "response")
    assert meta.counts == dict(meta.pictures) == {"train": 60, "val": 20, "test": 30}
    for field in meta.fields:
        assert meta.harmful[field]["train"] == sum(sample.labels[field] for sample in data.samples("train"))
    texts = list(data.texts())
    assert len(texts) == 180
    assert {sample.instruction for sample in data.samples("train")} < set(texts)


def test_the_fingerprint_follows_texts_labels_and_pictures():
    prints = [
        ready("shapes", shapes=Shapes(**{"train": 20, "val": 5, "test": 5, **changes})).meta.fingerprint
        for changes in ({}, {}, {"noise": 0.01}, {"templates": "b"}, {"seed": 1}, {"shuffle_images": True})
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 5


# ---- batches ----


def test_lengths_of_a_batch_are_alike_so_that_little_is_padding(tmp_path):
    path = write(tmp_path, 1500)

    def padding(window: int) -> float:
        loader = ready(path=path, length_window=window, seed=0, batch_size=8).train_dataloader()
        masks = [batch.attention_mask for batch in loader]
        return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    assert padding(100) < 0.1
    assert padding(0) > 0.3


def test_the_order_is_a_function_of_seed_and_epoch_and_holds_each_item_once():
    lengths = torch.randint(1, 500, (203,), generator=torch.Generator().manual_seed(0))

    def order(seed: int, epoch: int) -> list[int]:
        made = LengthOrder(lengths, 203, 8, seed, window=10)
        made.set_epoch(epoch)
        return torch.cat(list(made.blocks(0))).tolist()

    assert sorted(order(0, 0)) == list(range(203))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    sizes = [lengths[order(0, 0)[start : start + 8]].float().mean().item() for start in range(0, 200, 8)]
    assert sizes not in (sorted(sizes), sorted(sizes, reverse=True))
    assert torch.equal(LengthOrder(lengths, 203, 8, 0, False, window=10).indices(), torch.arange(203))
    few = LengthOrder(lengths[:5], 5, 8, 0, window=10)
    assert sorted(torch.cat(list(few.blocks(0))).tolist()) == list(range(5))


@pytest.mark.parametrize(("size", "drop_last"), [(203, False), (203, True), (208, False)])
def test_two_processes_together_see_the_global_batch_of_one(size, drop_last):
    lengths = torch.randint(1, 500, (size,), generator=torch.Generator().manual_seed(0))
    one = list(LengthOrder(lengths, size, 16, 3, True, drop_last, window=4).blocks(0))
    two = [list(LengthOrder(lengths, size, 8, 3, True, drop_last, rank, 2, window=4).blocks(0)) for rank in (0, 1)]
    assert len(one) == len(two[0]) == len(two[1])
    for whole, *halves in zip(one, *two, strict=True):
        assert len(halves[0]) == len(halves[1])
        joined = Counter(torch.cat(halves).tolist())
        assert set(whole.tolist()) <= set(joined)
        assert sum((joined - Counter(whole.tolist())).values()) == len(whole) % 2


def test_training_goes_on_in_mid_epoch_with_the_very_next_batch(tmp_path):
    path = write(tmp_path)

    def loader() -> TrainLoader[TokenBatch]:
        made = ready(path=path, seed=0, batch_size=8).train_dataloader()
        made.sampler.set_epoch(2)
        return made

    undisturbed = list(loader())
    stopped = loader()
    before = [batch for _, batch in zip(range(4), stopped, strict=False)]
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    for ours, theirs in zip([*before, *resumed], undisturbed, strict=True):
        assert same(ours, theirs)


def test_batches_from_memory_are_those_of_the_encoder_and_nothing_is_encoded_twice():
    arguments = {"shapes": Shapes(train=37, val=5, test=5), "batch_size": 8, "seed": 0}
    kept, fresh = (ready("shapes", cache_mb=size, **arguments) for size in (64, 0))
    for epoch in range(3):
        loaders = [data.train_dataloader() for data in (kept, fresh)]
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        for ours, theirs in zip(*loaders, strict=True):
            assert same(ours, theirs)
    assert Counter(kept.encoder.encoded) == dict.fromkeys(ids(kept, "train"), 1)
    assert len(fresh.encoder.encoded) == 3 * 37


def test_more_than_the_memory_allows_is_not_kept():
    data = ready("shapes", shapes=Shapes(train=40, val=5, test=5), cache_mb=1, batch_size=8)  # pictures take 1.5 MB
    for _ in range(2):
        list(data.train_dataloader())
    assert len(data.encoder.encoded) == 80


def test_evaluation_goes_through_each_sample_once_in_order_without_targets(tmp_path):
    data = ready(path=write(tmp_path), batch_size=3)
    seen = []
    for batch in data.test_dataloader():
        assert batch.labels is None
        assert batch.attention_mask[:, -1].all()
        for row, index in enumerate(batch.index.tolist()):
            sample = data.samples("test")[index]
            words = f"{sample.instruction} {sample.response}".split()
            assert batch.input_ids[row, batch.attention_mask[row] == 1].tolist() == [len(word) for word in words]
            seen.append(index)
    assert seen == list(range(data.meta.counts["test"]))


def test_prediction_leaves_out_what_is_done_and_never_holds_targets(tmp_path):
    data = ready(path=write(tmp_path), predict_split="train", batch_size=3)
    data.skip_predicted(torch.tensor([0, 2, 5]))
    batches = list(data.predict_dataloader())
    assert all(batch.labels is None for batch in batches)
    seen = torch.cat([batch.index for batch in batches]).tolist()
    assert sorted(seen) == sorted(set(range(data.meta.counts["train"])) - {0, 2, 5})


def test_the_encoder_is_that_of_the_module_in_training(tmp_path):
    data = SafetyDataModule("shapes", shapes=Shapes(train=4, val=1, test=1))
    data.setup()
    with pytest.raises(UserError, match=r"batches need an encoder"):
        data.train_dataloader()
    encoder = Words()
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(encoder=encoder), overfit_batches=0)
    assert data.encoder is encoder
    assert len(next(iter(data.train_dataloader()))) == 4


# ---- wrong input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "shaps"}, "did you mean 'shapes'"),
        ({"split": "topics"}, "split: expected one of file, group, topic, source, got 'topics' .did you mean 'topic'"),
        ({"predict_split": "dev"}, "predict_split: expected one of train"),
        ({"batch_size": 0}, "batch_size: expected at least 1"),
        ({"val_fraction": 1.0}, "val_fraction: expected a number in"),
        ({"test_fraction": 0.0}, "test_fraction: expected a number in"),
        ({"fold": 5}, "fold: expected 0 to 4, got 5"),
        ({"folds": 1}, "folds: expected at least 2"),
        ({"fold": 0, "split": "file"}, "fold: expected none with split: file"),
        ({"length_window": -1}, "length_window: expected at least 0"),
        ({"xstest": XSTest()}, "xstest: expected none with dataset 'shapes'"),
        ({"dataset": "xstest", "shapes": Shapes()}, "shapes: expected none with dataset 'xstest'"),
        ({"columns": {"id": "x"}}, "columns: expected none with dataset 'shapes'"),
        ({"path": "x"}, "path: expected none with dataset shapes"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        SafetyDataModule(**arguments)
    assert "\n" not in str(caught.value)


def test_data_that_do_not_fit_a_split_are_named(tmp_path):
    path = write(tmp_path)
    with pytest.raises(UserError, match=r"split: file, but .*samples.jsonl tells no parts"):
        ready(path=path, split="file")
    with pytest.raises(UserError, match=r"train_items: expected at most"):
        ready(path=path, train_items=1000)
    with pytest.raises(UserError, match=r"split: topic, but sample 's0' has no topic"):
        ready(path=write(tmp_path, topic=None), split="topic")
    with pytest.raises(UserError, match=r"split: topic leaves no sample .* for test"):
        ready(path=write(tmp_path, topic="one"), split="topic", val_fraction=0)
    made = [{**row, "image": f"{n}.png"} for n, row in enumerate(rows())]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, made)))
    Image.new("RGB", (2, 2)).save(tmp_path / "0.png")
    with pytest.raises(UserError, match=r"images: 119 of 120 pictures are missing: 1.png"):
        ready(path=path)
    with pytest.raises(UserError, match=r"XSTest.* was not found; tried: .*nowhere/xstest; to get it: put"):
        ready("xstest", root="nowhere")


def test_the_loader_of_a_length_order_says_when_there_is_no_batch(tmp_path):
    data = ready(path=write(tmp_path), batch_size=500, drop_last=True)
    with pytest.raises(UserError, match=r"leaves no batch"):
        data.train_dataloader()
