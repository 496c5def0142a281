"""Files in their publishers' layouts, against what was written."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from datamodules.emotion import readers, sources
from datamodules.emotion.catalog import EMOTIONS
from datamodules.emotion.clips import checked, graded
from leanlight.contracts import UserError


def mmsa_part(part: str, count: int, steps: int = 6, aligned: bool = False, sims: bool = False) -> dict:
    generator = np.random.default_rng(count)
    lengths = generator.integers(1, steps + 1, (2, count))
    mask = np.arange(steps) < generator.integers(1, steps + 1, count)[:, None]
    content = {
        "raw_text": np.array(["some words"] * count, object),
        "audio": generator.normal(size=(count, steps, 3)),
        "vision": generator.normal(size=(count, steps, 2)).astype(np.float32),
        "id": np.array([f"{part}{row // 2}$_$clip{row}" for row in range(count)]),
        "text": generator.normal(size=(count, steps, 4)).astype(np.float32),
        "text_bert": np.stack([mask * 7, mask, mask * 0], axis=1).astype(np.float32),
        "annotations": ["Positive"] * count,
        "classification_labels": np.zeros(count),
        "regression_labels": generator.uniform(-1, 1, count).astype(np.float32),
    }
    if not aligned:
        content |= {"audio_lengths": lengths[0].tolist(), "vision_lengths": lengths[1].tolist()}
    if sims:
        content |= {f"regression_labels_{m}": generator.uniform(-1, 1, count) for m in "TAV"}
    return content


def write_mmsa(path: Path, protocol: int = 4, **kinds) -> dict:
    sizes = {"train": 6, "valid": 3, "test": 4}
    content = {part: mmsa_part(part, count, **kinds) for part, count in sizes.items()}
    path.write_bytes(pickle.dumps(content, protocol))
    return content


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_mmsa_are_read_as_pickle_reads_them(tmp_path, protocol):
    path = tmp_path / "unaligned.pkl"
    content = write_mmsa(path, protocol)
    clips = readers.read_pickle(path)
    row = 0
    for part, name in (("train", "train"), ("valid", "val"), ("test", "test")):
        for place, clip in enumerate(content[part]["id"].tolist()):
            assert clips.names[row] == clip
            assert clips.splits["official"][row] == name
            assert clips.speaker[row] == clip.split("$_$")[0]
            assert clips.score[row] == content[part]["regression_labels"][place]
            for ours, theirs in (("text", "text"), ("audio", "audio"), ("video", "vision")):
                assert np.array_equal(clips.features[ours][row], content[part][theirs][place])
            assert clips.length["audio"][row] == content[part]["audio_lengths"][place]
            assert clips.length["text"][row] == content[part]["text_bert"][place, 1].sum()
            row += 1
    assert row == len(clips)
    assert not clips.unimodal


def test_parts_with_sequences_of_different_lengths_are_padded(tmp_path):
    content = {"train": mmsa_part("a", 3, 4), "test": mmsa_part("b", 2, 6)}
    path = tmp_path / "two.pkl"
    path.write_bytes(pickle.dumps(content))
    clips = checked(readers.read_pickle(path), clean=False)
    assert clips.features["audio"].shape == (5, 6, 3)
    steps = content["train"]["audio_lengths"][0]
    assert np.array_equal(clips.features["audio"][0, :steps], content["train"]["audio"][0, :steps].astype(np.float32))
    assert not clips.features["audio"][0, steps:].any()


def test_sims_has_what_each_modality_shows_alone(tmp_path):
    path = tmp_path / "sims" / "unaligned_39.pkl"
    path.parent.mkdir()
    content = write_mmsa(path, sims=True)
    info = EMOTIONS["sims"]
    clips = graded(sources.load("sims", tmp_path), info.score_range, info.levels, info.level_names)

    def by_hand(score: float) -> str:
        for bound, name in zip((-0.7, -0.1, 0.1, 0.7), info.level_names, strict=False):
            if score <= bound:
                return name
        return "positive"

    scores = np.concatenate([content[part]["regression_labels_A"] for part in ("train", "valid", "test")])
    assert [clips.classes[label] for label in clips.unimodal["audio"]] == [by_hand(score) for score in scores]
    assert list(clips.unimodal) == ["text", "audio", "video"]


def test_a_hostile_pickle_is_refused_and_does_nothing(tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "marker",)

    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps({"train": {"id": Hostile()}}))
    with pytest.raises(UserError, match=rf"{path} was refused: .*not admitted"):
        readers.read_pickle(path)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "train lacks 'id'"),
        ({"regression_labels": None}, "train lacks 'regression_labels'"),
        ({"audio": np.array(["a"] * 6)}, r"train.audio: expected numbers \(N, D\) or \(N, L, D\), got <U1"),
        ({"audio": [object] * 0}, r"train.audio: expected numbers"),
        ({"regression_labels": ["a"] * 6}, "regression_labels: expected a number a clip"),
        ({"vision": None}, "expected the same modalities and labels in every part"),
    ],
)
def test_pickles_that_lack_something_are_named(tmp_path, change, message):
    content = {"train": mmsa_part("a", 6), "test": mmsa_part("b", 2)}
    for name, value in change.items():
        if value is None:
            del content["train"][name]
        else:
            content["train"][name] = value
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=message):
        readers.read_pickle(path)


# ---- MERTools ----


def write_mertools(folder: Path, frames: bool = False, words: bool = True) -> dict:
    generator = np.random.default_rng(0)
    emotions = ["neutral", "happy", "sad", "neutral", "angry"]
    corpora: dict = {"train_corpus": {}, "test1_corpus": {}, "test3_corpus": {}}
    for number, emotion in enumerate(emotions * 3):
        part = list(corpora)[number % 3]
        corpora[part][f"clip{number}"] = {"emo": emotion if words else 0, "val": float(number) / 10 - 0.5}
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "label-6way.npz", **{k: np.array(v, object) for k, v in corpora.items()})
    features = {}
    for name, width in (("roberta-UTT", 4), ("hubert-FRA", 3)):
        (folder / "features" / name).mkdir(parents=True, exist_ok=True)
        for corpus in corpora.values():
            for clip in corpus:
                shape = (int(generator.integers(1, 6)), width) if name.endswith("FRA") and frames else (width,)
                features[name, clip] = generator.normal(size=shape)
                np.save(folder / "features" / name / f"{clip}.npy", features[name, clip])
    return {"corpora": corpora, "features": features}


@pytest.mark.parametrize("frames", [False, True])
def test_a_folder_of_mertools_gives_emotions_parts_and_features(tmp_path, frames):
    written = write_mertools(tmp_path, frames)
    clips = readers.read_mertools(tmp_path, {"text": "roberta-UTT", "audio": "hubert-FRA"})
    assert clips.classes == ("neutral", "angry", "happy", "sad")
    rows = {name: row for row, name in enumerate(clips.names)}
    for corpus, marks in (
        ("train_corpus", ("train", "train")),
        ("test1_corpus", ("test", "")),
        ("test3_corpus", ("", "test")),
    ):
        for name, known in written["corpora"][corpus].items():
            row = rows[name]
            assert clips.classes[clips.label[row]] == known["emo"]
            assert (clips.splits["official"][row], clips.splits["test3"][row]) == marks
            assert np.array_equal(clips.features["text"][row], written["features"]["roberta-UTT", name].astype("f4"))
            audio = written["features"]["hubert-FRA", name].astype("f4")
            steps = clips.length["audio"][row] if frames else None
            assert np.array_equal(
                clips.features["audio"][row, :steps] if frames else clips.features["audio"][row], audio
            )


def test_without_words_for_emotions_the_valence_is_the_score(tmp_path):
    written = write_mertools(tmp_path, words=False)
    clips = readers.read_mertools(tmp_path, {"text": "roberta-UTT"})
    known = {name: value for corpus in written["corpora"].values() for name, value in corpus.items()}
    assert clips.score.tolist() == [known[name]["val"] for name in clips.names]
    assert clips.label is None


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ({"text": "roberta"}, "folders: expected a folder of features, got .*roberta.*did you mean 'roberta-UTT'"),
        (None, "folders: expected a folder of .* there are hubert-FRA, roberta-UTT"),
    ],
)
def test_a_folder_of_features_that_is_not_there_is_named(tmp_path, folders, message):
    write_mertools(tmp_path)
    with pytest.raises(UserError, match=message):
        readers.read_mertools(tmp_path, folders)


def test_a_clip_without_features_is_named(tmp_path):
    write_mertools(tmp_path)
    (tmp_path / "features" / "roberta-UTT" / "clip4.npy").unlink()
    with pytest.raises(UserError, match=r"clip4.npy is missing"):
        readers.read_mertools(tmp_path, {"text": "roberta-UTT"})


def test_hostile_labels_of_mertools_are_refused(tmp_path):
    write_mertools(tmp_path)

    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "marker",)

    np.savez(tmp_path / "label-6way.npz", train_corpus=np.array(Hostile(), object), test_corpus=np.array({}, object))
    with pytest.raises(UserError, match="was refused"):
        readers.read_mertools(tmp_path, {"text": "roberta-UTT"})
    assert not (tmp_path / "marker").exists()


# ---- flat arrays ----


def flat() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "id": np.array(["a", "b", "c", "d"]),
        "split": np.array(["train", "valid", "test", ""]),
        "speaker": np.array(["p", "p", "q", "q"]),
        "classes": np.array(["low", "high"]),
        "label": np.array([0, 1, 1, 0]),
        "text": generator.normal(size=(4, 3)).astype(np.float32),
        "audio": generator.normal(size=(4, 5, 2)).astype(np.float32),
        "audio_length": np.array([5, 1, 2, 0]),
        "text_label": np.array([0, 1, 0, 0]),
        "text_present": np.array([True, True, False, True]),
        "conflict": np.array([False, False, True, False]),
        "extractors": np.array(json.dumps({"text": "ab" * 32})),
    }


def write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    texts = {name: array for name, array in arrays.items() if array.dtype.kind == "U"}
    save_file(
        {name: array for name, array in arrays.items() if name not in texts},
        path,
        {name: str(array) if array.ndim == 0 else json.dumps(array.tolist()) for name, array in texts.items()},
    )


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_flat_arrays_are_read_alike_from_both_kinds_of_files(tmp_path, kind):
    arrays, path = flat(), tmp_path / f"clips.{kind}"
    np.savez(path, **arrays) if kind == "npz" else write_safetensors(path, arrays)
    clips = sources.load(kind, tmp_path, path)
    assert clips.names == ("a", "b", "c", "d")
    assert clips.classes == ("low", "high")
    assert clips.label.tolist() == [0, 1, 1, 0]
    assert clips.splits["official"].tolist() == ["train", "val", "test", ""]
    assert clips.speaker.tolist() == ["p", "p", "q", "q"]
    assert {name: np.array_equal(array, arrays[name]) for name, array in clips.features.items()} == {
        "text": True,
        "audio": True,
    }
    assert clips.length["audio"].tolist() == [5, 1, 2, 0]
    assert clips.unimodal["text"].tolist() == [0, 1, 0, 0]
    assert clips.present["text"].tolist() == [True, True, False, True]
    assert clips.extractors == {"text": "ab" * 32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "lacks the array 'id'"),
        ({"text_lenght": np.zeros(4, int)}, "array 'text_lenght' .*did you mean 'text_length'"),
        ({"label": np.array([0.0, 1, 1, 0])}, r"label: expected whole numbers \(N,\), got float64"),
        ({"label": np.array([0, 1, 2, 0])}, "label: expected 0 to 1, got 0 to 2"),
        ({"split": np.array(["train", "dev", "test", ""])}, "split: expected one of train, val, test, got 'dev'"),
        ({"extractors": np.array("no json")}, "extractors: expected JSON"),
        ({"text": None, "text_label": None, "text_present": None, "audio": None, "audio_length": None}, "no modality"),
    ],
)
def test_flat_arrays_that_do_not_fit_are_named(tmp_path, change, message):
    arrays = {name: array for name, array in {**flat(), **change}.items() if array is not None}
    np.savez(tmp_path / "clips.npz", **arrays)
    with pytest.raises(UserError, match=message):
        readers.read_arrays(tmp_path / "clips.npz")


def test_a_table_labels_clips_by_name(tmp_path):
    arrays = {name: array for name, array in flat().items() if name in ("id", "text")}
    np.savez(tmp_path / "clips.npz", **arrays)
    clips = readers.read_arrays(tmp_path / "clips.npz")
    assert clips.label is None
    table = tmp_path / "labels.csv"
    table.write_text("id,label,split\nd,happy,train\na,sad,test\nc,happy,train\n")
    found = readers.with_table(clips, table)
    assert found.names == ("d", "a", "c")
    assert [found.classes[label] for label in found.label] == ["happy", "sad", "happy"]
    assert np.array_equal(found.features["text"], arrays["text"][[3, 0, 2]])
    assert found.splits["official"].tolist() == ["train", "test", "train"]
    table.write_text("id,label\na,10\nb,9\n")
    assert readers.with_table(clips, table).classes == ("9", "10")
    table.write_text("id,score\na,1.5\n")
    assert readers.with_table(clips, table).score.tolist() == [1.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na,x\n", "expected the columns id, and label or score"),
        ("id,label\naa,x\n", "clip 'aa' has no features"),
        ("id,label\na,x\nb,\n", "label: expected one for every clip, got none for 'b'"),
        ("id,score\na,x\n", "score: expected a number a clip"),
    ],
)
def test_tables_that_do_not_fit_are_named(tmp_path, text, message):
    np.savez(tmp_path / "clips.npz", **{name: array for name, array in flat().items() if name in ("id", "text")})
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        readers.with_table(readers.read_arrays(tmp_path / "clips.npz"), tmp_path / "labels.csv")


# ---- where sets are looked for ----


def write_mosi(root: Path, count: int = 40) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays = {
        "id": np.array([f"video{row // 4}_{row}" for row in range(count)]),
        "text": np.array(["WORDS"] * count),
        "split_speaker_independent": np.where(np.arange(count) < 28, "train", "test"),
        "split_official": generator.permutation(["train"] * 24 + ["valid"] * 6 + ["test"] * (count - 30)),
        "label": np.zeros(count, np.int8),
        "score": generator.uniform(-3, 3, count).astype(np.float32),
    } | {f"{m}_feat": generator.normal(size=(count, 5)).astype(np.float32) for m in ("text", "audio", "video")}
    (root / "cmu_mosi").mkdir()
    np.savez(root / "cmu_mosi" / "mosi_utterances.npz", **arrays)
    return arrays


def test_text_vectors_of_a_file_replace_those_of_mosi_by_name(tmp_path):
    arrays = write_mosi(tmp_path)
    order = np.random.default_rng(1).permutation(40)
    vectors = np.arange(80, dtype=np.float32).reshape(40, 2)
    np.savez(tmp_path / "text.npz", id=arrays["id"][order], text=vectors[order])
    clips = sources.load("mosi", tmp_path, text=tmp_path / "text.npz")
    assert np.array_equal(clips.features["text"], vectors)
    assert np.array_equal(clips.features["audio"], arrays["audio_feat"])
    assert list(clips.refused["official"]) == ["video"]
    np.savez(tmp_path / "text.npz", id=arrays["id"][:30], text=vectors[:30])
    with pytest.raises(UserError, match=r"text: clip 'video7_30' of .* is not in .*text.npz"):
        sources.load("mosi", tmp_path, text=tmp_path / "text.npz")


def test_a_set_that_is_nowhere_names_every_place(tmp_path):
    with pytest.raises(UserError, match=r"tried: .*mosei/aligned_50.pkl; .*mosei/unaligned_50.pkl; .*to get it: get"):
        sources.load("mosei", tmp_path)
    with pytest.raises(UserError, match="path: expected the place of pickle data, got 'nowhere'"):
        sources.load("pickle", tmp_path, "nowhere")
