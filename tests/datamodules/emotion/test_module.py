"""Parts, batches and statistics against plain loops over the clips."""

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import EmotionDataModule, PlantedConflicts
from datamodules.loaders import eval_blocks
from leanlight.contracts import EmotionData, ResumablePrediction, UserError

COUNT = 60


def arrays() -> dict[str, np.ndarray]:
    """Two modalities: vectors, of which some clips have none, and sequences, some of them without steps."""
    generator = np.random.default_rng(0)
    return {
        "id": np.array([f"clip{row}" for row in range(COUNT)]),
        "speaker": np.array([f"speaker{row % 7}" for row in range(COUNT)]),
        "label": generator.integers(0, 3, COUNT),
        "text": generator.normal(2, 5, (COUNT, 4)).astype(np.float32),
        "text_present": np.arange(COUNT) % 11 != 3,
        "audio": generator.normal(-1, 3, (COUNT, 8, 3)).astype(np.float32),
        "audio_length": np.where(np.arange(COUNT) % 9 == 6, 0, generator.integers(1, 7, COUNT)),
    }


def write(folder: Path, **changes) -> str:
    np.savez(folder / "clips.npz", **{k: v for k, v in {**arrays(), **changes}.items() if v is not None})
    return str(folder / "clips.npz")


def ready(**arguments) -> EmotionDataModule:
    data = EmotionDataModule(**arguments)
    data.setup()
    return data


def digits(**arguments) -> EmotionDataModule:
    return ready(planted=PlantedConflicts(train=100, val=30, test=41), **arguments)


def order(loader) -> list[int]:
    return list(chain.from_iterable(batch.index.tolist() for batch in loader))


def test_a_batch_holds_its_clips_scaled_by_the_training_part_alone(tmp_path):
    data, read = ready(dataset="npz", path=write(tmp_path), split="random", eval_batch_size=5), arrays()
    place = {name: row for row, name in enumerate(read["id"].tolist())}
    train = [place[name] for name in data.names("train")]
    text = np.stack([read["text"][row] for row in train if read["text_present"][row]]).astype(np.float64)
    audio = np.concatenate([read["audio"][row, : read["audio_length"][row]] for row in train]).astype(np.float64)
    seen = 0
    for batch in data.test_dataloader():
        assert batch.features["audio"].shape[1] == batch.length["audio"].max()
        for at, index in enumerate(batch.index.tolist()):
            row = place[data.names("test")[index]]
            steps = int(read["audio_length"][row])
            assert (int(batch.length["audio"][at]), bool(batch.present["audio"][at])) == (steps, steps > 0)
            expected = (read["audio"][row, :steps] - audio.mean(0)) / audio.std(0)
            assert np.allclose(batch.features["audio"][at, :steps], expected, atol=1e-5)
            assert not batch.features["audio"][at, steps:].any()
            expected = (read["text"][row] - text.mean(0)) / text.std(0) * read["text_present"][row]
            assert np.allclose(batch.features["text"][at], expected, atol=1e-5)
            assert batch.label[at] == read["label"][row]
            seen += 1
    assert seen == data.meta.counts["test"] == 12
    assert batch.score is None
    assert batch.conflict is None


def test_without_scaling_features_are_those_of_the_file(tmp_path):
    data, read = ready(dataset="npz", path=write(tmp_path), standardise=False), arrays()
    batch = data.test_split.batch(torch.arange(3))
    for at in range(3):
        row = int(data.names("test")[at].removeprefix("clip"))
        assert np.array_equal(batch.features["text"][at], read["text"][row] * read["text_present"][row])


def test_a_constant_feature_becomes_zero(tmp_path):
    text = arrays()["text"]
    text[:, 1] = 1e4 + 0.123
    data = ready(dataset="npz", path=write(tmp_path, text=text))
    assert data.train_split.batch(torch.arange(20)).features["text"][:, 1].abs().max() < 1e-2


def test_meta_tells_widths_longest_sequences_and_counts(tmp_path):
    data, read = ready(dataset="npz", path=write(tmp_path)), arrays()
    meta = data.meta
    assert {name: (one.width, one.longest) for name, one in meta.modalities.items()} == {
        "text": (4, 0),
        "audio": (3, int(read["audio_length"].max())),
    }
    rows = [int(name.removeprefix("clip")) for name in data.names("train")]
    assert dict(enumerate(meta.class_counts)) == Counter(read["label"][rows].tolist())
    assert (meta.classes, meta.score_range) == (("0", "1", "2"), None)


@pytest.mark.parametrize("scheme", ["speaker", "random"])
def test_parts_are_disjoint_and_by_speaker_share_none(tmp_path, scheme):
    data, read = ready(dataset="npz", path=write(tmp_path), split=scheme), arrays()
    parts = {part: [int(n.removeprefix("clip")) for n in data.names(part)] for part in ("train", "val", "test")}
    assert sorted(chain.from_iterable(parts.values())) == list(range(COUNT))
    speakers = [set(read["speaker"][rows]) for rows in parts.values()]
    shared = (speakers[0] & speakers[1]) | (speakers[0] & speakers[2]) | (speakers[1] & speakers[2])
    assert bool(shared) == (scheme == "random")
    again = ready(dataset="npz", path=write(tmp_path), split=scheme, seed=1, split_seed=0)
    other = ready(dataset="npz", path=write(tmp_path), split=scheme, split_seed=1)
    assert data.meta.fingerprint == again.meta.fingerprint != other.meta.fingerprint
    assert data.names("test") == again.names("test") != other.names("test")


def test_the_publishers_parts_are_kept_and_validation_is_held_out_where_there_is_none(tmp_path):
    split = np.where(np.arange(COUNT) < 40, "train", np.where(np.arange(COUNT) < 55, "test", ""))
    path = write(tmp_path, split=split)
    data, whole = ready(dataset="npz", path=path), ready(dataset="npz", path=path, val_fraction=0)
    assert set(data.names("train")) | set(data.names("val")) == {f"clip{row}" for row in range(40)}
    assert whole.names("train") == tuple(f"clip{row}" for row in range(40))
    assert whole.val_dataloader() == []
    assert data.names("test") == tuple(f"clip{row}" for row in range(40, 55))
    assert data.meta.counts["val"] == 6


def test_an_epoch_has_every_clip_once_and_goes_on_in_its_middle():
    data = digits(batch_size=7)
    whole = order(data.train_dataloader())
    assert sorted(whole) == list(range(100)) != whole
    loader = data.train_dataloader()
    batches = iter(loader)
    first = [next(batches).index.tolist() for _ in range(3)]
    resumed = data.train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert list(chain.from_iterable(first)) + order(resumed) == whole


def test_a_clip_has_the_same_features_alone_and_among_others(tmp_path):
    data = ready(dataset="npz", path=write(tmp_path))
    together = data.train_split.batch(torch.arange(30))
    for at in range(30):
        alone = data.train_split.batch(torch.tensor([at]))
        steps = alone.features["audio"].shape[1]
        assert torch.equal(alone.features["audio"][0], together.features["audio"][at, :steps])
        assert torch.equal(alone.features["text"][0], together.features["text"][at])


def test_two_processes_share_the_clips_of_a_part():
    data = digits()
    shares = [data.test_split.batch(block) for rank in (0, 1) for block in eval_blocks(41, 16, rank, 2)]
    assert sorted(order(shares)) == order(data.test_dataloader()) == list(range(41))


def test_prediction_goes_through_its_part_and_leaves_out_what_is_done():
    data = digits(predict_split="val", eval_batch_size=8)
    assert isinstance(data, ResumablePrediction)
    assert isinstance(data, EmotionData)
    assert order(data.predict_dataloader()) == list(range(30))
    data.skip_predicted(torch.arange(0, 30, 3))
    assert order(data.predict_dataloader()) == [one for one in range(30) if one % 3]


def test_planted_batches_know_every_strips_class_and_the_conflict():
    data = digits(modalities=["right", "left"])
    batch = data.test_split.batch(torch.arange(41))
    assert list(batch.features) == list(batch.unimodal) == ["right", "left"]
    shown = torch.stack(list(batch.unimodal.values()))
    foreign = (shown != batch.label).any(0)
    assert foreign.any()
    assert not (foreign & ~batch.conflict).any()
    assert (batch.conflict & ~foreign).any()  # where the middle strip is foreign


def test_clips_without_labels_are_for_prediction_and_scaled_as_the_models_own(tmp_path):
    trained = ready(dataset="npz", path=write(tmp_path))
    state = trained.state_dict()
    other = tmp_path / "other"
    other.mkdir()
    data = ready(dataset="npz", path=write(other, label=None, text=arrays()["text"] * 3 + 1))
    assert data.meta.counts == {"train": 0, "val": 0, "test": COUNT}
    data.load_state_dict(state)
    batch = data.test_split.batch(torch.arange(3))
    mean, deviation = trained.statistics["text"]
    expected = (torch.from_numpy(arrays()["text"][:3] * 3 + 1) - mean) / deviation
    assert torch.allclose(batch.features["text"], expected)
    assert (batch.label == -1).all()
    with pytest.raises(UserError, match="have no labels, so that nothing can be trained"):
        data.train_dataloader()


def test_features_of_another_extractor_are_refused(tmp_path):
    ours = ready(dataset="npz", path=write(tmp_path, extractors=np.array('{"text": "aaaa", "audio": "cccc"}')))
    other = tmp_path / "other"
    other.mkdir()
    theirs = ready(dataset="npz", path=write(other, extractors=np.array('{"text": "bbbb", "audio": "cccc"}')))
    assert ours.meta.extractors == {"text": "aaaa", "audio": "cccc"}
    ours.load_state_dict(ours.state_dict())
    with pytest.raises(UserError, match=r"the text features of .* another extractor \(bbbb\) .* trained on \(aaaa\)"):
        theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"modalities": ["text", "voice"]}, "modalities: expected some of text, audio, got 'voice'"),
        ({}, {"split": "official"}, "split: expected one of speaker, random with npz, got 'official'"),
        (
            {"speaker": np.array(["one"] * COUNT)},
            {},
            "split: speaker cannot hold 0.2 of 60 clips of 1 speakers out for test; use split: random",
        ),
        ({"split": np.array(["train"] * COUNT)}, {}, "split: the test part of .* by 'official' has no clip"),
    ],
)
def test_parts_that_cannot_be_made_are_named(tmp_path, changes, arguments, message):
    with pytest.raises(UserError, match=message):
        ready(dataset="npz", path=write(tmp_path, **changes), **arguments)


def test_vectors_of_mosi_that_saw_the_test_clips_are_refused_in_one_line(tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "cmu_mosi").mkdir()
    names = np.array([f"v{row // 4}_{row}" for row in range(40)])
    np.savez(
        tmp_path / "cmu_mosi" / "mosi_utterances.npz",
        id=names,
        score=generator.uniform(-3, 3, 40),
        split_speaker_independent=np.where(np.arange(40) < 28, "train", "test"),
        split_official=np.array(["train", "valid", "test", "train"] * 10),
        **{f"{m}_feat": generator.normal(size=(40, 5)) for m in ("text", "audio", "video")},
    )
    data = ready(dataset="mosi", root=tmp_path)
    assert not {n.split("_")[0] for n in data.names("train")} & {n.split("_")[0] for n in data.names("val")}
    assert data.names("test") == tuple(names[28:])
    assert ready(dataset="mosi", root=tmp_path, split="official", modalities=["audio"]).meta.counts["test"] == 10
    with pytest.raises(UserError, match=r"split: official is refused with the text of mosi: .*558") as caught:
        ready(dataset="mosi", root=tmp_path, split="official")
    assert "\n" not in str(caught.value)
    np.savez(tmp_path / "text.npz", id=names, text=np.ones((40, 2), np.float32))
    clean = {"modalities": ["text", "audio"], "text": tmp_path / "text.npz"}
    assert ready(dataset="mosi", root=tmp_path, split="official", **clean).meta.modalities["text"].width == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "plantd"}, "dataset: expected one of .*did you mean 'planted'"),
        ({"dataset": "npz"}, "path: expected the place of npz data, got none"),
        ({"path": "x"}, "path: expected none with dataset planted"),
        ({"dataset": "mosi", "planted": PlantedConflicts()}, "planted: expected none with dataset 'mosi'"),
        ({"folders": {"text": "x"}}, "folders: expected none with dataset 'planted'; it is for mertools"),
        ({"modalities": []}, "modalities: expected at least one"),
        ({"modalities": ["left", "left"]}, "modalities: expected at least one, and each once"),
        ({"val_fraction": 1.0}, r"val_fraction: expected a number in \[0, 1\), got 1.0"),
        ({"test_fraction": 0}, "test_fraction: expected a number in"),
        ({"predict_split": "all"}, "predict_split: expected one of train, val, test, got 'all'"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"dataset": "mosi", "levels": [1.0, 0.0]}, "levels: expected ascending scores between -3 and 3"),
        ({"dataset": "mosi", "score_range": (1.0, 1.0)}, "score_range: expected the least and the greatest score"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        EmotionDataModule(**arguments)
