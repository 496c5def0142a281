"""Splits, cases and batches against plain loops over lists."""

import os
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import Planted, SessionDataModule
from datamodules.loaders import eval_blocks
from leanlight.contracts import ResumablePrediction, SessionData, UserError

TRAIN = [[5, 2, 5], [3, 2], [4, 4, 2, 7], [2, 3], [6, 5, 2], [7, 2, 3, 3, 5], [4, 5], [2, 7]]
TEST = [[2, 9, 3], [9, 2], [5, 4, 9, 9, 7]]


def write(path: Path, train=TRAIN, test=TEST, category=(0, 1, 1, 2, 2, 3, 3, 1, 1, 1)) -> str:
    arrays = {"item_category": np.array(category, np.int32)} if category is not None else {}
    for name, sessions in (("train", train), ("test", test)):
        arrays[f"{name}_items"] = np.array(list(chain.from_iterable(sessions)), np.int32)
        arrays[f"{name}_offsets"] = np.cumsum([0, *map(len, sessions)])
    np.savez(path / "made.npz", **arrays)
    return str(path / "made.npz")


def ready(**arguments) -> SessionDataModule:
    data = SessionDataModule(**arguments)
    data.setup()
    return data


def as_lists(sessions) -> list[list[int]]:
    return [piece.tolist() for piece in sessions.items.tensor_split(sessions.offsets[1:-1])]


def cases(sessions: list[list[int]]) -> list[tuple[list[int], int]]:
    return [(session[:end], session[end]) for session in sessions for end in range(1, len(session))]


def as_cases(loader) -> list[tuple[int, list[int], int]]:
    found = []
    for batch in loader:
        assert batch.items.shape[1] == batch.length.max()
        for row, length, target, index in zip(batch.items, batch.length, batch.target, batch.index, strict=True):
            assert not row[length:].any()
            found.append((int(index), row[:length].tolist(), int(target)))
    return found


def test_items_are_numbered_as_they_first_come_and_unknown_ones_leave_the_test(tmp_path):
    data = ready(dataset="npz", path=write(tmp_path), val_fraction=0)
    assert data.catalogue.names == ("5", "2", "3", "4", "7", "6")
    assert as_lists(data.train_sessions)[:3] == [[1, 2, 1], [3, 2], [4, 4, 2, 5]]
    assert as_lists(data.test_split.sessions) == [[2, 3], [1, 4, 5]]
    assert as_cases(data.test_dataloader()) == [
        (number, *case) for number, case in enumerate(cases([[2, 3], [1, 4, 5]]))
    ]
    assert data.val_dataloader() == []


def test_catalogue_counts_training_clicks_and_breaks_ties_by_number(tmp_path):
    data = ready(dataset="npz", path=write(tmp_path), val_fraction=0, head_share=0.5)
    clicks = Counter(chain.from_iterable(as_lists(data.train_sessions)))
    assert data.catalogue.clicks.tolist() == [0, *(clicks[item] for item in range(1, 7))]
    ranked = sorted(range(1, 7), key=lambda item: (-clicks[item], item))
    assert data.catalogue.head.nonzero().flatten().tolist() == sorted(ranked[:3])
    pairs = dict(zip(data.catalogue.item.tolist(), data.catalogue.category.tolist(), strict=True))
    assert [data.catalogue.categories[pairs[item]] for item in range(1, 7)] == ["3", "1", "2", "2", "1", "3"]
    assert (data.meta.num_items, data.meta.num_categories, data.meta.num_head, data.meta.max_length) == (6, 3, 3, 4)
    assert data.meta.counts == {"train": 15, "val": 0, "test": 3}


def test_a_head_by_targets_ends_between_counts(tmp_path):
    data = ready(dataset="npz", path=write(tmp_path), val_fraction=0, head_share=0.4, head_rule="targets")
    targets = Counter(target for _, target in cases(as_lists(data.train_sessions)))
    least = sorted(targets.values(), reverse=True)[int(0.4 * len(targets))]
    expected = [item for item in range(1, 7) if targets[item] >= least]
    assert data.catalogue.head.nonzero().flatten().tolist() == expected
    assert len(expected) > int(0.4 * len(targets))


def test_an_epoch_has_every_case_once_and_goes_on_in_its_middle():
    data = ready(planted=Planted(train_sessions=60, test_sessions=20), batch_size=7)
    found = as_cases(data.train_dataloader())
    expected = [(number, *case) for number, case in enumerate(cases(as_lists(data.train_sessions)))]
    assert sorted(found) == expected
    assert found != expected

    loader = data.train_dataloader()
    batches = iter(loader)
    first = [next(batches).index.tolist() for _ in range(3)]
    resumed = data.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    rest = [batch.index.tolist() for batch in resumed]
    assert list(chain.from_iterable(first + rest)) == [index for index, *_ in found]


def test_validation_is_held_out_of_the_training_sessions_by_split_seed():
    planted = Planted(train_sessions=400, test_sessions=20, categories=2, items=5)
    whole, one, same, other = (
        ready(planted=planted, val_fraction=fraction, split_seed=seed, seed=run)
        for fraction, seed, run in ((0, 0, 0), (0.25, 0, 0), (0.25, 0, 1), (0.25, 1, 0))
    )

    def named(data, split):
        return [tuple(data.catalogue.names[item - 1] for item in session) for session in as_lists(split.sessions)]

    both = named(one, one.train_split) + named(one, one.val_split)
    assert Counter(both) == Counter(named(whole, whole.train_split))
    assert len(one.val_split.sessions) == 100
    assert one.meta.fingerprint == same.meta.fingerprint != other.meta.fingerprint
    assert [b.index.tolist() for b in one.train_dataloader()] != [b.index.tolist() for b in same.train_dataloader()]


@pytest.mark.parametrize("sample", ["recent", "random"])
def test_samples_are_whole_sessions_and_larger_ones_hold_smaller_ones(sample):
    def sessions(**arguments):
        data = ready(val_fraction=0, sample=sample, **arguments)
        names = data.catalogue.names
        return [tuple(names[item - 1] for item in session) for session in as_lists(data.train_sessions)]

    whole, half, tenth = sessions(), sessions(sample_fraction=0.5), sessions(sample_fraction=0.1)
    capped = sessions(train_cases=1000)
    assert (len(half), len(tenth)) == (1500, 300)
    assert not Counter(tenth) - Counter(half)
    assert not Counter(half) - Counter(whole)
    assert 990 < sum(len(session) - 1 for session in capped) <= 1000
    assert (half == whole[-1500:]) == (sample == "recent")


def test_prediction_goes_through_its_part_and_leaves_out_what_is_done():
    data = ready(predict_split="val", planted=Planted(train_sessions=100), eval_batch_size=8)
    assert isinstance(data, ResumablePrediction)
    assert isinstance(data, SessionData)
    whole = as_cases(data.predict_dataloader())
    assert [index for index, *_ in whole] == list(range(data.meta.counts["val"]))
    data.skip_predicted(torch.arange(0, len(whole), 3))
    assert as_cases(data.predict_dataloader()) == [case for case in whole if case[0] % 3]


def test_two_processes_share_the_cases_of_a_split():
    data = ready(planted=Planted(train_sessions=50, test_sessions=21))
    split = data.test_split
    shares = [[split.batch(block) for block in eval_blocks(len(split), 16, rank, 2)] for rank in (0, 1)]
    assert as_cases(chain(*shares)) == as_cases(data.test_dataloader())


def test_the_published_files_have_their_published_sizes():
    root = os.environ.get("LEANLIGHT_DATA", "")
    if not (Path(root) / "sessions").is_dir():
        pytest.skip("needs LEANLIGHT_DATA with sessions/<name>.npz")
    for name, items, categories, sessions, train, test, longest, share, tail in (
        (
            "tmall",
            40_727,
            711,
            65_286,
            351_268,
            25_898,
            40,
            51.5,
            60.0,
        ),  # 59.3 where the later of equal items are in the head
        ("diginetica", 43_097, 995, 186_670, 719_470, 60_858, 70, 62.0, 44.4),
        ("nowplaying", 60_416, 11_461, 128_077, 825_304, 89_824, 30, 63.3, 49.4),
    ):
        data = ready(dataset=name, root=root, val_fraction=0)
        catalogue, meta = data.catalogue, data.meta
        assert (meta.num_items, meta.num_categories, len(data.train_sessions)) == (items, categories, sessions)
        assert meta.counts == {"train": train, "val": 0, "test": test}
        assert data.train_sessions.offsets.diff().max() == longest
        clicks = catalogue.clicks
        assert 100 * clicks[catalogue.head].sum() / clicks.sum() == pytest.approx(share, abs=0.05)
        in_tail = ~catalogue.head[data.test_split.batch(torch.arange(test)).target]
        assert 100 * in_tail.double().mean() == pytest.approx(tail, abs=0.05)
        assert catalogue.names == tuple(map(str, range(1, items + 1)))  # the files' own numbers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "diginetika"}, "dataset: expected one of .*did you mean 'diginetica'"),
        ({"dataset": "npz"}, "path: expected the place of npz data, got none"),
        ({"dataset": "planted", "path": "x"}, "path: expected none with dataset planted"),
        ({"dataset": "npz", "path": "x", "planted": Planted()}, "planted: expected none with dataset 'npz'"),
        ({"min_session_length": 1}, "min_session_length: expected at least 2, got 1"),
        ({"sample": "latest"}, "sample: expected one of recent, random, got 'latest'"),
        ({"head_share": 1.0}, r"head_share: expected a number in \(0, 1\), got 1.0"),
        ({"test_days": -1}, "test_days: expected a number from 0, got -1"),
        ({"val_fraction": 1.0}, "val_fraction: expected a number in"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        SessionDataModule(**arguments)


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({"category": (0, 1, 1, 2, 2, 3, 3, 0, 0, 0)}, {}, "without_category: .* 1 have none, such as '7'"),
        ({"category": (0, 1, 1)}, {}, "item_category: expected integers for items 0 to 9"),
        ({"train": [[1, 2], [0, 3]]}, {}, "train_items: expected items from 1, got 0"),
        ({"test": [[8, 9], [9, 9]]}, {}, "dataset: no session of the test part is left, of 2"),
        ({"test": [[2]]}, {}, "dataset: the test part of .*made.npz has no session of two clicks"),
        ({}, {"val_fraction": 0.01}, "val_fraction: 0.01 of 8 sessions leaves none"),
        ({}, {"min_item_clicks": 3}, "min_item_clicks: expected its default 5 with sessions that come in parts"),
    ],
)
def test_bad_files_are_one_line(tmp_path, files, arguments, message):
    data = SessionDataModule(dataset="npz", path=write(tmp_path, **files), **arguments)
    with pytest.raises(UserError, match=message) as caught:
        data.setup()
    assert "\n" not in str(caught.value)


def test_a_cap_below_the_shortest_session_is_refused():
    with pytest.raises(UserError, match="train_cases: expected room for a whole session, got 1"):
        ready(train_cases=1)


def test_items_without_category_are_dropped_or_kept_on_request(tmp_path):
    category = (0, 1, 1, 2, 2, 0, 3, 1, 1, 1)  # item 5 has none
    path = write(tmp_path, category=category)
    dropped = ready(dataset="npz", path=path, val_fraction=0, without_category="drop")
    kept = ready(dataset="npz", path=path, val_fraction=0, without_category="keep")
    bare = [[item for item in session if item != 5] for session in TRAIN]
    names = dropped.catalogue.names
    assert [[int(names[item - 1]) for item in session] for session in as_lists(dropped.train_sessions)] == [
        session for session in bare if len(session) > 1
    ]
    assert "5" in kept.catalogue.names
    assert kept.catalogue.names.index("5") + 1 not in kept.catalogue.item
    assert len(kept.train_sessions) == len(TRAIN)


def test_data_without_categories_has_none(tmp_path):
    data = ready(dataset="npz", path=write(tmp_path, category=None), val_fraction=0)
    assert data.meta.num_categories == 0 == len(data.catalogue.item)


def test_absent_data_names_the_places_and_the_help(tmp_path):
    with pytest.raises(UserError, match=r"tried: .*sessions/tmall.npz.*; to get it: get user_log_format1.csv"):
        SessionDataModule(dataset="tmall", root=tmp_path).ensure_available()
