"""Small files in every layout, and what is said of those that do not fit."""

import base64
import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from datamodules.safety.layouts import FIGSTEP_CATEGORIES
from datamodules.safety.readers import read_parts, read_samples, require_pictures
from datamodules.safety.xstest import XSTest
from leanlight.contracts import SafetySample, UserError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def picture(path: Path, shade: int = 100) -> bytes:
    """A grey square at a path; its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(path, "PNG")
    return path.read_bytes()


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def table(path: Path, header: list[str], *rows: list[object]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def shade(sample: SafetySample) -> int:
    assert sample.image is not None
    return int(sample.image.pixels()[0, 0, 0])


# ---- columns of one's own ----


def test_tables_of_all_kinds_give_the_same_samples(tmp_path):
    picture(tmp_path / "deep" / "a.png", 7)
    row = {
        "id": "x1",
        "question": 'what, is "this"?\nsay',
        "answer": "a square",
        "image": "deep/a.png",
        "response_label": "Benign",
        "Image Judgment": "harmful",
        "Harmful Category": "Fraud, Bias",
        "model": "some model",
        "split": "validation",
    }
    jsonl(tmp_path / "a.jsonl", row)
    (tmp_path / "a.json").write_text(json.dumps([row]))
    table(tmp_path / "a.csv", list(row), list(row.values()))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "csv", "parquet"):
        ((sample, part),) = read_parts(tmp_path / f"a.{suffix}")
        assert (sample.id, sample.instruction, sample.response) == ("x1", row["question"], "a square")
        assert (sample.labels, sample.categories) == ({"image": True, "response": False}, ("Fraud", "Bias"))
        assert (sample.source, part, shade(sample)) == ("some model", "val", 7)
        assert read_samples(tmp_path / f"a.{suffix}") == [sample]


def test_columns_with_other_names_are_mapped_and_can_be_left_out(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"q": "one", "prompt": "other", "a": "two", "id": 3, "verdict": 1})
    columns = {"instruction": "q", "response": "a", "response_label": "verdict", "id": None}
    (sample,) = read_samples(path, columns=columns)
    assert (sample.id, sample.instruction, sample.response, sample.labels) == ("1", "one", "two", {"response": True})
    (sample,) = read_samples(path, columns={"response": ""})
    assert (sample.id, sample.instruction, sample.response, sample.labels) == ("3", "other", "", {})


def test_pictures_come_from_files_below_the_folder_data_uris_and_bytes(tmp_path):
    content = picture(tmp_path / "images" / "a.png", 9)
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    rows = [{"prompt": "p", "answer": "a", "image": image} for image in ("a.png", uri, None, "")]
    samples = read_samples(jsonl(tmp_path / "a.jsonl", *rows), images=tmp_path / "images")
    assert [shade(sample) for sample in samples[:2]] == [9, 9]
    assert [sample.image for sample in samples[2:]] == [None, None]
    rows = [{"prompt": "p", "answer": "a", "image": image} for image in ({"bytes": content, "path": "b.png"}, None)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    samples = read_samples(tmp_path / "a.parquet")
    assert (shade(samples[0]), samples[0].image.name, samples[1].image) == (9, "b.png", None)


def test_a_table_cannot_name_pictures_outside_of_the_folder(tmp_path):
    picture(tmp_path / "secret.png")
    (tmp_path / "in").mkdir()
    for image in ("../secret.png", str(tmp_path / "secret.png"), "x/../../secret.png"):
        path = jsonl(tmp_path / "in" / "a.jsonl", {"prompt": "p", "answer": "a", "image": image})
        with pytest.raises(UserError, match=r"a.jsonl row 1, column 'image': expected a file below .*/in"):
            read_samples(path)
    path = jsonl(tmp_path / "in" / "a.jsonl", {"prompt": "p", "answer": "a", "image": str(tmp_path / "secret.png")})
    assert len(read_samples(path, images=tmp_path)) == 1


def test_missing_pictures_are_listed_when_all_are_or_when_they_are_required(tmp_path):
    rows = [{"prompt": "p", "answer": "a", "image": f"{number}.png"} for number in range(7)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    with pytest.raises(UserError, match=r"7 of 7 pictures are missing: 0.png, 1.png, 2.png, 3.png, 4.png, …"):
        read_samples(path)
    picture(tmp_path / "1.png")
    samples = read_samples(path)
    assert len(samples) == 7
    with pytest.raises(UserError, match=r"images: 6 of 7 pictures are missing: 0.png, 2.png"):
        require_pictures(samples)


GOOD = {"prompt": "p", "answer": "a"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, {"prompt": 3, "answer": "a"}], "row 2, column 'prompt': expected text, got 3"),
        ([GOOD, {"prompt": "p"}], "row 2, column 'answer': expected text, got none"),
        ([GOOD, ["p", "a"]], "row 2: expected an object in JSON, got a list"),
        ([{"prompt": "p", "reply": "a"}], "expected a column 'response' or 'answer' .*; got 'prompt', 'reply'"),
        ([{**GOOD, "image_label": "bad"}], "row 1, column 'image_label': expected one of harmful, .*, got 'bad'"),
        ([{**GOOD, "categories": ["Fruad"]}], "column 'categories': .* not 'Fruad' .did you mean 'Fraud'"),
        ([{**GOOD, "image": "https://x.org/a.png"}], "column 'image': expected a file .pictures are not fetched"),
        ([{**GOOD, "image": 3}], "column 'image': expected a picture's path, data URI or bytes, got 3"),
        ([{**GOOD, "image": "data:image/png;base64,%%"}], "column 'image': expected a data URI in base64"),
        ([{**GOOD, "image": "a\0b"}], "column 'image': expected a picture's path"),
        ([{**GOOD, "split": "tset"}], "column 'split': expected one of train"),
        ([{**GOOD, "id": "x"}, {**GOOD, "id": "x"}], "expected every id once, got 'x' twice"),
        ([], "holds no row"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        read_samples(jsonl(tmp_path / "a.jsonl", *rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "p", "answer": "a"}\n{"prompt"', "row 2: expected an object in JSON"),
        ("a.jsonl", b"[" * 100_000, "row 1: expected an object in JSON"),
        ("a.jsonl", b'{"prompt": "\xff"}', "row 1: expected an object in JSON"),
        ("a.json", b'{"prompt": "p"}', "expected a list of objects in JSON, got a dict"),
        ("a.csv", b"prompt,answer\np,a\np,a,b\n", "row 2: expected 2 cells, got 3"),
        ("a.csv", b"prompt,answer\np,a\n\xff,a\n", "cannot be read as CSV in UTF-8"),
        ("a.csv", b"prompt,answer,prompt\np,a,b\n", "every column once, got 'prompt' twice"),
        ("a.parquet", b"PAR1 and no more", "truncated or no parquet file"),
        ("a.txt", b"p", "expected a file that ends in"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_samples(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_wrong_arguments_are_named_with_the_nearest(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"quest": "p", "answer": "a"})
    with pytest.raises(
        UserError, match=r"columns: expected names of id, .*got 'instrution' .did you mean 'instruction'"
    ):
        read_samples(path, columns={"instrution": "quest"})
    with pytest.raises(UserError, match=r"columns: instruction: expected a column .*got 'qest' .did you mean 'quest'"):
        read_samples(path, columns={"instruction": "qest"})
    with pytest.raises(UserError, match=r"format: .*got 'json' .did you mean 'jsonl'"):
        read_samples(path, "json")
    with pytest.raises(UserError, match=r"expected a file that ends in .csv"):
        read_samples(path, "csv")
    with pytest.raises(UserError, match=r"images: expected a folder, got nowhere"):
        read_samples(path, images="nowhere")
    with pytest.raises(UserError, match=r"nowhere.csv is missing"):
        read_samples("nowhere.csv")
    with pytest.raises(UserError, match=r"columns: expected none with falcon"):
        read_samples(path, "falcon", {"instruction": "quest"})
    with pytest.raises(UserError, match=r"row 1, column 'image': expected a column, as spa_vl has it"):
        read_samples(jsonl(tmp_path / "a.jsonl", {"question": "p", "chosen": "a", "rejected": "b"}), "spa_vl")


def test_hostile_text_is_kept_as_text_that_can_be_written(tmp_path):
    texts = [
        "<script>alert(1)</script>",
        "=cmd|' /C calc'!A0",
        "__import__('os').system('x')",
        "a\x00b\ud800c",
        "\u202e",
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text, "answer": text}) for text in texts))
    found = [sample.instruction for sample in read_samples(path)]
    assert found == [*texts[:3], "a\x00b?c", texts[4]]
    assert "".join(found).encode()
    long = "x" * 300_000  # beyond the limit that Python's reader of CSV has by itself
    before = csv.field_size_limit()
    (sample,) = read_samples(table(tmp_path / "a.csv", ["prompt", "answer"], ["p", long]))
    assert sample.response == long
    assert csv.field_size_limit() == before


# ---- folders ----


def test_a_folder_of_tables_keeps_files_apart_and_takes_parts_from_their_names(tmp_path):
    for name in ("data/train-00000-of-00001", "validation/validation-0", "test/harm-0", "more/rest"):
        path = tmp_path / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist([{"prompt": name, "answer": "a", "id": 0}]), path)
    found = {sample.id: part for sample, part in read_parts(tmp_path)}
    assert found == {
        "data/train-00000-of-00001:0": "train",
        "more/rest:0": None,
        "test/harm-0:0": "test",
        "validation/validation-0:0": "val",
    }


def test_a_folder_of_pictures_has_texts_beside_them(tmp_path):
    picture(tmp_path / "a.png", 1)
    picture(tmp_path / "deep" / "b.jpg", 2)
    (tmp_path / "a.txt").write_text("what is it?\n")
    (tmp_path / "a.response.txt").write_text("a square")
    first, second = read_samples(tmp_path)
    assert (first.id, first.instruction, first.response, shade(first)) == ("a.png", "what is it?", "a square", 1)
    assert (second.id, second.instruction, second.response, shade(second)) == ("deep/b.jpg", "", "", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds neither a table .* nor a picture"):
        read_samples(tmp_path / "empty")


# ---- published sets ----

FALCON = ["id", "question", "answer", "image", "labels"]
GOLD = ["Instruction Judgment", "Image Judgment", "Response Judgment", "Harmful Category", "Explanation"]
TARGET = """"Instruction Judgment": "Benign",
"Image Judgment": "Harmful",
"Response Judgment": "Harmful",
"Harmful Category": ["Fraud", "Privacy Violation"],
"Explanation": "The picture is red, and
the answer follows it." """


def test_falcon_has_gold_columns_or_its_targets(tmp_path):
    picture(tmp_path / "images" / "a.png")
    gold = ["Benign", "Harmful", "Harmful", "Fraud, Privacy Violation", "Because."]
    table(tmp_path / "gold.csv", [*FALCON, *GOLD], ["7", "q", "a", "images/a.png", "", *gold])
    table(tmp_path / "train.csv", FALCON, ["8", "q", "a", "images/a.png", TARGET])
    (gold,), (target,) = read_samples(tmp_path / "gold.csv"), read_samples(tmp_path / "train.csv")
    for sample in (gold, target):
        assert sample.labels == {"instruction": False, "image": True, "response": True}
        assert sample.categories == ("Fraud", "Privacy Violation")
    assert (gold.id, gold.explanation) == ("7", "Because.")
    assert target.explanation == "The picture is red, and\nthe answer follows it."
    table(tmp_path / "train.csv", FALCON, ["8", "q", "a", "images/a.png", "I cannot say"])
    with pytest.raises(UserError, match=r"row 1, column 'labels': expected lines such as"):
        read_samples(tmp_path / "train.csv")


def test_vlguard_labels_pictures_and_instructions(tmp_path):
    for name in ("safe", "bad"):
        picture(tmp_path / "test" / "some" / f"{name}.png")
    entries = [
        {
            "id": "1",
            "image": "some/safe.png",
            "safe": True,
            "instr-resp": [
                {"safe_instruction": "s", "response": "yes"},
                {"unsafe_instruction": "u", "response": "no"},
            ],
        },
        {
            "id": "2",
            "image": "some/bad.png",
            "safe": False,
            "harmful_category": "x",
            "harmful_subcategory": "y",
            "instr-resp": [{"instruction": "i", "response": "no"}],
        },
    ]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    samples = [sample for sample, part in read_parts(tmp_path) if part == "test"]
    assert [(s.id, s.instruction, s.response, s.topic) for s in samples] == [
        ("1-0", "s", "yes", ""),
        ("1-1", "u", "no", ""),
        ("2-0", "i", "no", "y"),
    ]
    assert [tuple(s.labels[f] for f in ("instruction", "image", "response")) for s in samples] == [
        (False, False, False),
        (True, False, False),
        (True, True, False),
    ]
    require_pictures(samples)
    entries[0]["instr-resp"][1] = {"safe_instruction": "s"}
    (tmp_path / "test.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"test.json row 1, column 'response': expected an instruction and a response"):
        read_samples(tmp_path)


def test_beavertails_v_labels_answers_and_pictures(tmp_path):
    content = picture(tmp_path / "a.png", 5)
    rows = [
        {
            "question": "q",
            "image": {"bytes": content, "path": None},
            "category": "some_kind",
            "image_severity": severity,
            "response": "a",
            "is_response_safe": safe,
        }
        for severity, safe in ((0, "yes"), (2, "no"))
    ]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "evaluation-0.parquet")
    ((first, part), (second, _)) = read_parts(tmp_path / "data" / "evaluation-0.parquet")
    assert (first.labels, first.topic, part) == ({"image": False, "response": False}, "some_kind", "test")
    assert second.labels == {"image": True, "response": True}
    assert shade(second) == 5
    rows[1]["is_response_safe"] = "maybe"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data" / "evaluation-0.parquet")
    with pytest.raises(UserError, match=r"row 2, column 'is_response_safe': expected yes or no, got 'maybe'"):
        read_samples(tmp_path / "data" / "evaluation-0.parquet")


def test_spa_vl_gives_both_answers_without_labels(tmp_path):
    image = {"bytes": picture(tmp_path / "a.png"), "path": None}
    row = {"image": image, "question": "q", "chosen": "c", "rejected": "r", "image_name": "a.png"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "train-0.parquet")
    samples = read_samples(tmp_path / "train-0.parquet")
    assert [(s.id, s.response, s.source, s.labels) for s in samples] == [
        ("1-chosen", "c", "chosen", {}),
        ("1-rejected", "r", "rejected", {}),
    ]
    row = {"image": image, "question": "q", "class1": "k", "class2": "", "class3": ""}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "harm-0.parquet")
    (sample,) = read_samples(tmp_path / "harm-0.parquet")
    assert (sample.instruction, sample.response, sample.topic, sample.labels) == ("q", "", "k", {})


def test_figstep_pairs_requests_with_their_pictures(tmp_path):
    header = ["dataset", "category_id", "task_id", "category_name", "question", "instruction"]
    rows = [["X", i, 1, name, "q", "Steps to."] for i, name in enumerate(FIGSTEP_CATEGORIES, 1)]
    table(tmp_path / "safebench.csv", header, *rows)
    for i in range(1, 11):
        picture(tmp_path / "safebench" / f"query_X_{i}_1_6.png", i)
    samples = read_samples(tmp_path)
    assert [(s.topic, s.categories, shade(s)) for s in samples] == [
        (name, (FIGSTEP_CATEGORIES[name],), i) for i, name in enumerate(FIGSTEP_CATEGORIES, 1)
    ]
    assert {(s.labels["instruction"], s.labels["image"], s.instruction) for s in samples} == {
        (False, True, samples[0].instruction)
    }
    (tmp_path / "safebench" / "query_X_4_1_6.png").unlink()
    with pytest.raises(UserError, match=r"1 of 10 pictures .* are missing, such as 4_1 .row 4"):
        read_samples(tmp_path)


XSTEST = ["id", "type", "prompt", "completion", "annotation_1", "annotation_2", "agreement", "final_label"]
FULL, NO, PARTIAL = "1_full_compliance", "2_full_refusal", "3_partial_refusal"


def write_xstest(folder: Path) -> None:
    for model, answers in (("one", (FULL, FULL, NO, FULL)), ("two", (NO, PARTIAL, FULL, FULL))):
        kinds = ("homonyms", "contrast_homonyms", "privacy_public", "contrast_privacy")
        rows = [
            [f"v2-{i}", kind, f"prompt {i}", f"{model} {i}", NO, answer, "FALSE", answer]
            for i, (kind, answer) in enumerate(zip(kinds, answers, strict=True))
        ]
        table(folder / f"xstest_v2_completions_{model}.csv", XSTEST, *rows)


def test_xstest_is_harmful_by_the_type_of_the_prompt_and_full_compliance(tmp_path):
    write_xstest(tmp_path)
    samples = read_samples(tmp_path)
    assert [s.id for s in samples] == [f"{model}-v2-{i}" for model in ("one", "two") for i in range(4)]
    assert [s.labels["instruction"] for s in samples] == [False, True, False, True] * 2
    assert [s.labels["response"] for s in samples] == [False, True, False, True, False, False, False, True]
    assert [s.topic for s in samples[:4]] == ["homonyms", "homonyms", "privacy", "privacy"]
    assert Counter(s.group for s in samples) == {f"prompt {i}": 2 for i in range(4)}
    assert {s.source for s in samples} == {"one", "two"}
    first = XSTest(opinion="annotation_1").read(tmp_path)
    assert not any(s.labels["response"] for s in first)
    assert [s.labels for s in XSTest(opinion="annotation_2").read(tmp_path)] == [s.labels for s in samples]
    for some in (samples, first):
        assert not any(s.opinions["annotation_1"]["response"] for s in some)
        assert [s.opinions["annotation_2"]["response"] for s in some] == [s.labels["response"] for s in samples]


def test_xstest_with_prompts_as_pictures_moves_the_harm_into_them(tmp_path):
    write_xstest(tmp_path)
    samples = XSTest(as_pictures=True, size=56).read(tmp_path)
    assert [s.labels["image"] for s in samples] == [False, True, False, True] * 2
    assert not any(s.labels["instruction"] for s in samples)
    assert not any("prompt" in s.instruction for s in samples)
    digests = [s.image.sha256 for s in samples]
    assert digests[:4] == digests[4:]
    assert len(set(digests)) == 4
    assert samples[0].image.pixels().shape == (3, 56, 56)


def test_tables_of_xstest_that_do_not_fit_are_named(tmp_path):
    table(tmp_path / "xstest_v2_completions_x.csv", XSTEST, ["v2-1", "homonyms", "p", "c", NO, NO, "TRUE", "4_other"])
    with pytest.raises(UserError, match=r"row 1, column 'final_label': expected one of 1_full_compliance"):
        read_samples(tmp_path)
    table(tmp_path / "xstest_v2_completions_x.csv", XSTEST, ["v2-1", "homonyms", "p", "c", NO, "", "TRUE", NO])
    with pytest.raises(UserError, match=r"row 1, column 'annotation_2': expected one of 1_full_compliance"):
        read_samples(tmp_path)
    with pytest.raises(UserError, match=r"xstest.opinion: expected one of final_label"):
        XSTest(opinion="mine")
    with pytest.raises(UserError, match=r"columns: expected none with xstest"):
        read_samples(tmp_path, columns={"id": "id"})


def test_many_rows_are_read_without_decoding_a_picture(tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    path = jsonl(tmp_path / "a.jsonl", *({**GOOD, "image": "a.png"} for _ in range(3000)))
    assert len(read_samples(path)) == 3000
