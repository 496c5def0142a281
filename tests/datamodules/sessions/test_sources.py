"""Preprocessed pickles: whole sessions are found again; hostile and foreign ones are refused."""

import os
import pickle
import random
from pathlib import Path

import pytest

from datamodules import SessionDataModule
from datamodules.sessions import sources
from leanlight.contracts import UserError


def made_sessions(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randint(1, 5) for _ in range(draw.randint(2, 6))] for _ in range(count)]


def augmented(sessions: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Beginnings and next items in the order of the published preprocessing."""
    pairs = [(session[:-i], session[-i]) for session in sessions for i in range(1, len(session))]
    return [prefix for prefix, _ in pairs], [target for _, target in pairs]


def dump(path: Path, content: object) -> None:
    path.write_bytes(pickle.dumps(content))


def as_lists(part) -> list[list[int]]:
    return [(part.items[a:b] + 1).tolist() for a, b in zip(part.offsets[:-1], part.offsets[1:], strict=True)]


@pytest.mark.parametrize("whole", [True, False])
def test_sessions_are_found_again_in_their_beginnings(tmp_path, whole):
    train, test = made_sessions(300, 0), made_sessions(80, 1)
    if whole:
        dump(tmp_path / "all_train_seq.txt", train)
    else:
        dump(tmp_path / "train.txt", augmented(train))
    dump(tmp_path / "test.txt", augmented(test))
    raw = sources.load("pickles", tmp_path, tmp_path)
    assert as_lists(raw.train) == train
    assert as_lists(raw.test) == test
    data = SessionDataModule("pickles", path=tmp_path, val_fraction=0)
    data.setup()
    assert data.meta.counts["train"] == len(augmented(train)[0])
    assert (data.meta.num_items, data.meta.num_categories) == (5, 0)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            [Hostile()],
            augmented([[1, 2]]),
            "all_train_seq.txt was refused: UnpicklingError posix.mkdir is not admitted",
        ),
        ({"a": 1}, augmented([[1, 2]]), "all_train_seq.txt was refused: expected a list, got dict"),
        ([[1, "2"]], augmented([[1, 2]]), "all_train_seq.txt: expected items as numbers from 1, got '2'"),
        ([[1, 0]], augmented([[1, 2]]), "all_train_seq.txt: expected items as numbers from 1, got 0"),
        ([[1, 2.5]], augmented([[1, 2]]), "got 2.5"),
        ([1, 2], augmented([[1, 2]]), "expected a list of sessions, each a list of items"),
        ([[1, 2]], [[1]], "test.txt: expected two lists"),
        ([[1, 2]], ([[1], [2]], [2]), "test.txt: expected a next item a beginning, got 1 for 2"),
        ([[1, 2]], ([[1, 2, 3], [4, 5]], [4, 1]), "test.txt: expected every beginning of a session"),
        ([[1, 2]], ([[1, 2, 3], [1, 2]], [4, 3]), "test.txt: expected every beginning of a session"),
    ],
)
def test_other_pickles_are_refused_in_one_line(tmp_path, monkeypatch, train, test, message):
    monkeypatch.chdir(tmp_path)
    dump(tmp_path / "all_train_seq.txt", train)
    dump(tmp_path / "test.txt", test)
    with pytest.raises(UserError, match=message) as caught:
        sources.load("pickles", tmp_path, tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "hostile").exists()


def test_a_truncated_or_absent_pickle_is_named(tmp_path):
    dump(tmp_path / "test.txt", augmented(made_sessions(3, 0)))
    with pytest.raises(UserError, match=r"train.txt was refused: FileNotFoundError"):
        sources.load("pickles", tmp_path, tmp_path)
    (tmp_path / "train.txt").write_bytes(pickle.dumps(augmented(made_sessions(30, 0)))[:-40])
    with pytest.raises(UserError, match=r"train.txt was refused"):
        sources.load("pickles", tmp_path, tmp_path)
