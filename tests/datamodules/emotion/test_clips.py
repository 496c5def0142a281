"""What must hold for clips, whatever they come from."""

import numpy as np
import pytest

from datamodules.emotion.clips import Clips, checked, graded, with_conflicts
from leanlight.contracts import UserError


def made(**changes) -> Clips:
    generator = np.random.default_rng(0)
    fields = {
        "names": ("a", "b", "c"),
        "features": {"text": generator.normal(size=(3, 4)), "audio": generator.normal(size=(3, 5, 2))},
        "source": "here",
        "length": {"audio": np.array([5, 2, 3])},
        "label": np.array([0, 1, 0]),
        "classes": ("x", "y"),
    }
    return Clips(**{**fields, **changes})


def spoilt(name: str, place: tuple[int, ...], value: float) -> dict:
    features = {key: array.copy() for key, array in made().features.items()}
    features[name][place] = value
    return {"features": features}


def test_padding_is_zero_and_what_is_read_stays_as_it_was():
    read = made()
    before = read.features["audio"].copy()
    clips = checked(read, clean=False)
    assert np.array_equal(read.features["audio"], before)
    for row, steps in enumerate([5, 2, 3]):
        assert not clips.features["audio"][row, steps:].any()
        assert np.array_equal(clips.features["audio"][row, :steps], before[row, :steps].astype(np.float32))
    assert clips.features["text"].dtype == np.float32
    assert all(has.all() for has in clips.present.values())


def test_silence_of_minus_infinity_becomes_zero_with_its_neighbours_kept():
    clips = checked(made(**spoilt("audio", (1, 1, 0), -np.inf)), clean=False)
    assert clips.features["audio"][1, 1].tolist() == [0.0, np.float32(made().features["audio"][1, 1, 1])]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(("name", "place"), [("text", (1, 3)), ("audio", (1, 0, 1))])
def test_what_is_no_number_is_named_by_clip_and_modality_or_set_to_zero(name, place, value):
    read = made(**spoilt(name, place, value))
    with pytest.raises(UserError, match=f"NaN or infinity in {name} of clip 'b'; clean: true"):
        checked(read, clean=False)
    clean, whole = checked(read, clean=True).features[name], made().features[name].astype(np.float32)
    assert clean[place] == 0
    assert (clean != checked(made(), False).features[name]).sum() == 1
    assert np.isfinite(whole[place])


def test_what_stands_behind_a_length_does_not_matter():
    assert not checked(made(**spoilt("audio", (1, 4, 0), np.nan)), clean=False).features["audio"][1, 2:].any()


def test_a_clip_without_steps_lacks_the_modality_and_one_without_any_is_named():
    clips = checked(made(length={"audio": np.array([5, 0, 3])}), clean=False)
    assert clips.present["audio"].tolist() == [True, False, True]
    assert not clips.features["audio"][1].any()
    gone = made(length={"audio": np.array([5, 0, 3])}, present={"text": np.array([True, False, True])})
    with pytest.raises(UserError, match="clip 'b' has no step in any of text, audio; clean: true"):
        checked(gone, clean=False)
    rest = checked(gone, clean=True)
    assert rest.names == ("a", "c")
    assert rest.label.tolist() == [0, 0]
    assert rest.length["audio"].tolist() == [5, 3]


def test_without_lengths_zeros_at_the_end_are_padding():
    features = {"audio": np.zeros((3, 4, 2))}
    features["audio"][0, :3] = 1
    features["audio"][1, [0, 2]] = 1
    features["audio"][2, 3, 1] = 1
    clips = checked(made(features=features, length={}), clean=False)
    assert clips.length["audio"].tolist() == [3, 3, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": {"audio": np.array([5, 6, 1])}}, "length of audio: expected 0 to 5, .* got 6 of clip 'b'"),
        ({"length": {"audio": np.array([5, 2, -1])}}, "length of audio: expected 0 to 5, .* got -1 of clip 'c'"),
        ({"names": ("a", "b", "a")}, "id: expected every clip once in here, got 'a' twice"),
        ({"label": np.array([0, 1])}, "label: expected a row a clip, 3 in here, got 2"),
        ({"features": {"text": np.zeros((2, 4))}}, "features of text: expected a row a clip, 3 in here, got 2"),
        ({"features": {"text": np.zeros(3)}}, r"features of text: expected \(N, D\) or \(N, L, D\), got \(3,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        checked(made(**changes), clean=False)


def test_scores_become_classes_by_rounding_halves_to_even():
    score = np.array([-3.0, -2.5, -0.5, 0.4, 0.5, 1.5, 2.6])
    clips = made(names=tuple("abcdefg"), features={"text": np.ones((7, 1))}, label=None, classes=(), score=score)
    found = graded(clips, (-3.0, 3.0))
    assert [int(found.classes[label]) for label in found.label] == [round(one) for one in score.tolist()]
    assert found.classes == ("-3", "-2", "-1", "0", "1", "2", "3")


def test_levels_make_classes_that_hold_their_upper_end():
    score = np.array([-1.0, -0.7, -0.6, 0.0, 0.1, 0.2, 1.0])
    clips = made(names=tuple("abcdefg"), features={"text": np.ones((7, 1))}, label=None, classes=(), score=score)
    found = graded(clips, (-1.0, 1.0), (-0.7, 0.1))
    assert found.label.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert found.classes == ("-1 to -0.7", "-0.7 to 0.1", "0.1 to 1")


@pytest.mark.parametrize("value", [3.2, -4.0, np.nan])
def test_a_score_outside_the_range_is_named(value):
    with pytest.raises(UserError, match=f"score_range: expected scores from -3 to 3, got {value:g} of clip 'b'"):
        graded(made(score=np.array([0.0, value, 1.0])), (-3.0, 3.0))


def test_conflicts_follow_from_what_present_modalities_show():
    unimodal = {"text": np.array([0, 1, 1]), "audio": np.array([0, 0, 0])}
    clips = checked(made(unimodal=unimodal, length={"audio": np.array([5, 2, 0])}), clean=False)
    assert with_conflicts(clips).conflict.tolist() == [False, True, False]
    assert with_conflicts(checked(made(unimodal={"text": unimodal["text"]}), False)).conflict is None
