"""Logs in their publishers' columns against plain Python over the same rows."""

import csv
import datetime
import os
import random
import re
from collections import Counter, defaultdict
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from datamodules import SessionDataModule
from datamodules.sessions import readers
from datamodules.sessions.catalog import SESSIONS
from leanlight.cli.data import main as data_command
from leanlight.contracts import MissingExtraError, UserError

pytest.importorskip("pyarrow")
DAY = 86_400
START = datetime.datetime(2014, 6, 1, tzinfo=datetime.UTC)


def made_clicks(users: int, seed: int = 0, by_day: bool = False) -> list[tuple[str, str, int]]:
    """(user, item, seconds since START), users interleaved, popular and rare items."""
    draw, rows = random.Random(seed), []
    for user in range(users):
        time = draw.randrange(20 * DAY)
        for _ in range(draw.choice([1, 2, 3, 5, 9])):
            rows.append((f"{700 + user}", f"{1000 + int(draw.paretovariate(0.8)) % 60}", time))
            time += draw.choice([DAY, 2 * DAY]) * draw.randrange(2) if by_day else draw.choice([30, 400, 3600, 40_000])
    draw.shuffle(rows)
    return rows


def write(path: Path, header: list[str] | None, rows, delimiter: str = ",", encoding: str = "utf8") -> None:
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([header, *rows] if header else rows)


def by_hand(clicks, gap=None, least=2, rare=5, most=None, days=7.0, cut=False, first=None):
    """The published steps over (session or user, item, time, order) rows: names of items of train and test sessions."""
    by_user = defaultdict(list)
    for place, (user, item, time, order) in enumerate(clicks):
        by_user[user].append((order, place, item, time))
    sessions = []
    for rows in by_user.values():
        rows.sort()
        sessions.append([rows[0]])
        for last, row in pairwise(rows):
            if gap is not None and row[3] - last[3] > gap * 3600:
                sessions.append([])
            sessions[-1].append(row)
    dated = [([row[2] for row in rows], max(row[3] for row in rows)) for rows in sessions]
    dated = sorted(dated, key=lambda one: one[1])[:first] if first else dated
    dated = [(items, date) for items, date in dated if len(items) >= least]
    counts = Counter(chain.from_iterable(items for items, _ in dated))
    dated = [([item for item in items if counts[item] >= rare], date) for items, date in dated]
    dated = [(items, date) for items, date in dated if len(items) >= least]
    if most is not None and cut:
        dated = [(items[i : i + most], date) for items, date in dated for i in range(0, len(items), most)]
        dated = [(items, date) for items, date in dated if len(items) >= least]
    elif most is not None:
        dated = [(items, date) for items, date in dated if len(items) <= most]
    last = max(date for _, date in dated)
    dated.sort(key=lambda one: one[1])
    train = [items for items, date in dated if date < last - days * DAY]
    test = [items for items, date in dated if date > last - days * DAY]
    known = set(chain.from_iterable(train))
    test = [[item for item in items if item in known] for items in test]
    return train, [items for items in test if len(items) > 1]


def named(data: SessionDataModule, split) -> list[list[str]]:
    pieces = split.sessions.items.tensor_split(split.sessions.offsets[1:-1])
    return [[data.catalogue.names[item - 1] for item in piece.tolist()] for piece in pieces]


def categories(data: SessionDataModule) -> dict[str, set[str]]:
    found = defaultdict(set)
    for item, category in zip(data.catalogue.item.tolist(), data.catalogue.category.tolist(), strict=True):
        found[data.catalogue.names[item - 1]].add(data.catalogue.categories[category])
    return dict(found)


def check(root: Path, name: str, expected, kinds: dict[str, set[str]], **arguments) -> SessionDataModule:
    data = SessionDataModule(name, root, val_fraction=0, **arguments)
    data.setup()
    train, test = expected
    assert named(data, data.train_split) == train
    assert named(data, data.test_split) == test
    assert min(len(train), len(test)) > 10
    assert data.catalogue.names == tuple(dict.fromkeys(chain.from_iterable(named(data, data.train_split))))
    assert categories(data) == {item: kinds[item] for item in data.catalogue.names}
    return data


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks even of these files, each with its own numbering of ids and its own counts."""
    monkeypatch.setattr(readers, "BLOCK", 2000)
    monkeypatch.setattr(readers, "PAIRS", 50)


def kind_of(item: str) -> str:
    return f"{int(item) % 7 + 1}"


KINDS = {f"{item}": {kind_of(f"{item}")} for item in range(1000, 1060)}


def diginetica(root: Path, header=("sessionId", "userId", "itemId", "timeframe", "eventdate")):
    folder = root / "diginetica"
    folder.mkdir(parents=True)
    clicks = made_clicks(400)
    draw = random.Random(1)
    frames = [draw.randrange(10**6) for _ in clicks]
    days = {user: time // DAY for user, _, time in clicks}
    rows = [
        (user, "NA", item, frame, (START + datetime.timedelta(days[user])).date().isoformat())
        for (user, item, _), frame in zip(clicks, frames, strict=True)
    ]
    write(folder / "train-item-views.csv", list(header), rows, ";")
    products = [(item, kind_of(item)) for item in KINDS]
    write(folder / "product-categories.csv", ["itemId", "categoryId"], [*products, ("5", "9")], ";")
    return [(user, item, days[user] * DAY, frame) for (user, item, _), frame in zip(clicks, frames, strict=True)]


def test_diginetica_orders_a_session_by_timeframe(tmp_path):
    rows = diginetica(tmp_path)
    data = check(tmp_path, "diginetica", by_hand(rows), KINDS)
    assert data.meta.source.endswith("train-item-views.csv")


def test_diginetica_with_the_names_of_published_preprocessing(tmp_path):
    rows = diginetica(tmp_path, ("session_id", "user_id", "item_id", "timeframe", "eventdate"))
    check(tmp_path, "diginetica", by_hand(rows, days=3), KINDS, test_days=3)


def test_tmall_takes_the_clicks_of_a_users_day_as_a_session(tmp_path):
    (tmp_path / "tmall").mkdir()
    header = ["user_id", "item_id", "cat_id", "seller_id", "brand_id", "time_stamp", "action_type"]
    clicks, rows, log = made_clicks(600, by_day=True), [], []
    for place, (user, item, time) in enumerate(clicks):
        day = START + datetime.timedelta(time // DAY)
        action = "2" if place % 11 == 0 else "0"
        rows.append((user, item, kind_of(item), "1", "", f"{day.month}{day.day:02}", action))
        if action == "0":
            log.append((user, item, time // DAY * DAY, time // DAY))
    write(tmp_path / "tmall" / "user_log_format1.csv", header, rows)
    expected = by_hand(log, gap=0, most=6, rare=3, days=4)
    check(tmp_path, "tmall", expected, KINDS, max_session_length=6, min_item_clicks=3, test_days=4)


def retailrocket(root: Path):
    folder = root / "retailrocket"
    folder.mkdir()
    clicks, rows, log = made_clicks(400), [], []
    for place, (user, item, time) in enumerate(clicks):
        event = "addtocart" if place % 9 == 0 else "view"
        rows.append((int((START.timestamp() + time) * 1000) + 7, user, event, item, ""))
        if event == "view":
            log.append((user, item, time, time))
    write(folder / "events.csv", ["timestamp", "visitorid", "event", "itemid", "transactionid"], rows)
    facts = []
    for number, item in enumerate(KINDS):
        facts += [(number, item, "categoryid", kind_of(item))] * 2 + [(number, item, "categoryid", "99")]
        facts += [(number, item, "790", "n1.000 n2.000"), (number, item, "available", "1")]
    random.Random(2).shuffle(facts)
    header = ["timestamp", "itemid", "property", "value"]
    write(folder / "item_properties_part1.csv", header, facts[:100])
    write(folder / "item_properties_part2.csv", header, [*facts[100:], (1, "77", "categoryid", "100")])
    return log


def test_retailrocket_takes_views_and_the_most_frequent_category(tmp_path):
    log = retailrocket(tmp_path)
    check(tmp_path, "retailrocket", by_hand(log, gap=8), KINDS)
    check(tmp_path, "retailrocket", by_hand(log, gap=0.5, rare=2), KINDS, session_gap=0.5, min_item_clicks=2)


def test_sessions_must_be_long_enough_before_and_after_rare_items_go(tmp_path):
    log = retailrocket(tmp_path)
    check(
        tmp_path, "retailrocket", by_hand(log, gap=8, least=3, rare=9), KINDS, min_session_length=3, min_item_clicks=9
    )


def test_sessions_that_are_too_long_are_cut_on_request(tmp_path):
    log = retailrocket(tmp_path)
    expected = by_hand(log, gap=100, most=3, least=3, cut=True)
    check(
        tmp_path,
        "retailrocket",
        expected,
        KINDS,
        session_gap=100,
        max_session_length=3,
        min_session_length=3,
        long_sessions="cut",
    )


def test_the_most_frequent_items_come_before_sessions_are_made(tmp_path):
    log = retailrocket(tmp_path)
    counts = Counter(item for _, item, *_ in log)
    first = {item: place for place, (_, item, *_) in reversed(list(enumerate(log)))}
    kept = sorted(counts, key=lambda item: (-counts[item], first[item]))[:20]
    expected = by_hand([row for row in log if row[1] in kept], gap=8)
    check(tmp_path, "retailrocket", expected, KINDS, max_items=20)


def test_the_first_sessions_are_the_earliest(tmp_path):
    log = retailrocket(tmp_path)
    check(
        tmp_path,
        "retailrocket",
        by_hand(log, gap=8, rare=2, first=400, days=2),
        KINDS,
        first_sessions=400,
        min_item_clicks=2,
        test_days=2,
    )


@pytest.mark.parametrize("header", [None, ["session_id", "timestamp", "item_id", "category"]])
def test_yoochoose_with_and_without_names_of_columns(tmp_path, header):
    (tmp_path / "yoochoose").mkdir()
    clicks, rows = made_clicks(400), []
    for place, (user, item, time) in enumerate(clicks):
        moment = (START + datetime.timedelta(seconds=time, milliseconds=277)).isoformat(timespec="milliseconds")
        rows.append((user, moment.replace("+00:00", "Z"), item, kind_of(item) if place % 3 == 0 else "0"))
    write(tmp_path / "yoochoose" / "yoochoose-clicks.dat", header, rows)
    counted = {item for place, (_, item, _) in enumerate(clicks) if place % 3 == 0}
    log = [(user, item, time, time) for user, item, time in clicks]
    check(tmp_path, "yoochoose", by_hand(log, days=1.5, rare=12), KINDS, test_days=1.5, min_item_clicks=12)
    assert counted <= set(KINDS)


def test_nowplaying_has_artists_for_categories(tmp_path):
    (tmp_path / "nowplaying").mkdir()
    clicks = made_clicks(400)
    rows = [(1, user, item, START.timestamp() + time, kind_of(item)) for user, item, time in clicks]
    write(tmp_path / "nowplaying" / "nowplaying.csv", ["UserId", "SessionId", "ItemId", "Time", "ArtistId"], rows, "\t")
    check(tmp_path, "nowplaying", by_hand([(user, item, time, time) for user, item, time in clicks]), KINDS)


def genres_of(item: str) -> set[str]:
    return {readers.GENRES[int(item) % 18 + 1], readers.GENRES[int(item) % 5 + 1]}


@pytest.mark.parametrize("layout", ["ml-100k", "recbole"])
def test_movielens_has_several_genres_a_film(tmp_path, layout):
    folder = tmp_path / "movielens"
    folder.mkdir()
    clicks = made_clicks(400)
    rows = [(user, item, 3, int(START.timestamp()) + time) for user, item, time in clicks]
    if layout == "ml-100k":
        write(folder / "u.data", None, rows, "\t")
        films = [
            (
                item,
                'Misérables, "Les"',
                "01-Jan-1995",
                "",
                "http://x",
                *(int(g in genres_of(item)) for g in readers.GENRES),
            )
            for item in KINDS
        ]
        text = "\n".join("|".join(map(str, film)) for film in films)
        (folder / "u.item").write_text(text + "\n", encoding="latin1")
    else:
        write(folder / "ml.inter", ["user_id:token", "item_id:token", "rating:float", "timestamp:float"], rows, "\t")
        films = [f'{item}\t"Quoted\t1995\t{" ".join(sorted(genres_of(item)))}' for item in KINDS]
        header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
        (folder / "ml.item").write_text("\n".join([header, *films]) + "\n")
    log = [(user, item, time, time) for user, item, time in clicks]
    check(tmp_path, "movielens", by_hand(log, gap=0.5), {item: genres_of(item) for item in KINDS})


def test_a_prepared_log_is_the_log_until_its_files_change(tmp_path, monkeypatch):
    rows = diginetica(tmp_path)
    before = check(tmp_path, "diginetica", by_hand(rows), KINDS)
    assert data_command(["prepare", "diginetica", "--root", str(tmp_path)]) == 0
    with monkeypatch.context() as patch:
        patch.setitem(readers.READERS, "diginetica", None)
        assert check(tmp_path, "diginetica", by_hand(rows), KINDS).meta == before.meta

    clicks = tmp_path / "diginetica" / "train-item-views.csv"
    clicks.write_text("".join(line for line in clicks.read_text().splitlines(True) if not line.startswith("700;")))
    later = (tmp_path / "diginetica" / "clicks.npz").stat().st_mtime + 1
    os.utime(clicks, (later, later))
    check(tmp_path, "diginetica", by_hand([row for row in rows if row[0] != "700"]), KINDS)


def test_another_npz_in_the_place_of_a_prepared_log_is_refused(tmp_path):
    np.savez(tmp_path / "clicks.npz", session=np.zeros(3))
    with pytest.raises(UserError, match=r"clicks.npz is no log that `leanlight data prepare` wrote \('names'\)"):
        SessionDataModule("diginetica", path=tmp_path).setup()


def test_every_log_of_the_catalogue_has_a_reader():
    assert set(readers.READERS) == {name for name, info in SESSIONS.items() if info.files}


# ---- what is wrong with a log ----


def spoil(folder: Path, name: str, change) -> None:
    path = folder / name
    path.write_text(change(path.read_text()))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "train-item-views.csv",
            lambda t: t.replace("timeframe", "time"),
            "expected a column 'timeframe', got 'sessionId'",
        ),
        (
            "train-item-views.csv",
            lambda t: re.sub("2014-06-1", "2014-16-1", t, count=1),
            "eventdate: expected a day like",
        ),
        ("train-item-views.csv", lambda t: re.sub(r";\d+;2014", ";soon;2014", t, count=1), "timeframe: .* got 'soon'"),
        ("train-item-views.csv", lambda t: re.sub(r";\d+;2014", ";;2014", t, count=1), "timeframe: .* got ''"),
        ("train-item-views.csv", lambda t: re.sub(r"NA;\d+", "NA;", t, count=1), "itemId: expected an id in every row"),
        ("train-item-views.csv", lambda t: t[:-9], "cannot be read|expected a day"),
        ("train-item-views.csv", lambda t: "", "is empty"),
        ("train-item-views.csv", lambda t: t.split("\n")[0] + "\n", "holds no row"),
        ("product-categories.csv", lambda t: t.replace("categoryId", "kind"), "expected a column 'categoryId'"),
        (
            "product-categories.csv",
            lambda t: t.replace("\n1001;", "\n1;"),
            "without_category: .* have none, such as '1001'",
        ),
    ],
)
def test_a_bad_log_is_one_line(tmp_path, name, change, message):
    diginetica(tmp_path)
    spoil(tmp_path / "diginetica", name, change)
    with pytest.raises(UserError, match=message) as caught:
        SessionDataModule("diginetica", tmp_path).setup()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stamp", ["1131", "1301", "1100", "-611"])
def test_days_that_do_not_exist_are_refused(tmp_path, stamp):
    header = "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type\n"
    (tmp_path / "user_log_format1.csv").write_text(f"{header}1,2,3,4,5,829,0\n1,2,3,4,5,{stamp},0\n")
    with pytest.raises(UserError, match=f"time_stamp: expected month and day like 1111, got {stamp}"):
        readers.tmall(tmp_path)


def test_times_that_are_no_numbers_are_refused(tmp_path):
    (tmp_path / "u.data").write_text("1\t2\t3\tnan\n")
    with pytest.raises(UserError, match="timestamp: expected seconds, got nan"):
        readers.movielens(tmp_path)


def test_a_file_that_is_missing_is_named(tmp_path):
    diginetica(tmp_path)
    (tmp_path / "diginetica" / "product-categories.csv").unlink()
    with pytest.raises(UserError, match=r"product-categories.csv is missing"):
        SessionDataModule("diginetica", path=tmp_path / "diginetica").setup()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_item_clicks": 10**6}, "min_item_clicks: expected a lower threshold than 1000000"),
        ({"test_days": 100}, "test_days: 100 leaves no training session of"),
        ({"test_days": 0}, "test_days: 0 leaves no test session of"),
    ],
)
def test_parts_that_are_empty_after_filtering_are_one_line(tmp_path, arguments, message):
    diginetica(tmp_path)
    with pytest.raises(UserError, match=message):
        SessionDataModule("diginetica", tmp_path, **arguments).setup()


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    diginetica(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"leanlight\[recsys\]"):
        SessionDataModule("diginetica", tmp_path).setup()
