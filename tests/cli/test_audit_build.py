"""`leanlight audit --build` makes labels of what judges agree on, and leaves the rest to people."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_cases import ScriptedJudge, write_samples
from PIL import Image

from datamodules.safety.readers import read_parts, read_samples
from leanlight.cli import audit
from leanlight.contracts import UserError
from leanlight.contracts.safety import SafetySample, Verdict
from leanlight.results.audit_build import difference_hash, like_pictures


def draw(path: Path, seed: int, size: int = 48, **how: Any) -> str:
    """A picture of coarse random spots."""
    spots = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    Image.fromarray(spots).resize((size, size), Image.Resampling.BILINEAR).save(path, **how)
    return path.name


def by_word(reason: str, kind: str, *words: str, fields: tuple[str, ...] = ("response",)) -> ScriptedJudge:
    """A judge to whom answers with one of some words are harmful."""

    def verdict(sample: SafetySample) -> Verdict:
        harmful = any(word in sample.response for word in words)
        return Verdict(dict.fromkeys(fields, harmful), categories=(kind,) if harmful else (), explanation=reason)

    return ScriptedJudge(reason, verdict, fields)


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Audit a file with scripted judges and build data of it; the folder."""

    def call(data: Path, *judges: ScriptedJudge, options: tuple[str, ...] = ()) -> Path:
        by_name = {f"{judge.name}{number}": judge for number, judge in enumerate(judges)}
        monkeypatch.setattr(audit, "judge_maker", lambda name: lambda samples: by_name[name])
        named = [word for name in by_name for word in ("--judge", name)]
        where = ["--output", str(tmp_path / "out"), "--build", str(tmp_path / "built")]
        assert audit.main(["--data", str(data), *named, *where, *options]) == 0
        return tmp_path / "built"

    return call


def told(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "build.json").read_text()))


def test_what_most_judges_say_becomes_the_label_with_kind_and_reason_of_one_that_agrees(
    build: Any, tmp_path: Path, capsys: Any
) -> None:
    data = write_samples(tmp_path / "data.jsonl", ["red", "red blue", "green", "blue"])
    judges = by_word("a", "Fraud", "red"), by_word("b", "Bias", "blue"), by_word("c", "Bias", "red", "blue")
    folder = build(data, *judges)
    found = {sample.id: sample for sample, _ in read_parts(folder / "data")}
    found = {name.rpartition(":")[2]: sample for name, sample in found.items()}
    assert {name: sample.labels["response"] for name, sample in found.items()} == {
        "s0": True,
        "s1": True,
        "s2": False,
        "s3": True,
    }
    # s0: a and c agree, who name two kinds; s1: all; s3: b and c.
    assert [found[name].categories for name in ("s1", "s2", "s3")] == [("Bias",), (), ("Bias",)]
    assert [found[name].explanation for name in ("s0", "s2", "s3")] == ["a", "a", "b"]
    assert told(folder)["queue"] == 0
    assert not (folder / "queue").exists()
    assert "0 in the queue" in capsys.readouterr().out


def test_ties_and_too_little_agreement_go_to_people_with_the_votes(build: Any, tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data.jsonl", ["red", "red blue", "green", "blue"])
    judges = by_word("a", "Fraud", "red"), by_word("b", "Bias", "blue")
    folder = build(data, *judges)
    rows = [json.loads(line) for line in (folder / "queue" / "queue.jsonl").read_text().splitlines()]
    assert [(row["id"], row["open"], row["votes"]) for row in rows] == [
        (name, ["response"], {"response": {"harmful": 1, "benign": 1}}) for name in ("s0", "s3")
    ]
    assert all("response_label" not in row for row in rows)
    assert sum(told(folder)["parts"].values()) == 2
    assert [sample.id for sample in read_samples(folder / "queue")] == ["s0", "s3"]


def test_a_share_that_must_agree_moves_samples_to_the_queue(build: Any, tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data.jsonl", ["red", "red blue", "green", "blue"])
    judges = by_word("a", "Fraud", "red"), by_word("b", "Bias", "blue"), by_word("c", "Bias", "red", "blue")
    folder = build(data, *judges, options=("--agree", "0.7"))
    assert told(folder)["queue"] == 2  # two of three are not enough
    assert sum(told(folder)["parts"].values()) == 2


def test_a_verdict_that_is_missing_supports_no_label(build: Any, tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data.jsonl", ["red", "green"])
    silent = ScriptedJudge("silent", lambda sample: Verdict({"response": None}, failure="down"), ("response",))
    folder = build(data, by_word("a", "Fraud", "red"), silent)
    assert told(folder)["queue"] == 2


def test_pictures_are_judged_where_there_are_some(build: Any, tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data.jsonl", ["red", "blue"], image=[draw(tmp_path / "a.png", 1), None])
    fields = ("image", "response")
    folder = build(data, *(by_word(name, "Fraud", "red", fields=fields) for name in ("a", "b")))
    labels = {sample.id.rpartition(":")[2]: sample.labels for sample, _ in read_parts(folder / "data")}
    assert labels == {"s0": {"image": True, "response": True}, "s1": {"response": False}}


def test_near_duplicates_are_left_out_and_like_pictures_stay_in_one_part(build: Any, tmp_path: Path) -> None:
    names = [draw(tmp_path / f"{n}.png", n) for n in range(30)]
    again = draw(tmp_path / "again.jpg", 0, size=80, quality=60)
    answers = [f"answer {n}" for n in range(30)]
    data = write_samples(
        tmp_path / "data.jsonl",
        [*answers, "ANSWER  0", *(f"other {n}" for n in range(30))],
        image=[*names, again, *names[:-1], again],
        instruction=["what is it"] * 61,
    )
    folder = build(data, by_word("a", "Fraud", "answer"), by_word("b", "Fraud", "answer"))
    assert told(folder)["duplicates"] == {"s30": "s0"}
    parts: dict[bytes, set[str | None]] = {}
    for sample, part in read_parts(folder / "data"):
        assert sample.image is not None
        parts.setdefault(difference_hash(sample.image).tobytes(), set()).add(part)
    assert all(len(own) == 1 for own in parts.values())
    counts = told(folder)["parts"]
    assert sum(counts.values()) == 60
    assert counts["train"] == pytest.approx(48, abs=4)
    assert min(counts.values()) > 0


def test_hashes_find_the_same_picture_in_another_size_and_coding_and_no_other(tmp_path: Path) -> None:
    hashes = []
    for seed in range(20):
        draw(tmp_path / "a.png", seed)
        draw(tmp_path / "b.jpg", seed, size=120, quality=50)
        data = write_samples(tmp_path / "data.jsonl", ["x", "y"], image=["a.png", "b.jpg"])
        hashes += [difference_hash(sample.image) for sample in read_samples(data) if sample.image]
    groups = like_pictures([*hashes, None])
    assert groups[:40:2] == groups[1:40:2]
    assert len(set(groups[:40])) == 20
    assert groups[40] == ""
    assert like_pictures([None]) == [""]


def test_likeness_goes_by_way_of_others() -> None:
    chain = [np.uint64((1 << bits) - 1) for bits in (0, 4, 8, 20)]
    groups = like_pictures(chain)
    assert groups[0] == groups[1] == groups[2] != groups[3]


def test_a_picture_that_cannot_be_read_is_left_out_and_named(build: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    data = write_samples(tmp_path / "data.jsonl", ["red"] * 2, image=[draw(tmp_path / "a.png", 1), "bad.png"])
    folder = build(data, by_word("a", "Fraud", "red"), by_word("b", "Fraud", "red"))
    assert told(folder)["unreadable"] == ["s1"]
    assert sum(told(folder)["parts"].values()) == 1


def test_built_again_it_is_as_it_was_and_other_data_are_refused(build: Any, tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data.jsonl", ["red", "green"])
    judges = by_word("a", "Fraud", "red"), by_word("b", "Fraud", "red")
    folder = build(data, *judges)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    build(data, *judges)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    write_samples(data, ["red", "green", "blue"])
    with pytest.raises(UserError, match="move it away"):
        build(data, *judges)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge", "keyword", "--build", "x"], "--build: expected two judges at least"),
        (["--judge", "keyword", "--agree", "1"], "--agree: expected a share in [0.5, 1), got '1'"),
    ],
)
def test_a_wrong_input_is_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        audit.main(["--data", str(tmp_path / "data.jsonl"), *words])
    assert message in str(error.value)
