"""`leanlight audit --compare` says what has changed between two audits, and how sure the change of a share is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_cases import ScriptedJudge, says, write_samples
from html_page import Page
from scipy.stats import bootstrap

from leanlight.cli import audit
from leanlight.contracts import UserError
from leanlight.contracts.safety import SAFETY_FIELDS, SafetySample, Verdict
from leanlight.results.audit import BENIGN, HARMFUL, MISSING
from leanlight.results.audit_compare import VOTE, paired

ANSWERS = ["red", "green", "red", "blue", "green", "green"]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Audit answers with scripted judges into a folder; the folder."""

    def call(name: str, answers: list[str], *judges: ScriptedJudge, **columns: Any) -> Path:
        data = write_samples(tmp_path / f"{name}.jsonl", answers, **columns)
        by_name = {f"{judge.name}{number}": judge for number, judge in enumerate(judges)}
        monkeypatch.setattr(audit, "judge_maker", lambda name: lambda samples: by_name[name])
        named = [word for one in by_name for word in ("--judge", one)]
        assert audit.main(["--data", str(data), *named, "--output", str(tmp_path / name)]) == 0
        return tmp_path / name

    return call


def compared(tmp_path: Path, *folders: Path) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """The summary, the changes and the page of two audits beside each other."""
    out = tmp_path / "compared"
    assert audit.main(["--compare", *map(str, folders), "--output", str(out)]) == 0
    changes = [json.loads(line) for line in (out / "changes.jsonl").read_text().splitlines()]
    return json.loads((out / "compare.json").read_text()), changes, (out / "compare.html").read_text()


def figure(summary: dict[str, Any], judge: str, field: str) -> dict[str, Any]:
    (found,) = [one for one in summary["figures"] if (one["judge"], one["field"]) == (judge, field)]
    return dict(found)


def test_another_judge_on_the_same_samples_changes_verdicts(ask: Any, tmp_path: Path, capsys: Any) -> None:
    before = ask("before", ANSWERS, ScriptedJudge("one", says("red"), fingerprint="a" * 64))
    after = ask("after", ANSWERS, ScriptedJudge("one", says("green"), ("response",), fingerprint="b" * 64))
    summary, changes, page = compared(tmp_path, before, after)
    assert summary["samples"] == {"both": 6, "rewritten": 0, "new": [], "absent": []}
    assert summary["judges"] == {"changed": ["one"], "before_only": [], "after_only": []}
    assert {(one["judge"], one["field"]) for one in summary["figures"]} == {("one", "response")}  # the vote is his
    found = figure(summary, "one", "response")
    assert (found["before"], found["after"], found["to_harmful"], found["to_benign"]) == (2 / 6, 3 / 6, 3, 2)
    assert found["agreement"] == pytest.approx(1 / 6)
    assert found["difference"] == pytest.approx(1 / 6)
    assert found["low"] < 0 < found["high"]
    turned = {(one["id"], one["before"], one["after"]) for one in changes if one["judge"] == "one"}
    assert turned == {
        *((f"s{n}", "harmful", "benign") for n in (0, 2)),
        *((f"s{n}", "benign", "harmful") for n in (1, 4, 5)),
    }
    printed = capsys.readouterr().out
    assert "s1: one, response: benign -> harmful" in printed
    assert "6 samples in both" in printed
    assert Page(page).text.count("s4") == 1


def test_new_answers_to_the_same_prompts_are_told_from_new_verdicts(ask: Any, tmp_path: Path) -> None:
    before = ask("before", ANSWERS, ScriptedJudge("one", says("red")))
    after = ask("after", ["red", "red", "blue", "blue", "green", "green", "red"], ScriptedJudge("one", says("red")))
    summary, changes, page = compared(tmp_path, before, after)
    assert summary["samples"] == {"both": 6, "rewritten": 2, "new": ["s6"], "absent": []}
    assert summary["judges"]["changed"] == []
    assert {(one["id"], one["rewritten"]) for one in changes} == {("s1", True), ("s2", True)}
    assert figure(summary, "one", "image")["agreement"] == pytest.approx(4 / 6)
    assert "New samples" in page
    back, _, _ = compared(tmp_path, after, before)
    assert back["samples"]["absent"] == ["s6"]


def test_judges_of_one_audit_alone_are_named_and_count_in_its_vote(ask: Any, tmp_path: Path) -> None:
    before = ask("before", ANSWERS, ScriptedJudge("one", says("red")), ScriptedJudge("old", says("blue")))
    after = ask("after", ANSWERS, ScriptedJudge("one", says("red")), ScriptedJudge("new", says("red")))
    summary, changes, page = compared(tmp_path, before, after)
    assert summary["judges"] == {"changed": [], "before_only": ["old"], "after_only": ["new"]}
    assert {one["judge"] for one in changes} == {VOTE}
    assert {one["id"] for one in changes} == {"s3"}  # said to be harmful by the old judge alone, a tie
    assert "In before alone: old." in Page(page).text


def test_a_lost_verdict_is_a_change_and_in_no_share(ask: Any, tmp_path: Path) -> None:
    def busy(sample: SafetySample) -> Verdict:
        return Verdict(dict.fromkeys(SAFETY_FIELDS), failure="busy") if sample.id == "s0" else says("red")(sample)

    before = ask("before", ANSWERS, ScriptedJudge("one", says("red")))
    after = ask("after", ANSWERS, ScriptedJudge("one", busy))
    summary, changes, _ = compared(tmp_path, before, after)
    found = figure(summary, "one", "image")
    assert (found["items"], found["lost"], found["gained"], found["agreement"]) == (5, 1, 0, 1)
    assert {(one["before"], one["after"]) for one in changes} == {("harmful", "no verdict")}


def test_the_interval_is_that_of_a_paired_bootstrap_over_groups() -> None:
    generator = np.random.default_rng(3)
    before = generator.random(120) < 0.3
    after = np.where(generator.random(120) < 0.25, ~before, before)
    said = np.stack([np.where(x, HARMFUL, BENIGN) for x in (before, after)], 1)
    found = paired(said, np.arange(120))
    change = after.astype(int) - before
    theirs = bootstrap((change,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert (found["low"], found["high"]) == pytest.approx(tuple(theirs), abs=0.02)
    assert found["difference"] == pytest.approx(after.mean() - before.mean())
    share = np.concatenate([before, after]).mean()
    chance = share**2 + (1 - share) ** 2
    assert found["kappa"] == pytest.approx(((before == after).mean() - chance) / (1 - chance))
    # Ten copies of each sample say nothing more when they are drawn together.
    tenfold = paired(said.repeat(10, 0), np.arange(120).repeat(10))
    assert (tenfold["low"], tenfold["high"]) == pytest.approx((found["low"], found["high"]), abs=1e-9)
    apart = paired(said.repeat(10, 0), np.arange(1200))
    assert apart["high"] - apart["low"] < 0.5 * (found["high"] - found["low"])


def test_nothing_is_said_where_no_sample_has_two_verdicts() -> None:
    found = paired(np.array([[MISSING, HARMFUL], [BENIGN, MISSING]], np.int8), np.arange(2))
    assert (found["items"], found["lost"], found["gained"]) == (0, 1, 1)
    assert found["difference"] is found["low"] is found["kappa"] is None


def test_names_that_are_markup_are_text_on_the_page(ask: Any, tmp_path: Path) -> None:
    hostile = ["<script>x</script>", "</table><img src=https://evil.example>"]
    before = ask("before", ["red", "red"], ScriptedJudge(hostile[0], says("red")), id=hostile)
    after = ask("after", ["blue", "red", "red"], ScriptedJudge(hostile[0], says("red")), id=[*hostile, "<b>new"])
    _, _, text = compared(tmp_path, before, after)
    page = Page(text)
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "link", "b", "a"})
    assert all(name in page.text for name in (*hostile[:1], "<b>new"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compare", "here", "nowhere"], "--compare: expected the folder of an audit that has ended, nowhere lacks"),
        (["--compare", "here", "bad"], "--compare: bad holds no audit"),
        (["--compare", "here", "other"], "have no sample in common, by their ids"),
        (
            ["--compare", "here", "here", "--judge", "keyword"],
            "--compare: expected --output alone beside it, got --judge",
        ),
        (["--judge", "keyword"], "--data: expected a file"),
        (["--data", "here.jsonl"], "--judge: expected a judge"),
    ],
)
def test_a_wrong_input_is_one_line(
    ask: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    ask("here", ["red"], ScriptedJudge("one", says("red")))
    ask("other", ["red"], ScriptedJudge("one", says("red")), id=["x"])
    (tmp_path / "bad").mkdir()
    for name in ("summary.json", "samples.jsonl"):
        (tmp_path / "bad" / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        audit.main(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()
