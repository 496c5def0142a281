"""Facts about the sets of sessions, known without loading anything."""

from __future__ import annotations

from dataclasses import dataclass

from datamodules.catalog import entry


@dataclass(frozen=True)
class SessionSetInfo:
    """What is known of a set of sessions before it is loaded.

    Args:
        name: by which `SessionDataModule` and ``leanlight data`` know it.
        title: its full name.
        licence: under which it may be used.
        origin: who made it.
        size_mb: what its files take in MB.
        get: how to come by it.
        files: of the raw log, in ``ROOT/<name>``; the first holds the clicks. None: it is no log.
        category: column that holds an item's category.
        session_gap: hours without a click after which a log starts a new session; None: the log has sessions.
        by_path: whether its files are the user's, at a place that ``path`` names.
    """

    name: str
    title: str
    licence: str
    origin: str
    size_mb: float
    get: str
    files: tuple[str, ...] = ()
    category: str = ""
    session_gap: float | None = None
    by_path: bool = False

    @property
    def facts(self) -> str:
        """One line on its kind, for ``leanlight data list``."""
        if self.by_path or not self.files:
            return "sessions of clicks"
        gap = self.session_gap
        cut = "" if gap is None else ", a session a day" if gap == 0 else f", a session ends after {gap:g} h"
        return f"click log, categories: {self.category}{cut}"


_ALL = [
    SessionSetInfo(
        name="planted",
        title="Made sessions with 12 planted intents: 96 categories, 2,400 items, 3,000 + 500 sessions",
        licence="none needed",
        origin="made by leanlight",
        size_mb=0,
        get="always there",
    ),
    SessionSetInfo(
        name="diginetica",
        title="Diginetica, clicks in a shop",
        licence="terms of CIKM Cup 2016",
        origin="CIKM Cup 2016, track 2: personalised e-commerce search",
        size_mb=90,
        get="get train-item-views.csv and product-categories.csv of CIKM Cup 2016, put them into ROOT/diginetica",
        files=("train-item-views.csv", "product-categories.csv"),
        category="categoryId",
    ),
    SessionSetInfo(
        name="tmall",
        title="Tmall, clicks in a marketplace",
        licence="terms of Tianchi",
        origin="IJCAI-15 repeat buyers competition; Tianchi",
        size_mb=1900,
        get="get user_log_format1.csv of the IJCAI-15 competition from Tianchi, put it into ROOT/tmall",
        files=("user_log_format1.csv",),
        category="cat_id",
        session_gap=0,  # the log has days only
    ),
    SessionSetInfo(
        name="retailrocket",
        title="RetailRocket, views in a shop",
        licence="CC BY-NC-SA 4.0",
        origin="Retail Rocket; Kaggle",
        size_mb=990,
        get="get events.csv and item_properties_part1.csv and _part2.csv from Kaggle, put them into ROOT/retailrocket",
        files=("events.csv", "item_properties_part1.csv", "item_properties_part2.csv"),
        category="categoryid",
        session_gap=8,
    ),
    SessionSetInfo(
        name="yoochoose",
        title="Yoochoose, clicks in shops",
        licence="CC BY-NC-ND 4.0",
        origin="RecSys Challenge 2015",
        size_mb=1500,
        get="get yoochoose-clicks.dat of RecSys Challenge 2015, put it into ROOT/yoochoose",
        files=("yoochoose-clicks.dat",),
        category="category",
    ),
    SessionSetInfo(
        name="nowplaying",
        title="#nowplaying, music that people tweet about",
        licence="terms of its authors",
        origin="Zangerle, Pichl, Gassler and Specht 2014",
        size_mb=60,
        get="get nowplaying.csv with SessionId, ItemId, Time and ArtistId, put it into ROOT/nowplaying",
        files=("nowplaying.csv",),
        category="ArtistId",
    ),
    SessionSetInfo(
        name="movielens",
        title="MovieLens, ratings of films: u.data and u.item, or RecBole's .inter and .item",
        licence="GroupLens: research use, no redistribution",
        origin="GroupLens; Harper and Konstan 2015",
        size_mb=5,
        get="get ml-100k.zip from GroupLens, unpack u.data and u.item into ROOT/movielens",
        files=("u.data", "u.item"),
        category="genres, several an item",
        session_gap=0.5,
    ),
    SessionSetInfo(
        name="npz",
        title="Your own sessions: PATH with train_items, train_offsets, test_items, test_offsets, item_category",
        licence="yours",
        origin="your file",
        size_mb=0,
        get="--data.path FILE.npz",
        by_path=True,
    ),
    SessionSetInfo(
        name="pickles",
        title="Preprocessed files of SR-GNN and GCE-GNN: PATH/all_train_seq.txt or train.txt, and PATH/test.txt",
        licence="that of each set",
        origin="your files",
        size_mb=0,
        get="--data.path DIR",
        by_path=True,
    ),
]

SESSIONS: dict[str, SessionSetInfo] = {info.name: info for info in _ALL}


def describe(name: str) -> SessionSetInfo:
    """The entry called `name`; UserError with the nearest name if there is none."""
    return entry(name, SESSIONS)
