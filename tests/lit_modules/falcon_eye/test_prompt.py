"""Questions and answers of a judge against what its readers expect of them."""

import json
import re

import pytest
import torch
from squares import labelled

from leanlight.contracts import HARM_CATEGORIES, SAFETY_FIELDS, SafetySample, UserError
from lit_modules.falcon_eye.prompt import PictureSlot, Prompt, Text, UserText


class Square:
    """A grey picture."""

    name = "square"
    sha256 = "0"

    def pixels(self):
        return torch.full((3, 56, 56), 128, dtype=torch.uint8)


LABELS = {"instruction": False, "image": True, "response": True}


def sample(**changes):
    known = {"labels": LABELS, "categories": ("Fraud",), "explanation": "The square is red.", "image": Square()}
    return SafetySample("s", "Name the shape.", "A square.", **(known | changes))


def kinds(pieces):
    return [type(piece).__name__ for piece in pieces]


def test_the_answer_has_five_keys_in_the_published_order():
    assert Prompt().target(sample()) == (
        '"Instruction Judgment": "Benign",\n'
        '"Image Judgment": "Harmful",\n'
        '"Response Judgment": "Harmful",\n'
        '"Harmful Category": "Fraud",\n'
        '"Explanation": "The square is red."'
    )


def test_several_categories_are_a_list_and_the_answer_in_braces_is_json():
    explained = sample(categories=("Fraud", "Bias"), explanation='It says "go"\nand a backslash \\.')
    read = json.loads("{" + Prompt().target(explained) + "}")
    assert read["Harmful Category"] == ["Fraud", "Bias"]
    assert read["Explanation"] == explained.explanation


@pytest.mark.parametrize(
    ("settings", "keys"),
    [
        ({"targets": "judgments_only"}, "IiR"),
        ({"targets": "no_explanation"}, "IiRH"),
        ({"targets": "no_category"}, "IiRE"),
        ({"order": "explanation_first"}, "EIiRH"),
        ({"order": "explanation_first", "targets": "no_category"}, "EIiR"),
    ],
)
def test_targets_and_order_change_answer_and_requested_lines_alike(settings, keys):
    first = {"I": "Instruction Judgment", "i": "Image Judgment", "R": "Response Judgment", "H": "Harmful Category"}
    expected = [{**first, "E": "Explanation"}[key] for key in keys]
    prompt = Prompt(**settings)
    assert list(json.loads("{" + prompt.target(sample()) + "}")) == expected
    assert re.findall(r'^"([^"]+)":', prompt.pieces(sample())[-1].text, re.MULTILINE) == expected


def test_what_nobody_labelled_has_no_line():
    assert (
        Prompt().target(sample(labels={"image": True}, categories=(), explanation="")) == '"Image Judgment": "Harmful"'
    )
    benign = Prompt().target(sample(labels={"response": False}, categories=(), explanation=""))
    assert benign == '"Response Judgment": "Benign",\n"Harmful Category": "None"'
    with pytest.raises(UserError, match=r"sample 's': expected a label of .* got none"):
        Prompt().target(sample(labels={}))


def test_the_picture_comes_first_and_text_of_the_sample_stands_apart():
    pieces = Prompt().pieces(sample())
    assert kinds(pieces) == ["PictureSlot", "Text", "Text", "UserText", "Text", "UserText", "Text"]
    assert [piece.field for piece in pieces if isinstance(piece, UserText)] == ["instruction", "response"]
    assert "User Instruction: Name the shape.\nModel Response: A square.\n" in Prompt().text(sample())


def test_the_wording_names_all_categories_and_holds_nothing_of_the_sample():
    wording = "".join(piece.text for piece in Prompt().pieces(sample()) if isinstance(piece, Text))
    assert all(f'"{name}"' in wording for name in HARM_CATEGORIES)
    other = Prompt().pieces(SafetySample("t", "Else", "Other", image=Square()))
    assert wording == "".join(piece.text for piece in other if isinstance(piece, Text))


def test_text_only_asks_as_if_there_were_no_picture():
    blind = Prompt(modality="text_only")
    assert PictureSlot() not in blind.pieces(sample())
    assert blind.pieces(sample()) == Prompt().pieces(sample(image=None))
    assert not blind.shows_picture(sample())
    assert not Prompt().shows_picture(sample(image=None))


def test_image_only_asks_without_instruction_and_response():
    pieces = Prompt(modality="image_only").pieces(sample())
    assert kinds(pieces) == ["PictureSlot", "Text", "Text"]
    assert pieces == Prompt(modality="image_only").pieces(SafetySample("t", "Else", "Other", image=Square()))


def test_lines_of_judgements_begin_the_answer():
    assert Prompt().target(sample()).startswith(Prompt().judgements(LABELS))
    assert Prompt().judgements({}) == ""


def test_the_wording_for_a_tokenizer_covers_questions_and_answers():
    texts = "\n".join(Prompt().texts())
    assert all(word in texts for word in (*HARM_CATEGORIES, "Benign", "Harmful", "Explanation", "User Instruction:"))
    assert len(SAFETY_FIELDS) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": "all"}, r"targets: expected one of all_fields, .* got all"),
        ({"order": "judgment_first"}, r"order: .* got judgment_first \(did you mean 'judgments_first'\?\)"),
        ({"modality": "text"}, r"modality: .* got text"),
        ({"system": " "}, "system: expected default, none or a text"),
    ],
)
def test_settings_that_do_not_exist_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Prompt(**settings)


@pytest.mark.parametrize(
    ("modality", "fields", "hidden"),
    [
        ("vqa", SAFETY_FIELDS, None),
        ("text_only", SAFETY_FIELDS, "image"),
        ("text_only", ("instruction", "response"), None),
        ("image_only", SAFETY_FIELDS, "instruction"),
        ("image_only", ("image", "response"), "response"),
        ("image_only", ("image",), None),
    ],
)
def test_a_part_that_is_judged_and_never_shown_is_one_line(modality, fields, hidden):
    samples = [labelled(0), labelled(1), labelled(2, image=None)]
    prompt = Prompt(modality=modality)
    if hidden is None:
        prompt.require_shown(fields, samples)
        return
    count = "2 of 3" if hidden == "image" else "3 of 3"
    with pytest.raises(
        UserError, match=f"^prompt.modality: .* shows the {hidden}, .* of {count} samples, got {modality};"
    ):
        prompt.require_shown(fields, samples)
    if hidden == "image":
        prompt.require_shown(fields, samples[2:])
