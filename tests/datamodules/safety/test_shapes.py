"""Made samples, against what can be seen in their pictures and read in their words."""

from collections import Counter, defaultdict
from dataclasses import replace

import pytest
import torch
from PIL import Image

from datamodules.safety.files import write_samples
from datamodules.safety.readers import read_parts, read_samples
from datamodules.safety.shapes import SHAPES, Shapes
from leanlight.contracts import HARM_CATEGORIES, SafetySample, UserError


def made(**changes) -> dict[str, list[SafetySample]]:
    parts = defaultdict(list)
    for sample, part in Shapes(**{"train": 200, "val": 20, "test": 150, **changes}).make():
        parts[part].append(sample)
    return parts


def is_red(sample: SafetySample) -> bool:
    """By the pixels that are no ground: those where a channel is dark."""
    pixels = sample.image.pixels().double()
    red, green = (pixels[channel][pixels.amin(0) < 120].mean() for channel in (0, 1))
    return bool(red > green)


def test_labels_are_what_picture_and_words_show():
    samples = made()["train"]
    of_instruction = {}
    for sample in samples:
        assert sample.labels["image"] == is_red(sample)
        assert (
            of_instruction.setdefault(sample.instruction, sample.labels["instruction"]) == sample.labels["instruction"]
        )
        assert bool(sample.categories) == any(sample.labels.values())
    assert Counter(of_instruction.values()) == {True: 3, False: 3}
    by_answer = defaultdict(list)
    for sample in samples:
        by_answer[sample.response].append(sample.labels)
    assert len(by_answer) == 4
    meanings = {
        "benign": lambda labels: not labels["response"],
        "picture": lambda labels: labels["response"] == labels["image"],
        "instruction": lambda labels: labels["response"] == labels["instruction"],
    }
    found = Counter(
        tuple(name for name, holds in meanings.items() if all(map(holds, labels))) for labels in by_answer.values()
    )
    assert found == {("benign",): 1, ("picture",): 1, ("instruction",): 1, ("benign", "instruction"): 1}


def test_facts_are_drawn_evenly_and_independently():
    samples = made(train=2500, noise=0.0)["train"]
    facts = torch.tensor(
        [[s.labels["instruction"], s.labels["image"], "refuses" in s.explanation, s.topic == "circle"] for s in samples]
    ).double()
    assert torch.allclose(facts.mean(0), torch.tensor([1 / 2, 1 / 2, 1 / 3, 1 / 4]).double(), atol=0.04)
    assert (torch.corrcoef(facts.T) - torch.eye(4)).abs().max() < 0.06


def test_shapes_can_be_told_apart_and_stand_for_categories():
    samples = made(train=400, noise=0.0, jitter=0)["train"]
    area = defaultdict(set)
    for sample in samples:
        area[sample.topic].add(int((sample.image.pixels().amin(0) < 120).sum()))
    assert set(area) == set(SHAPES)
    assert [len(sizes) for sizes in area.values()] == [1] * 4
    assert len(set.union(*area.values())) == 4
    categories = {(s.topic, s.categories) for s in samples if s.categories}
    assert len(categories) == 4
    assert {names for _, names in categories} <= {(name,) for name in HARM_CATEGORIES}


def test_a_sample_depends_on_seed_part_and_index_alone():
    one, more, other = made(), made(train=350, val=0), made(seed=1)
    for part in ("train", "test"):
        for ours, theirs in zip(one[part], more[part], strict=False):
            assert (ours.instruction, ours.labels, ours.image.sha256) == (
                theirs.instruction,
                theirs.labels,
                theirs.image.sha256,
            )
    assert not more["val"]
    digests = {part: {s.image.sha256 for s in samples} for part, samples in one.items()}
    assert not digests["train"] & digests["test"]
    assert not digests["train"] & {s.image.sha256 for s in other["train"]}


def test_the_other_wording_has_the_same_meaning():
    first, second = made()["train"], made(templates="b")["train"]
    for ours, theirs in zip(first, second, strict=True):
        assert (ours.labels, ours.explanation) == (theirs.labels, theirs.explanation)
        assert torch.equal(ours.image.pixels(), theirs.image.pixels())
    assert not {s.instruction for s in first} & {s.instruction for s in second}
    assert not {s.response for s in first} & {s.response for s in second}


def test_shuffled_pictures_are_those_of_other_samples_of_the_test_part():
    plain, shuffled = made(), made(shuffle_images=True)
    for part in ("train", "val"):
        assert [s.image.sha256 for s in plain[part]] == [s.image.sha256 for s in shuffled[part]]
    ours, theirs = plain["test"], shuffled["test"]
    assert [s.labels for s in ours] == [s.labels for s in theirs]
    assert Counter(s.image.sha256 for s in ours) == Counter(s.image.sha256 for s in theirs)
    right = sum(s.labels["image"] == is_red(s) for s in theirs) / len(theirs)
    assert 0.35 < right < 0.65


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"templates": "c"}, "shapes.templates: expected one of a, b, got 'c'"),
        ({"train": 0}, "shapes.train: expected at least 1, got 0"),
        ({"jitter": 11}, "shapes.jitter: expected 0 to 10"),
        ({"noise": -1.0}, "shapes.noise: expected a number from 0"),
    ],
)
def test_settings_that_make_no_sense_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        Shapes(**changes)


def test_samples_as_files_are_read_back_as_the_same_samples(tmp_path):
    found = Shapes(train=6, val=3, test=5).make()
    folder = tmp_path / "made" / "shapes"
    assert write_samples(found, folder)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["train", "train.jsonl", "val", "val.jsonl", "test", "test.jsonl"]
    )
    assert list(folder.parent.iterdir()) == [folder]
    for part in ("train", "val", "test"):
        made_here = [sample for sample, of in found if of == part]
        again = read_samples(folder / f"{part}.jsonl")
        for ours, theirs in zip(made_here, again, strict=True):
            assert replace(theirs, image=ours.image) == ours
            assert torch.equal(theirs.image.pixels(), ours.image.pixels())
    parts = [part for _, part in read_parts(folder)]
    assert sorted(parts) == sorted(part for _, part in found)


def test_files_that_are_there_are_left_as_they_are_and_others_are_refused(tmp_path):
    found = Shapes(train=2, val=1, test=2).make()
    folder = tmp_path / "shapes"
    assert write_samples(found, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not write_samples(found, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(UserError, match=r"shapes: expected no such folder, or train.jsonl as it is made here"):
        write_samples(Shapes(train=3, val=1, test=2).make(), folder)


def test_a_folder_that_could_not_be_written_whole_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_samples(Shapes(train=2, val=1, test=2).make(), tmp_path / "shapes")
    assert list(tmp_path.iterdir()) == []
