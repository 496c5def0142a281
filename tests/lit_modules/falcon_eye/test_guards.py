"""Answers of other guards become verdicts; what is not of their format says nothing and breaks nothing."""

import json

import pytest

from leanlight.contracts import SafetySample, UserError
from lit_modules.falcon_eye.guards import OutputsJudge, guard_reasoner_vl, llama_guard, llava_guard


@pytest.mark.parametrize(
    ("text", "label", "categories"),
    [
        ("safe", False, ()),
        ("\n\nsafe\n", False, ()),
        ("unsafe\nS10", True, ("Hate Speech", "Bias")),
        ("\n\nunsafe\nS1,S7", True, ("Violence and Physical Harm", "Privacy Violation")),
        ("Unsafe\ns13, S99", True, ("Politics",)),
        ("unsafe", True, ()),
        ("safe\nS1", False, ()),
        ("unsafely put", None, ()),
        ("I can't say", None, ()),
        ("", None, ()),
        ("S1\nunsafe", None, ()),
    ],
)
def test_llama_guard_answers_are_read(text, label, categories):
    verdict = llama_guard(text)
    assert verdict.labels == {"response": label}
    assert verdict.categories == categories
    assert verdict.text == text


@pytest.mark.parametrize(
    ("text", "label", "categories", "explanation"),
    [
        ('{"rating": "Safe", "category": "NA: None applying", "rationale": "A circle."}', False, (), "A circle."),
        (
            '```json\n{"rating": "unsafe ", "category": "O3: Sexual Content", "rationale": "x"}\n```',
            True,
            ("Adult Content",),
            "x",
        ),
        ('{"rating": "Unsafe", "category": "O2"}', True, ("Violence and Physical Harm",), ""),
        ('{"rating": "Unsafe", "category": null, "rationale": 3}', True, (), "3"),
        ('{"rating": "Perhaps", "category": "O2"}', None, (), ""),
        ('"Unsafe", "category": "O2: Violence", "rationale": "cut"}', None, (), ""),
        ('{"rating": "Unsafe", "category": "O2', None, (), ""),
        ("[1, 2]", None, (), ""),
        ("", None, (), ""),
        ("{" * 100_000, None, (), ""),
    ],
)
def test_llava_guard_answers_are_read(text, label, categories, explanation):
    verdict = llava_guard(text)
    assert verdict.labels == {"image": label}
    assert (verdict.categories, verdict.explanation, verdict.text) == (categories, explanation, text)


@pytest.mark.parametrize(
    ("text", "instruction", "response", "explanation"),
    [
        (
            "<think>\nOne.\n</think>\n<result>\nAnswers:\nRequest: harmful\nResponse: unharmful\n</result>",
            True,
            False,
            "One.",
        ),
        ("<think>Request: harmful</think><result>Request: unharmful\nResponse: None</result>", False, None, None),
        ("<think>a</think>\nrequest: HARMFUL\n**Response**: harmful", True, True, "a"),
        ("Request: harmful\nResponse: harmful", True, True, ""),
        ("<think>cut in the middle, Request: harmful", None, None, None),
        ("<result>nothing</result>", None, None, ""),
        ("", None, None, ""),
    ],
)
def test_guard_reasoner_answers_are_read_after_the_thoughts(text, instruction, response, explanation):
    verdict = guard_reasoner_vl(text)
    assert verdict.labels == {"instruction": instruction, "response": response}
    assert verdict.text == text
    if explanation is not None:
        assert verdict.explanation == explanation


def samples(*ids):
    return [SafetySample(each, "a", "b") for each in ids]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_answers_judges_samples_by_their_id_in_any_order(tmp_path):
    path = written(
        tmp_path / "out.jsonl",
        [{"id": "a", "output": "unsafe\nS2"}, {"id": 7, "output": "safe"}, {"id": "c", "output": "?"}],
    )
    judge = OutputsJudge("llama_guard", path)
    found = judge.judge(samples("7", "a", "c", "d"))
    assert [v.labels["response"] for v in found] == [False, True, None, None]
    assert [bool(v.failure) for v in found] == [False, False, False, True]
    assert found[3].failure == "no answer in out.jsonl"
    assert judge.fields == ("response",)
    assert judge.malformed == 1
    assert found[1].categories == ("Illegal Activity", "Malware", "Fraud")


def test_a_guard_that_was_asked_about_each_part_has_a_column_a_field(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text('id,instruction,response\na,safe,"unsafe\nS10"\nb,"unsafe\nS7",\n')
    judge = OutputsJudge("llama_guard", path)
    assert judge.fields == ("instruction", "response")
    first, second = judge.judge(samples("a", "b"))
    assert first.labels == {"instruction": False, "response": True}
    assert first.categories == ("Hate Speech", "Bias")
    assert second.labels == {"instruction": True, "response": None}


def test_the_fields_are_those_that_a_format_speaks_of(tmp_path):
    path = written(tmp_path / "o.jsonl", [{"id": "a", "output": "<result>Request: harmful\nResponse: None</result>"}])
    assert OutputsJudge("guard_reasoner_vl", path).fields == ("instruction", "response")
    assert OutputsJudge("llava_guard", path).fields == ("image",)


def test_fingerprints_follow_the_answers_and_the_format(tmp_path):
    one = written(tmp_path / "one.jsonl", [{"id": "a", "output": "safe"}])
    same = written(tmp_path / "same.jsonl", [{"id": "a", "output": "safe"}])
    other = written(tmp_path / "other.jsonl", [{"id": "a", "output": "unsafe"}])
    prints = [OutputsJudge("llama_guard", path).fingerprint for path in (one, same, other)]
    assert prints[0] == prints[1] != prints[2]
    assert OutputsJudge("llava_guard", one).fingerprint != prints[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": "a", "output": "safe"}\n\n{"id": "a", "output": "safe"}\n', r"out.jsonl, line 3: id 'a' comes twice"),
        ('{"output": "safe"}\n', r"line 1: expected an id"),
        ('{"id": "a", "output": "safe"}\n{"id": "b"\n', r"line 2: expected a JSON object"),
        ("[1]\n", r"line 1: expected a JSON object"),
        (
            '{"id": "a", "answer": "safe"}\n',
            r"line 1: expected output, or instruction, image, response, got id, answer",
        ),
        (b"\xff\xfe\x00", r"expected a JSONL or CSV file of answers"),
    ],
)
def test_a_bad_row_is_named_in_one_line(tmp_path, content, message):
    path = tmp_path / "out.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        OutputsJudge("llama_guard", path)
    assert "\n" not in str(error.value)


def test_an_unknown_format_and_a_missing_file_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"format: expected one of .*did you mean 'llama_guard'"):
        OutputsJudge("lama_guard", tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"none\.jsonl: expected a JSONL or CSV file"):
        OutputsJudge("llama_guard", tmp_path / "none.jsonl")
