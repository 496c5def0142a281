"""Planted conflicts against the pictures that they are made of."""

from pathlib import Path

import numpy as np
import pytest

from datamodules import PlantedConflicts
from datamodules.images import sources
from leanlight.contracts import UserError

SMALL = {"train": 300, "val": 50, "test": 200}


def strips() -> tuple[list[np.ndarray], np.ndarray]:
    """Grey levels of all digits in columns 0-2, 3-4, 5-7, and their classes."""
    raw = sources.load("digits", "nowhere")
    images = np.concatenate([raw.train[0], raw.test[0]])[:, 0] / 255
    pieces = [images[:, :, columns].reshape(len(images), -1) for columns in ([0, 1, 2], [3, 4], [5, 6, 7])]
    return pieces, np.concatenate([raw.train[1], raw.test[1]])


def test_every_strip_is_of_a_picture_with_the_class_it_is_said_to_show():
    clips = PlantedConflicts(**SMALL, noise=0.0).make(Path("nowhere"))
    pieces, labels = strips()
    rows = [*range(300), *range(300, 350), *range(1597, 1797)]  # the last pictures are for test
    foreign = np.zeros(len(clips), int)
    for (name, features), piece in zip(clips.features.items(), pieces, strict=True):
        own = (features == piece[rows].astype(np.float32)).all(axis=1)
        foreign += ~own
        assert (clips.unimodal[name] == clips.label)[own].all()
        for clip in np.flatnonzero(~own):
            matches = np.flatnonzero((piece.astype(np.float32) == features[clip]).all(axis=1))
            assert clips.unimodal[name][clip] in labels[matches]
            part = clips.splits["official"][clip]
            assert any(clips.splits["official"][rows.index(m)] == part for m in matches if m in rows)
    assert clips.label.tolist() == labels[rows].tolist()
    assert foreign.max() == 1
    assert np.array_equal(foreign == 1, clips.conflict)
    assert not (np.stack(list(clips.unimodal.values())) == clips.label).all(axis=0)[clips.conflict].any()


def test_conflicts_noise_and_strips_are_as_often_and_as_large_as_asked():
    clips = PlantedConflicts(train=1000, val=0, test=700, conflict=0.4, noise=0.3).make(Path("nowhere"))
    clear = PlantedConflicts(train=1000, val=0, test=700, conflict=0.4, noise=0.0).make(Path("nowhere"))
    assert abs(clips.conflict.mean() - 0.4) < 4 * np.sqrt(0.24 / 1700)
    shares = [(shown != clips.label).mean() for shown in clips.unimodal.values()]
    assert np.allclose(shares, 0.4 / 3, atol=4 * np.sqrt(0.13 * 0.87 / 1700))
    for name, features in clips.features.items():
        noise = features - clear.features[name]
        assert abs(noise.mean()) < 0.01
        assert abs(noise.std() - 0.3) < 0.01
    foreign = clips.unimodal["left"][clips.unimodal["left"] != clips.label]
    assert len(set(foreign.tolist())) == 10  # all classes come


def test_the_same_seed_makes_the_same_clips_and_another_one_others():
    one, same, other = (PlantedConflicts(**SMALL, seed=seed).make(Path("nowhere")) for seed in (0, 0, 1))
    assert all(np.array_equal(one.features[name], same.features[name]) for name in one.features)
    assert not np.array_equal(one.conflict, other.conflict)


def test_without_conflicts_all_strips_agree():
    clips = PlantedConflicts(**SMALL, conflict=0.0).make(Path("nowhere"))
    assert not clips.conflict.any()
    assert PlantedConflicts(**SMALL, conflict=1.0).make(Path("nowhere")).conflict.all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pictures": "mnits"}, "planted.pictures: expected one of digits, mnist, got 'mnits'"),
        ({"train": 0}, "planted.train: expected at least 1, got 0"),
        ({"conflict": 1.5}, "planted.conflict: expected a probability, got 1.5"),
        ({"noise": -1}, "planted.noise: expected a number from 0, got -1"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        PlantedConflicts(**arguments)


def test_more_clips_than_pictures_are_refused():
    with pytest.raises(UserError, match=r"planted.train: .* at most 1,797 in all, .* got 1,897"):
        PlantedConflicts(train=1000).make(Path("nowhere"))
