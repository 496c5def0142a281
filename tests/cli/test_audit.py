"""`leanlight audit` asks each judge once about each sample, whatever interrupts it, and says what it found."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from audit_cases import ScriptedJudge, says, scores, write_picture, write_samples

from leanlight.cli import audit
from leanlight.contracts import UserError
from leanlight.contracts.safety import SAFETY_FIELDS, Verdict
from leanlight.locks import RunLock
from leanlight.results.audit_judges import judge_maker, without_keys
from lit_modules.falcon_eye.http_judge import HttpJudge

ANSWERS = ["red", "green", "red", "blue", "green", "green", "blue", "red", "green", "green"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_samples(tmp_path / "data.jsonl", ANSWERS)


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Audit a file with scripted judges; returns the exit code."""

    def call(data: Path, *judges: ScriptedJudge, options: tuple[str, ...] = ()) -> int:
        by_name = {f"{judge.name}{number}": judge for number, judge in enumerate(judges)}
        monkeypatch.setattr(audit, "judge_maker", lambda name: lambda samples: by_name[name])
        named = [word for name in by_name for word in ("--judge", name)]
        return audit.main(["--data", str(data), *named, "--output", str(tmp_path / "out"), *options])

    return call


def lines(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()]


def summary(tmp_path: Path) -> dict[str, Any]:
    return dict(json.loads((tmp_path / "out" / "summary.json").read_text()))


def test_a_second_audit_asks_nothing(ask: Any, data: Path, tmp_path: Path) -> None:
    judges = ScriptedJudge("one", says("red")), ScriptedJudge("two", says("blue"))
    assert ask(data, *judges) == 0
    assert [judge.asked for judge in judges] == [[f"s{n}" for n in range(10)]] * 2
    before = (tmp_path / "out" / "verdicts.jsonl").read_bytes()
    again = ScriptedJudge("one", says("red")), ScriptedJudge("two", says("blue"))
    assert ask(data, *again) == 0
    assert [judge.asked for judge in again] == [[], []]
    assert (tmp_path / "out" / "verdicts.jsonl").read_bytes() == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("verdicts.jsonl", "verdicts.parquet", "summary.json", "samples.jsonl", "report.html")
    }


def test_a_changed_sample_and_a_changed_judge_are_judged_anew(ask: Any, data: Path, tmp_path: Path) -> None:
    ask(data, ScriptedJudge("one", says("red")))
    write_samples(data, [*ANSWERS[:3], "violet", *ANSWERS[4:]])
    judge = ScriptedJudge("one", says("violet"))
    ask(data, judge)
    assert judge.asked == ["s3"]
    assert summary(tmp_path)["vote"]["response"]["harmful"] == 4  # three were judged by the word red before
    judge = ScriptedJudge("one", says("violet"), fingerprint="f" * 64)
    ask(data, judge)
    assert len(judge.asked) == 10
    assert summary(tmp_path)["vote"]["response"]["harmful"] == 1


def test_a_changed_picture_is_judged_anew(ask: Any, tmp_path: Path) -> None:
    pictures = [write_picture(tmp_path / f"{n}.png", color).name for n, color in enumerate(("red", "green"))]
    data = write_samples(tmp_path / "data.jsonl", ["red", "red"], image=pictures)
    ask(data, ScriptedJudge("one", says("red")))
    write_picture(tmp_path / "1.png", "blue")
    judge = ScriptedJudge("one", says("red"))
    ask(data, judge)
    assert judge.asked == ["s1"]


def test_equal_samples_are_asked_about_once_and_count_as_often_as_they_come(ask: Any, tmp_path: Path) -> None:
    data = write_samples(tmp_path / "data.jsonl", ["red", "red", "green"], instruction=["same"] * 3)
    judge = ScriptedJudge("one", says("red"))
    ask(data, judge)
    assert judge.asked == ["s0", "s2"]
    assert summary(tmp_path)["vote"]["response"] == {"harmful": 2, "benign": 1, "missing": 0}


def test_a_killed_audit_goes_on_without_asking_again(ask: Any, data: Path, tmp_path: Path) -> None:
    def kill(sample: Any) -> Verdict:
        if sample.id == "s9":
            os.kill(os.getpid(), signal.SIGKILL)
        return says("red")(sample)

    if (child := os.fork()) == 0:
        ask(data, ScriptedJudge("one", kill))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [line["id"] for line in lines(tmp_path)] == [f"s{n}" for n in range(8)]  # whole batches
    judge = ScriptedJudge("one", says("red"))
    assert ask(data, judge) == 0
    assert judge.asked == ["s8", "s9"]
    assert [line["id"] for line in lines(tmp_path)] == [f"s{n}" for n in range(10)]


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(ask: Any, data: Path, tmp_path: Path, capsys: Any) -> None:
    def interrupt(sample: Any) -> Verdict:
        if sample.id == "s5":
            raise KeyboardInterrupt
        return says("red")(sample)

    with pytest.raises(KeyboardInterrupt):
        ask(data, ScriptedJudge("one", interrupt))
    assert len(lines(tmp_path)) == 4
    assert "goes on" in capsys.readouterr().err


def test_a_torn_last_line_is_dropped_and_its_sample_asked_about(ask: Any, data: Path, tmp_path: Path) -> None:
    ask(data, ScriptedJudge("one", says("red")))
    path = tmp_path / "out" / "verdicts.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    judge = ScriptedJudge("one", says("red"))
    assert ask(data, judge) == 0
    assert judge.asked == ["s9"]
    assert len(lines(tmp_path)) == 10


@pytest.mark.parametrize("damage", ["{'no': JSON}", "[1]", '{"sample": 1}'])
def test_a_damaged_line_is_named(ask: Any, data: Path, tmp_path: Path, damage: str) -> None:
    ask(data, ScriptedJudge("one", says("red")))
    path = tmp_path / "out" / "verdicts.jsonl"
    key = json.loads(path.read_text().splitlines()[0])["sample"]
    damaged = damage.replace("1}", f'"{key}"}}')
    path.write_text("\n".join([damaged, *path.read_text().splitlines()[1:], ""]))
    with pytest.raises(UserError, match=r"verdicts.jsonl, line 1"):
        ask(data, ScriptedJudge("one", says("red")))


def test_two_audits_do_not_write_one_folder(ask: Any, data: Path, tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "out")
    assert lock.acquire()
    judge = ScriptedJudge("one", says("red"))
    with pytest.raises(UserError, match="another audit"):
        ask(data, judge)
    assert not judge.asked
    lock.release()
    assert ask(data, judge) == 0


def test_an_unreadable_picture_fails_its_row_alone_and_is_tried_again(ask: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no picture")
    names = [write_picture(tmp_path / "good.png").name, "bad.png", "gone.png", None]
    data = write_samples(tmp_path / "data.jsonl", ["red"] * 4, image=names)
    ask(data, ScriptedJudge("sees", says("red")), ScriptedJudge("reads", says("red"), ("response",)))
    sees, reads = summary(tmp_path)["judges"]
    assert (sees["failures"], sees["fields"]["image"]["harmful"]) == (2, 2)
    assert (reads["failures"], reads["fields"]["response"]["harmful"]) == (0, 4)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "bad.png" in page
    assert "gone.png" in page
    write_picture(tmp_path / "bad.png")
    judge = ScriptedJudge("sees", says("red"))
    ask(data, judge)
    assert judge.asked == ["s1", "s2"]
    assert summary(tmp_path)["judges"][0]["failures"] == 1


def test_what_a_judge_failed_on_is_asked_again(ask: Any, data: Path, tmp_path: Path) -> None:
    def busy(sample: Any) -> Verdict:
        return Verdict(dict.fromkeys(SAFETY_FIELDS), failure="busy") if sample.id == "s2" else says("red")(sample)

    ask(data, ScriptedJudge("one", busy))
    assert summary(tmp_path)["judges"][0]["failures"] == 1
    judge = ScriptedJudge("one", says("red"))
    ask(data, judge)
    assert judge.asked == ["s2"]
    assert summary(tmp_path)["judges"][0]["failures"] == 0


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((), 0),
        (("--fail-above", "0.3"), 0),
        (("--fail-above", "0.29"), 1),
        (("--fail-above", "response=0.29"), 1),
        (("--fail-above", "instruction=0.3", "image=0.2"), 1),
        (("--threshold", "response=0.9", "--fail-above", "0"), 0),
        (("--threshold", "image=0.9", "--fail-above", "0.2"), 1),
        (("--limit", "2", "--fail-above", "0.4"), 1),
    ],
)
def test_the_exit_code_tells_whether_too_many_answers_are_harmful(
    ask: Any, data: Path, options: tuple[str, ...], code: int
) -> None:
    judge = ScriptedJudge("one", scores(lambda sample: 0.8 if sample.response == "red" else 0.1))
    assert ask(data, judge, options=options) == code


def test_an_audit_without_verdicts_does_not_pass(ask: Any, data: Path, capsys: Any) -> None:
    judge = ScriptedJudge("one", lambda sample: Verdict(dict.fromkeys(SAFETY_FIELDS), failure="down"))
    assert ask(data, judge, options=("--fail-above", "0.5")) == 1
    assert "0 of 10 harmful, 10 without a verdict: above 50.0%" in capsys.readouterr().out


def test_judges_vote_and_a_tie_is_harmful(ask: Any, data: Path, tmp_path: Path) -> None:
    words = ("red", "red|blue", "blue")
    judges = [ScriptedJudge(w, scores(lambda s, w=w: float(s.response in w)), ("response",)) for w in words]
    ask(data, *judges)
    assert summary(tmp_path)["vote"]["response"] == {"harmful": 5, "benign": 5, "missing": 0}
    ask(data, judges[0], judges[2])
    found = summary(tmp_path)
    assert found["vote"]["response"]["harmful"] == 5  # one of two each
    assert found["disagreements"] == 5
    assert found["agreement"]["instruction"] is None
    counted = Counter((answer == "red", answer == "blue") for answer in ANSWERS)
    share = (3 + 2) / 20
    chance = share**2 + (1 - share) ** 2
    assert found["agreement"]["response"]["kappa"] == pytest.approx(
        (counted[False, False] / 10 - chance) / (1 - chance)
    )
    assert found["agreement"]["response"]["unanimous"] == 5


def test_a_threshold_moves_labels_without_asking_again(ask: Any, data: Path, tmp_path: Path) -> None:
    value = {"red": 0.8, "blue": 0.7, "green": 0.2}
    ask(data, ScriptedJudge("one", scores(lambda sample: value[sample.response])))
    assert summary(tmp_path)["judges"][0]["fields"]["response"]["harmful"] == 5
    judge = ScriptedJudge("one", scores(lambda sample: value[sample.response]))
    ask(data, judge, options=("--threshold", "response=0.75", "image=0.7"))
    assert judge.asked == []
    fields = summary(tmp_path)["judges"][0]["fields"]
    assert [fields[name]["harmful"] for name in SAFETY_FIELDS] == [5, 5, 3]


def test_accuracies_are_measured_where_people_have_labelled(ask: Any, tmp_path: Path) -> None:
    labels = ["harmful", "benign", None, "harmful", "benign", "benign", "benign", "harmful", None, "harmful"]
    data = write_samples(tmp_path / "data.jsonl", ANSWERS, response_label=labels)
    ask(data, ScriptedJudge("one", says("red")))
    pairs = [(answer == "red", label == "harmful") for answer, label in zip(ANSWERS, labels, strict=True) if label]
    right = sum(said == true for said, true in pairs) / len(pairs)
    figure = summary(tmp_path)["judges"][0]["figures"]["response_accuracy"]
    assert figure["value"] == pytest.approx(right)
    assert figure["items"] == 8
    assert figure["low"] <= right <= figure["high"]
    assert figure["majority"] == pytest.approx(0.5)
    assert "instruction_accuracy" not in summary(tmp_path)["judges"][0]["figures"]


def test_the_parquet_file_holds_a_row_for_each_sample_and_judge(ask: Any, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    half = "half of a pair: \ud83d"
    data = write_samples(tmp_path / "data.jsonl", ["red", half], source=["model a", None])
    value = scores(lambda sample: 0.6 if "red" in sample.response else 0.4)
    ask(data, ScriptedJudge("one", says("red")), ScriptedJudge("two", value), options=("--threshold", "image=0.7"))
    rows = parquet.read_table(tmp_path / "out" / "verdicts.parquet").to_pylist()
    assert [(row["id"], row["judge"], row["source"]) for row in rows] == [
        *(("s0", "one", "model a"), ("s1", "one", ""), ("s0", "two", "model a"), ("s1", "two", ""))
    ]
    assert [row["response_harmful"] for row in rows] == [True, False, True, False]
    assert [row["image_harmful"] for row in rows] == [True, False, False, False]
    assert [row["response_score"] for row in rows] == [None, None, 0.6, 0.4]
    assert [row["categories"] for row in rows] == [["Fraud"], [], [], []]


def test_without_pyarrow_the_extra_is_named_and_the_rest_written(
    ask: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert ask(data, ScriptedJudge("one", says("red"))) == 0
    assert "leanlight[safety]" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.html").is_file()
    assert not (tmp_path / "out" / "verdicts.parquet").exists()


def test_an_estimate_judges_a_handful_which_is_kept(ask: Any, tmp_path: Path, capsys: Any) -> None:
    data = write_samples(tmp_path / "data.jsonl", [f"answer {n}" for n in range(100)])
    judge = ScriptedJudge("one", says("red"))
    assert ask(data, judge, options=("--estimate",)) == 0
    assert len(judge.asked) == 16
    assert {"84", "not", "known"} <= set(capsys.readouterr().out.split())
    assert not (tmp_path / "out" / "report.html").exists()
    assert ask(data, judge) == 0
    assert sorted(judge.asked) == sorted(f"s{n}" for n in range(100))


def test_an_estimate_says_what_an_endpoint_keeps_to_and_what_its_tokens_are_enough_for(
    ask: Any, tmp_path: Path, capsys: Any
) -> None:
    class Counting(ScriptedJudge):
        tokens = 0

        def judge(self, samples: Any) -> list[Verdict]:
            self.tokens += 50 * len(samples)
            return super().judge(samples)

        def limits(self, samples: int, tokens: int | None) -> str:
            return f"at most so much, {samples} samples, {tokens} tokens"

    data = write_samples(tmp_path / "data.jsonl", [f"answer {n}" for n in range(100)])
    assert ask(data, Counting("one", says("red")), options=("--estimate",)) == 0
    printed = capsys.readouterr().out
    assert "about 4,200" in printed  # 84 samples left, 50 tokens each
    assert "one: at most so much, 84 samples, 4200 tokens" in printed


def test_an_endpoint_is_told_its_limits_behind_the_model() -> None:
    url = "http:http://127.0.0.1:9/v1#some/model"
    plain = judge_maker(url)([])
    judge = judge_maker(f"{url},concurrency=3,timeout=2.5,requests=7,tokens=90")([])
    assert isinstance(judge, HttpJudge)
    assert (judge.name, judge.concurrency, judge.timeout) == ("some/model", 3, 2.5)
    assert (judge.max_requests, judge.max_tokens) == (7, 90)
    assert judge.fingerprint == plain.fingerprint


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (
            "concurency=3",
            "expected concurrency=…, timeout=…, requests=…, tokens=… behind the model, got 'concurency=3'",
        ),
        ("concurency=3", "did you mean 'concurrency'"),
        ("concurrency", "got 'concurrency'"),
        ("concurrency=many", "concurrency: expected a whole number, got 'many'"),
        ("concurrency=0", "concurrency: expected an integer of at least 1, got 0"),
        ("timeout=soon", "timeout: expected seconds, got 'soon'"),
        ("timeout=0", "timeout: expected a positive number of seconds, got 0"),
        ("requests=-1", "max_requests: expected an integer of at least 1, got -1"),
    ],
)
def test_a_limit_of_an_endpoint_that_cannot_be_is_one_line(limit: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        judge_maker(f"http:http://127.0.0.1:9/v1#m,{limit}")([])
    assert message in str(error.value)


def test_judges_of_one_name_are_told_apart_and_one_judge_comes_once(ask: Any, data: Path, tmp_path: Path) -> None:
    ask(data, ScriptedJudge("one", says("red"), fingerprint="a" * 64), ScriptedJudge("one", says("blue")))
    assert [judge["name"] for judge in summary(tmp_path)["judges"]] == ["one", "one (6f6e65)"]
    assert [judge["fields"]["response"]["harmful"] for judge in summary(tmp_path)["judges"]] == [3, 2]
    with pytest.raises(UserError, match="same judge"):
        ask(data, ScriptedJudge("one", says("red")), ScriptedJudge("one", says("red")))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge", "majorty"], "did you mean 'majority'"),
        (["--judge", "keyword:x"], "expected keyword, got 'keyword:x'"),
        (["--judge", "outputs"], "expected outputs:FORMAT:FILE"),
        (["--judge", "http:"], "expected http:URL#MODEL"),
        (["--judge", "keyword", "--judge", "keyword"], "keyword is named twice"),
        (["--judge", "keyword", "--threshold", "response=1"], "--threshold response: expected a number in"),
        (["--judge", "keyword", "--threshold", "response=high"], "got 'high'"),
        (["--judge", "keyword", "--threshold", "respons=0.5"], "did you mean 'response'"),
        (["--judge", "keyword", "--threshold", "0.5"], "expected NAME=VALUE"),
        (["--judge", "keyword", "--fail-above", "1.5"], "--fail-above response: expected a share in"),
        (["--judge", "keyword", "--limit", "0"], "--limit: expected an integer of at least 1"),
        (["--judge", "keyword", "--colums", "a=b"], "did you mean '--columns'"),
        (["--judge", "keyword", "--data", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_a_wrong_input_is_one_line(data: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        audit.main(["--data", str(data), "--output", str(data.parent / "out"), *words])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (data.parent / "out").exists()


def test_keys_in_an_address_are_not_shown() -> None:
    assert without_keys("http:https://me:secret@host:8/v1?key=secret#model") == "http:https://host:8/v1#model"
    assert without_keys("outputs:llama_guard:a.jsonl") == "outputs:llama_guard:a.jsonl"
    with pytest.raises(UserError) as error:
        judge_maker("htp:https://me:secret@host#model")
    assert "secret" not in str(error.value)


def test_judges_of_the_suite_are_found_by_name(tmp_path: Path) -> None:
    answers = ["I'm sorry, but I can't help with that.", "Red shapes.", "Green shapes."]
    labels = ["benign", "harmful", "benign"]
    data = write_samples(tmp_path / "data.jsonl", answers, response_label=labels)
    rows = [{"id": "s0", "output": "safe"}, {"id": "s1", "output": "unsafe\nS10"}, {"id": "s2", "output": "no idea"}]
    (tmp_path / "guard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["majority", "keyword", f"outputs:llama_guard:{tmp_path / 'guard.jsonl'}"]
    words = [word for name in names for word in ("--judge", name)]
    assert audit.main(["--data", str(data), *words, "--output", str(tmp_path / "out")]) == 0
    counts = [judge["fields"]["response"] for judge in summary(tmp_path)["judges"]]
    assert [(one["harmful"], one["benign"], one["missing"]) for one in counts] == [(0, 3, 0), (2, 1, 0), (1, 1, 1)]
    judge = judge_maker("http:http://127.0.0.1:9/v1#some/model")([])  # asks nothing before it judges
    assert (judge.name, judge.fields) == ("some/model", SAFETY_FIELDS)
    for name in ("http:http://127.0.0.1:9/v1", "outputs:llama_gard:x.jsonl", f"features:{tmp_path}"):
        with pytest.raises(UserError):
            judge_maker(name)([])
