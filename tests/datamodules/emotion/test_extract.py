"""From a folder of clips to features, by miniature encoders with random weights, against the encoders themselves."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile

from datamodules import EmotionDataModule
from datamodules.emotion import extract, readers
from datamodules.emotion.extract import Encoder, Extraction, find_clips, read_wav
from leanlight.cli import data as command
from leanlight.contracts import UserError

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a"]
NAMES = ("a", "b", "deep/c", "x")


def save_text(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=len(WORDS), max_position_embeddings=12, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(folder)  # as published: without the pooler
    return folder


def save_audio(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        conv_dim=(4, 4),
        conv_stride=(40, 8),
        conv_kernel=(80, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    transformers.Wav2Vec2Model(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=16000).save_pretrained(folder)
    return folder


def save_video(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    return {
        name: make(folder / name) for name, make in (("text", save_text), ("audio", save_audio), ("video", save_video))
    }


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


def clips(folder: Path) -> Path:
    """Four clips: pictures in a folder, beside and alone; one is silent, one says nothing."""
    generator = np.random.default_rng(0)
    (folder / "deep").mkdir(parents=True)
    for name, words in (("a", "a good film"), ("b", "  \n"), ("deep/c", "bad bad film")):
        (folder / f"{name}.txt").write_text(words)
    for name, rate, count in (("a", 16000, 3200), ("b", 8000, 2000), ("deep/c", 16000, 0)):
        wavfile.write(folder / f"{name}.wav", rate, (generator.normal(0, 3000, count)).astype(np.int16))
    for frame in range(3):
        picture(folder / "a" / f"{frame:04d}.png", frame)
        picture(folder / "deep" / f"c_{frame}.jpg", 10 + frame)
    picture(folder / "b.png", 20)
    picture(folder / "x" / "only.png", 30)
    return folder


def run(folder: Path, encoders: dict[str, Path], *more: str) -> None:
    pairs = [part for name, path in encoders.items() for part in ("--encoder", f"{name}={path}")]
    assert command.main(["prepare", "emotion_folder", "--path", str(folder), *pairs, *more]) == 0


def test_clips_are_found_by_name_with_what_each_has(tmp_path):
    found = {clip.name: clip for clip in find_clips(clips(tmp_path))}
    assert tuple(found) == NAMES
    assert [clip.text for clip in found.values()] == ["a good film", "", "bad bad film", ""]
    assert [clip.audio is not None for clip in found.values()] == [True, True, True, False]
    assert [[path.name for path in clip.video] for clip in found.values()] == [
        ["0000.png", "0001.png", "0002.png"],
        ["b.png"],
        ["c_0.jpg", "c_1.jpg", "c_2.jpg"],
        ["only.png"],
    ]


def test_features_are_means_of_what_the_encoders_give(tmp_path, encoders, capsys):
    folder = clips(tmp_path)
    run(folder, encoders)
    assert "4 clips, 2 with text, 2 with audio, 4 with video" in capsys.readouterr().out
    found = readers.read_folder(folder)
    assert found.names == NAMES
    assert {name: has.tolist() for name, has in found.present.items()} == {
        "text": [True, False, True, False],
        "audio": [True, True, False, False],
        "video": [True, True, True, True],
    }
    with torch.no_grad():
        bert = transformers.BertModel.from_pretrained(encoders["text"], add_pooling_layer=False).eval()
        hidden = bert(torch.tensor([[2, 7, 4, 6, 3]])).last_hidden_state[0]  # [CLS] a good film [SEP]
        assert np.allclose(found.features["text"][0], hidden.mean(0), atol=1e-6)
        wave = transformers.Wav2Vec2Model.from_pretrained(encoders["audio"]).eval()
        samples = wavfile.read(folder / "a.wav")[1].astype(np.float64) / 2**15
        scaled = torch.tensor((samples - samples.mean()) / np.sqrt(samples.var() + 1e-7)).float()
        assert np.allclose(found.features["audio"][0], wave(scaled[None]).last_hidden_state[0].mean(0), atol=1e-5)
        vit = transformers.ViTModel.from_pretrained(encoders["video"], add_pooling_layer=False).eval()
        process = transformers.ViTImageProcessor.from_pretrained(encoders["video"])
        frames = [Image.open(folder / "a" / f"{frame:04d}.png") for frame in range(3)]
        hidden = vit(**process(images=frames, return_tensors="pt")).last_hidden_state
        assert np.allclose(found.features["video"][0], hidden.mean((0, 1)), atol=1e-5)
    assert not found.features["audio"][2].any()


def test_steps_are_kept_as_sequences_whose_means_are_the_vectors(tmp_path, encoders):
    folder = clips(tmp_path)
    run(folder, encoders)
    means = readers.read_folder(folder)
    run(folder, encoders, "--steps")
    steps = readers.read_folder(folder)
    assert steps.length["text"].tolist() == [5, 0, 5, 0]
    assert steps.length["video"].tolist() == [3, 1, 3, 1]
    for name, length in steps.length.items():
        assert means.extractors[name] != steps.extractors[name]
        for row, count in enumerate(length):
            expected = steps.features[name][row, :count].sum(0) / max(count, 1)
            assert np.allclose(means.features[name][row], expected, atol=1e-6)


def test_a_stopped_run_goes_on_and_only_what_is_new_is_encoded(tmp_path, encoders, monkeypatch):
    folder, calls = clips(tmp_path), []
    whole = Encoder.__call__

    def counted(self, clip):
        calls.append((self.modality, clip.name))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(self, clip)

    monkeypatch.setattr(Encoder, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, encoders)
    assert not (folder / readers.FEATURES).exists()
    stopped = calls[3]
    run(folder, encoders)
    assert calls[4] == stopped
    assert len(calls) == len(set(calls)) + 1 == 10  # text of 2, sound of 3, frames of 4, and the one that was stopped
    before = readers.read_folder(folder)
    run(folder, encoders)
    assert len(calls) == 10
    again = readers.read_folder(folder)
    assert all(np.array_equal(array, again.features[name]) for name, array in before.features.items())
    (folder / "a.txt").write_text("a bad film")
    run(folder, encoders)
    assert calls[10:] == [("text", "a")]
    changed = (readers.read_folder(folder).features["text"] != before.features["text"]).any(axis=1)
    assert changed.tolist() == [True, False, False, False]


def test_the_fingerprint_follows_weights_and_settings_and_not_the_place(tmp_path, encoders):
    first = Encoder("text", encoders["text"], Extraction()).fingerprint
    same = save_text(tmp_path / "same")
    (same / "README.md").write_text("words")
    assert Encoder("text", same, Extraction(frames=3)).fingerprint == first
    assert Encoder("text", save_text(tmp_path / "other", seed=1), Extraction()).fingerprint != first
    assert Encoder("text", same, Extraction(steps=True)).fingerprint != first


def test_a_folder_of_clips_is_trained_on_and_another_one_scaled_alike_or_refused(tmp_path, encoders):
    folder = tmp_path / "own"
    for number in range(12):
        picture(folder / f"clip{number:02d}.png", number)
        (folder / f"clip{number:02d}.txt").write_text("good film" if number % 2 else "bad film a")
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "label"), *((f"clip{n:02d}", ("sad", "happy")[n % 2]) for n in range(12))])
    used = {name: encoders[name] for name in ("text", "video")}
    with pytest.raises(UserError, match=r"own has no features.safetensors; make it by: leanlight data prepare"):
        EmotionDataModule("emotion_folder", path=folder).setup()
    run(folder, used)
    own = EmotionDataModule("emotion_folder", path=folder)
    own.setup()
    assert own.meta.classes == ("happy", "sad")
    assert list(own.meta.extractors) == ["text", "video"]
    assert {Encoder(name, path, Extraction()).fingerprint for name, path in used.items()} == {
        *own.meta.extractors.values()
    }
    state = own.state_dict()

    new = clips(tmp_path / "new")
    run(new, used)
    other = EmotionDataModule("emotion_folder", path=new)
    other.setup()
    other.load_state_dict(state)
    batch = next(iter(other.predict_dataloader()))
    assert batch.present["text"].tolist() == [True, False, True, False]
    mean, deviation = own.statistics["video"]
    raw = torch.from_numpy(readers.read_folder(new).features["video"])
    assert torch.allclose(batch.features["video"], (raw - mean) / deviation, atol=1e-6)

    run(new, {"text": save_text(tmp_path / "foreign", seed=1), "video": encoders["video"]})
    foreign = EmotionDataModule("emotion_folder", path=new)
    foreign.setup()
    with pytest.raises(UserError, match=r"the text features of .* come from another extractor"):
        foreign.load_state_dict(state)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_folder_of_clips_becomes_a_model_and_a_table_of_another_folder(tmp_path, encoders, leanlight):
    own, new = tmp_path / "own", clips(tmp_path / "new")
    for number in range(40):
        picture(own / f"clip{number:02d}.png", number)
        (own / f"clip{number:02d}.txt").write_text("good film" if number % 2 else "bad film a")
    with open(own / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([("id", "label"), *((f"clip{n:02d}", ("sad", "happy")[n % 2]) for n in range(40))])
    pairs = [f"--encoder={name}={encoders[name]}" for name in ("text", "video")]
    for folder in (own, new):
        leanlight("data", "prepare", "emotion_folder", "--path", folder, *pairs, check=True)
    options = ["--model.init_args.assessment.warmup_epochs=1", "--model.init_args.optimizer=Adam"]
    rate = "--model.init_args.optimizer.init_args.lr=0.01"
    limits = ["--trainer.max_epochs=12", "--run.id=one"]
    config = ["--config", "tical/emotion_folder", f"--data.init_args.path={own}"]
    leanlight("fit", *config, *options, rate, *limits, check=True)
    run_folder = tmp_path / "runs" / "tical" / "emotion_folder" / "one"
    leanlight("predict", "--from", run_folder, f"--data.init_args.path={new}", check=True)
    table = run_folder / "predict" / "artifacts" / "predictions" / "clips.csv"
    rows = {row["clip"]: row for row in csv.DictReader(table.read_text().splitlines())}
    assert tuple(rows) == NAMES
    assert rows["a"]["class"] == "happy"  # "a good film"
    assert rows["deep/c"]["class"] == "sad"
    assert (rows["a"]["text_says"], rows["b"]["text_says"]) == ("happy", "")  # b says nothing
    assert rows["a"]["text_anchor"].startswith("clip")
    assert all(0 <= float(row["consistency"]) <= 1 for row in rows.values())


def test_transcripts_of_mosi_become_vectors_that_replace_its_own(tmp_path, encoders, capsys):
    (tmp_path / "cmu_mosi").mkdir()
    names = np.array([f"v{row // 4}_{row}" for row in range(20)])
    np.savez(
        tmp_path / "cmu_mosi" / "mosi_utterances.npz",
        id=names,
        text=np.array(["GOOD FILM", "BAD FILM"] * 10),
        score=np.linspace(-3, 3, 20),
        split_speaker_independent=np.where(np.arange(20) < 14, "train", "test"),
        split_official=np.array(["train", "valid", "test", "train"] * 5),
        **{f"{m}_feat": np.ones((20, 5), np.float32) for m in ("text", "audio", "video")},
    )
    pair = f"text={encoders['text']}"
    assert command.main(["prepare", "mosi", "--root", str(tmp_path), "--encoder", pair]) == 0
    assert "20 clips, 20 with text" in capsys.readouterr().out
    vectors = tmp_path / "cmu_mosi" / "text.safetensors"
    data = EmotionDataModule("mosi", root=tmp_path, text=vectors, split="official", modalities=["text", "audio"])
    data.setup()
    assert data.meta.modalities["text"].width == 8
    assert list(data.meta.extractors) == ["text"]


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint8, np.float32])
def test_wav_files_of_every_kind_hold_the_same_sound(tmp_path, kind):
    wave = 0.5 * np.sin(np.arange(1600) / 16000 * 2 * np.pi * 200)
    scale, shift = {np.int16: (2**15, 0), np.int32: (2**31, 0), np.uint8: (128, 128), np.float32: (1, 0)}[kind]
    both = np.stack([wave + 0.2, wave - 0.2], axis=1)
    wavfile.write(tmp_path / "x.wav", 16000, (both * scale + shift).astype(kind))
    assert np.allclose(read_wav(tmp_path / "x.wav", 16000, 30.0), wave, atol=0.01)
    slow = read_wav(tmp_path / "x.wav", 8000, 30.0)
    assert len(slow) == 800
    assert np.allclose(slow[50:-50], wave[::2][50:-50], atol=0.02)
    assert len(read_wav(tmp_path / "x.wav", 16000, 0.05)) == 800


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "encoder: expected one or more of text=DIR, audio=DIR, video=DIR, got none"),
        (["sound=x"], "encoder: expected one of text, audio, video, got 'sound'"),
        (["text=nowhere"], "encoder: expected a folder with an encoder of transformers for text, got nowhere"),
    ],
)
def test_encoders_that_are_none_are_named(tmp_path, pairs, message):
    arguments = [part for pair in pairs for part in ("--encoder", pair)]
    with pytest.raises(UserError, match=message):
        command.main(["prepare", "emotion_folder", "--path", str(clips(tmp_path)), *arguments])
    assert not (tmp_path / ".features").exists()


def test_bad_clips_are_named(tmp_path, encoders):
    with pytest.raises(UserError, match="path: expected the place of emotion_folder data, got 'nowhere'"):
        run(Path("nowhere"), encoders)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no clip"):
        run(tmp_path / "empty", encoders)
    folder = clips(tmp_path / "clips")
    (folder / "a.wav").write_bytes(b"RIFF no sound")
    with pytest.raises(UserError, match=r"a.wav cannot be read as a wav file"):
        run(folder, {"audio": encoders["audio"]})
    with pytest.raises(UserError, match=r"encoder: .*video cannot be loaded for text|lacks the weights"):
        run(folder, {"text": encoders["video"]})


def test_weights_that_are_not_there_are_not_drawn_at_random(tmp_path):
    folder = save_text(tmp_path / "text")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    gone = next(name for name in weights if "query.weight" in name)
    save_file({k: v for k, v in weights.items() if k != gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the weights .*query.weight"):
        Encoder("text", folder, Extraction())(extract.Clip("x", "a film"))
