"""Files of clips in their publishers' layouts, read without executing anything in them."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.emotion.clips import Array, Clips
from datamodules.images import formats
from leanlight.contracts import UserError, nearest

PARTS = ("train", "val", "test")
FEATURES = "features.safetensors"  # in a folder of clips, what was extracted from them
LABELS = "labels.csv"
_MMSA_PARTS = {"train": "train", "valid": "val", "val": "val", "test": "test"}
_MMSA = {"text": "text", "audio": "audio", "video": "vision"}  # our name of a modality, and theirs
_MMSA_SCORES = {"text": "T", "audio": "A", "video": "V"}
_MER_EMOTIONS = ("neutral", "angry", "happy", "sad", "worried", "surprise")
_FACTS = ("id", "split", "speaker", "classes", "label", "score", "conflict", "extractors", "transcript")
_KINDS = ("length", "present", "label", "score")


def _texts(values: Any) -> Array:
    """One string a clip; of bytes, and of rows whose pieces are joined."""

    def one(value: Any) -> str:
        if isinstance(value, bytes):
            return value.decode("utf-8", "replace")
        return "_".join(map(one, value)) if isinstance(value, (list, tuple, np.ndarray)) else str(value)

    return np.array([one(value) for value in values], dtype=str).reshape(-1)


def _numbers(path: Path, name: str, values: Any) -> Array:
    try:
        return np.asarray(values, np.float64).reshape(len(values), -1)[:, 0]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {name}: expected a number a clip ({error})") from error


# ---- pickles of MMSA and DMD ----


def read_pickle(path: Path) -> Clips:
    """A pickle of MMSA or DMD: ``train``, ``valid`` and ``test``, each with arrays a modality and scores.

    Without ``audio_lengths`` and ``vision_lengths`` (aligned files) steps that are all 0 at the end are padding; the
    length of text is in ``text_bert``. ``regression_labels_T``, ``_A`` and ``_V`` are what a modality alone shows.
    """
    content = formats.unpickle(path)
    found = {part: content[key] for key, part in _MMSA_PARTS.items() if isinstance(content.get(key), dict)}
    if "train" not in found:
        raise UserError(f"{path}: expected train, valid and test, as in the pickles of MMSA, got {_shown(content)}")
    parts = [_mmsa_part(path, part, content) for part, content in found.items()]
    first = parts[0]
    for part in parts[1:]:
        if list(part.features) != list(first.features) or bool(part.unimodal) != bool(first.unimodal):
            raise UserError(f"{path}: expected the same modalities and labels in every part")
    return joined(parts)


def _shown(content: Mapping[str, Any]) -> str:
    return ", ".join(list(content)[:8]) or "nothing"


def _mmsa_part(path: Path, part: str, content: Mapping[str, Any]) -> Clips:
    if "id" not in content or "regression_labels" not in content:
        missing = "id" if "id" not in content else "regression_labels"
        raise UserError(f"{path}: {part} lacks {missing!r}; it has {_shown(content)}")
    names = _texts(content["id"])
    features, length = {}, {}
    for name, theirs in _MMSA.items():
        if theirs in content:
            features[name] = _plain(path, f"{part}.{theirs}", content[theirs])
            if features[name].ndim == 3 and f"{theirs}_lengths" in content:
                length[name] = _numbers(path, f"{theirs}_lengths", content[f"{theirs}_lengths"]).astype(np.int64)
    if not features:
        raise UserError(f"{path}: {part} has none of {', '.join(_MMSA.values())}; it has {_shown(content)}")
    if "text" in features and features["text"].ndim == 3 and "text_bert" in content:
        tokens = _plain(path, f"{part}.text_bert", content["text_bert"])
        if tokens.ndim == 3 and tokens.shape[1:] == (3, features["text"].shape[1]):
            length["text"] = tokens[:, 1].sum(axis=1).astype(np.int64)  # ids, mask, segments
    videos = [name.rsplit("$_$", 1)[0] for name in names]
    return Clips(
        names=tuple(names.tolist()),
        features=features,
        source=str(path),
        length=length,
        score=_numbers(path, "regression_labels", content["regression_labels"]),
        unimodal={
            name: _numbers(path, key, content[key])
            for name, letter in _MMSA_SCORES.items()
            if name in features and (key := f"regression_labels_{letter}") in content
        },
        splits={"official": np.full(len(names), part, "U5")},
        speaker=np.array(videos) if all("$_$" in name for name in names) else None,
    )


def _plain(path: Path, name: str, values: Any) -> Array:
    array = np.asarray(values) if isinstance(values, (np.ndarray, list)) else np.zeros(0, object)
    if array.dtype.kind not in "fiu" or array.ndim not in (2, 3):
        raise UserError(f"{path}: {name}: expected numbers (N, D) or (N, L, D), got {array.dtype} {array.shape}")
    return array


def joined(parts: Sequence[Clips]) -> Clips:
    """Parts with the same fields as one, padded to the longest sequences of each modality."""

    def stacked(name: str) -> Array:
        arrays = [part.features[name] for part in parts]
        if len({(array.ndim, array.shape[-1]) for array in arrays}) > 1:
            raise UserError(
                f"features of {name}: expected the same width everywhere in {parts[0].source}, got "
                f"{' and '.join(str(array.shape) for array in arrays)}"
            )
        if arrays[0].ndim == 3:
            longest = max(array.shape[1] for array in arrays)
            arrays = [np.pad(array, ((0, 0), (0, longest - array.shape[1]), (0, 0))) for array in arrays]
        return np.concatenate(arrays)

    def each(kind: str) -> dict[str, Array]:
        first = getattr(parts[0], kind)
        return {name: np.concatenate([getattr(part, kind)[name] for part in parts]) for name in first}

    speakers = [part.speaker for part in parts if part.speaker is not None]
    scores = [part.score for part in parts if part.score is not None]
    return replace(
        parts[0],
        names=tuple(name for part in parts for name in part.names),
        features={name: stacked(name) for name in parts[0].features},
        length=each("length"),
        unimodal=each("unimodal"),
        splits=each("splits"),
        score=np.concatenate(scores),
        speaker=np.concatenate(speakers) if len(speakers) == len(parts) else None,
    )


# ---- MERTools ----


def read_mertools(folder: Path, folders: Mapping[str, str] | None) -> Clips:
    """A data set of MERTools: ``label*.npz`` and ``features/<extractor>/<clip>.npy``.

    The parts are ``train_corpus``, ``val_corpus``, ``test_corpus``; MER2023 has ``test1_corpus`` to ``test3_corpus``,
    of which ``official`` takes the first, ``test2`` and ``test3`` (schemes of their own) the others.

    Args:
        folder: of the data set.
        folders: name of the features' folder by modality; None: those called text, audio and video.
    """
    labels = sorted(folder.glob("label*.npz"))
    if len(labels) != 1:
        raise UserError(f"path: expected one label*.npz in {folder}, got {', '.join(p.name for p in labels) or 'none'}")
    corpora = _corpora(labels[0])
    marks = {part: np.repeat(part, len(corpus)) for part, corpus in corpora.items()}
    names = tuple(name for corpus in corpora.values() for name in corpus)
    part = np.concatenate(list(marks.values()))
    tests = [name for name in corpora if name.startswith("test")]
    splits = {}
    for test in tests:
        mark = np.where(part == test, "test", np.where(np.isin(part, ("train", "val")), part, ""))
        splits["official" if test == tests[0] else test] = mark
    features, length = {}, {}
    for name in folders or {name: name for name in ("text", "audio", "video") if (folder / "features" / name).is_dir()}:
        features[name], steps = _clip_files(folder / "features" / (folders or {}).get(name, name), names)
        if steps is not None:
            length[name] = steps
    if not features:
        there = sorted(p.name for p in (folder / "features").glob("*") if p.is_dir())
        raise UserError(
            f"folders: expected a folder of {folder / 'features'} for each modality, such as text=…; got none; there "
            f"are {', '.join(there) or 'none'}"
        )
    values = [corpus[name] for corpus in corpora.values() for name in corpus]
    return replace(Clips(names, features, str(folder), length, splits=splits), **_mer_labels(labels[0], names, values))


def _corpora(path: Path) -> dict[str, dict[str, Any]]:
    """What is known of each clip, by part and name: dictionaries that are pickled inside an npz."""
    corpora = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is truncated or no npz file ({error})") from error
    for part in ("train", "val", "test", "test1", "test2", "test3"):
        if (member := f"{part}_corpus") in members:
            corpora[part] = _pickled(path, member, members[member])
    if "train" not in corpora or len(corpora) < 2:
        raise UserError(f"{path}: expected train_corpus and test_corpus or test1_corpus, got {_shown(members)}")
    return corpora


def _pickled(path: Path, name: str, content: bytes) -> dict[str, Any]:
    """The dictionary in an array of one object."""
    file = BytesIO(content)
    try:
        version = np.lib.format.read_magic(file)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(file)
    except ValueError as error:
        raise UserError(f"{path}: {name} is damaged ({error})") from error
    if shape != () or not dtype.hasobject:
        raise UserError(f"{path}: {name}: expected a dictionary of clips, got {dtype} {shape}")
    held = formats.unpickle(path, np.ndarray, file.read())
    corpus = held.item() if held.shape == () else None
    if not isinstance(corpus, dict) or not all(isinstance(value, dict) for value in corpus.values()):
        raise UserError(f"{path}: {name}: expected a dictionary of clips")
    return {str(name): value for name, value in corpus.items()}


def _mer_labels(path: Path, names: Sequence[str], values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Emotions where clips have them as words, else scores."""
    emotions = [emotion for value in values if isinstance(emotion := value.get("emo"), str)]
    if len(emotions) == len(values):
        there = set(emotions)
        ordered = [name for name in _MER_EMOTIONS if name in there] if there <= set(_MER_EMOTIONS) else sorted(there)
        number = {name: position for position, name in enumerate(ordered)}
        return {"label": np.array([number[one] for one in emotions], np.int64), "classes": tuple(ordered)}
    for name, value in zip(names, values, strict=True):
        if not isinstance(value.get("val"), (int, float)):
            raise UserError(f"{path}: expected 'emo' as words or 'val' as a number, got {value} of clip {name!r}")
    return {"score": np.array([value["val"] for value in values], np.float64)}


def _clip_files(folder: Path, names: Sequence[str]) -> tuple[Array, Array | None]:
    """Features of every clip, and steps where they are sequences."""
    if not folder.is_dir():
        near = nearest(folder.name, [p.name for p in folder.parent.glob("*") if p.is_dir()])
        raise UserError(f"folders: expected a folder of features, got {folder}{near}")
    arrays = []
    for name in names:
        path = folder / f"{name}.npy"
        try:
            array = np.load(path, allow_pickle=False)
        except formats.NO_ARRAY as error:
            raise UserError(f"{path} is missing or no array of numbers ({error})") from error
        if array.ndim == 2 and len(array) == 1 and "UTT" in folder.name:
            array = array[0]
        if array.ndim not in (1, 2) or array.dtype.kind not in "fiu":
            raise UserError(f"{path}: expected numbers (D,) or (L, D), got {array.dtype} {array.shape}")
        arrays.append(array.astype(np.float32))
    for name, array in zip(names, arrays, strict=True):
        if (array.ndim, array.shape[-1]) != (arrays[0].ndim, arrays[0].shape[-1]):
            raise UserError(f"{folder / name}.npy: expected {arrays[0].shape} as in the first clip, got {array.shape}")
    if arrays[0].ndim == 1:
        return np.stack(arrays), None
    return padded(arrays)


def padded(arrays: Sequence[Array]) -> tuple[Array, Array]:
    """Sequences (L, D) of different lengths as one array, 0 behind them, and their lengths."""
    length = np.array([len(array) for array in arrays], np.int64)
    out = np.zeros((len(arrays), int(length.max(initial=1)), arrays[0].shape[-1]), np.float32)
    for row, array in enumerate(arrays):
        out[row, : len(array)] = array
    return out, length


# ---- flat arrays ----


def read_arrays(path: Path) -> Clips:
    """An npz or safetensors file with an array a fact, one row a clip; see `from_arrays`."""
    if path.suffix == ".safetensors":
        return from_arrays(path, read_safetensors(path))
    return from_arrays(path, formats.read_arrays(path))


def read_safetensors(path: Path) -> dict[str, Array]:
    """Arrays of a safetensors file, and those texts of its metadata that are JSON lists."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            texts = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error})") from error
    for name in _FACTS:
        if name in texts:
            try:
                value = json.loads(texts[name])
            except ValueError as error:
                raise UserError(f"{path}: metadata {name!r}: expected JSON ({error})") from error
            arrays[name] = np.array(value if isinstance(value, list) else texts[name], dtype=str)
    return arrays


def from_arrays(path: Path, arrays: Mapping[str, Array]) -> Clips:
    """Clips of flat arrays.

    Every array of floats with two dimensions or three is a modality (N, D) or (N, L, D). A modality X may have
    ``X_length`` and ``X_present``, and ``X_label`` or ``X_score``, what it shows alone. Of a clip: ``id`` (needed),
    ``label`` (whole numbers) or ``score``, ``split`` (train, val, test), ``speaker``, ``conflict``. Of the set:
    ``classes``, ``extractors`` (JSON: sha256 by modality).

    Args:
        path: of the file, for errors.
        arrays: by name.
    """
    if "id" not in arrays:
        raise UserError(f"{path} lacks the array 'id', the names of the clips; it has {_shown(arrays)}")
    features = {name: array for name, array in arrays.items() if array.dtype.kind == "f" and array.ndim in (2, 3)}
    known = {*_FACTS, *features, *(f"{name}_{kind}" for name in features for kind in _KINDS)}
    if stray := [name for name in arrays if name not in known]:
        raise UserError(
            f"{path}: array {stray[0]!r} {arrays[stray[0]].dtype} {arrays[stray[0]].shape} is nothing that belongs to "
            f"clips{nearest(stray[0], known)}; a modality is an array of floats (N, D) or (N, L, D)"
        )
    if not features:
        raise UserError(f"{path} has no modality: an array of floats (N, D) or (N, L, D); it has {_shown(arrays)}")
    of = {kind: {m: arrays[name] for m in features if (name := f"{m}_{kind}") in arrays} for kind in _KINDS}
    label, score = arrays.get("label"), arrays.get("score")
    alone = of["label"] if score is None else of["score"]
    classes = tuple(map(str, arrays["classes"])) if "classes" in arrays else ()
    if label is not None:
        label, classes = _whole(path, "label", label, classes)
        alone = {name: _whole(path, f"{name}_label", array, classes)[0] for name, array in alone.items()}
    return Clips(
        names=tuple(_texts(arrays["id"]).tolist()),
        features=features,
        source=str(path),
        length={name: array for name, array in of["length"].items() if features[name].ndim == 3},
        present={name: array.astype(bool) for name, array in of["present"].items()},
        label=label if score is None else None,
        score=None if score is None else _numbers(path, "score", score),
        classes=classes,
        unimodal=alone,
        conflict=arrays["conflict"].astype(bool) if "conflict" in arrays else None,
        splits={"official": _parts(path, _texts(arrays["split"]))} if "split" in arrays else {},
        speaker=_texts(arrays["speaker"]) if "speaker" in arrays else None,
        extractors=_extractors(path, arrays.get("extractors")),
    )


def _whole(path: Path, name: str, label: Array, classes: tuple[str, ...]) -> tuple[Array, tuple[str, ...]]:
    """Labels as int64, and the names of their classes: numbers where there are none."""
    if label.dtype.kind not in "iu" or label.ndim != 1:
        raise UserError(f"{path}: {name}: expected whole numbers (N,), got {label.dtype} {label.shape}")
    count = len(classes) or int(label.max(initial=0)) + 1
    if label.min(initial=0) < 0 or label.max(initial=0) >= count:
        raise UserError(f"{path}: {name}: expected 0 to {count - 1}, got {label.min()} to {label.max()}")
    return label.astype(np.int64), classes or tuple(map(str, range(count)))


def _parts(path: Path, marks: Array) -> Array:
    marks = np.where(marks == "valid", "val", marks)
    if (stray := ~np.isin(marks, (*PARTS, ""))).any():
        raise UserError(f"{path}: split: expected one of {', '.join(PARTS)}, got {str(marks[stray][0])!r}")
    return marks


def _extractors(path: Path, held: Array | None) -> dict[str, str]:
    if held is None:
        return {}
    try:
        found = json.loads(str(held))
    except ValueError as error:
        raise UserError(f"{path}: extractors: expected JSON, sha256 by modality ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: extractors: expected JSON, sha256 by modality")
    return {str(name): str(digest) for name, digest in found.items()}


def with_table(clips: Clips, path: Path) -> Clips:
    """Clips with the labels of a table: columns ``id``, ``label`` or ``score``, and perhaps ``split``, ``speaker``.

    Labels are words, or numbers as words; classes are in alphabetical order, of numbers in theirs. Clips that the
    table lacks are left out.

    Args:
        clips: without labels.
        path: a CSV file.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8 ({error})") from error
    columns = set(rows[0]) if rows else set()
    if "id" not in columns or not columns & {"label", "score"}:
        raise UserError(f"{path}: expected the columns id, and label or score, got {', '.join(map(str, columns))}")
    place = {name: row for row, name in enumerate(clips.names)}
    if missing := [row["id"] for row in rows if row["id"] not in place]:
        raise UserError(f"{path}: clip {missing[0]!r} has no features{nearest(missing[0], place)}")
    clips = clips.take(np.array([place[row["id"]] for row in rows], np.int64))
    if "split" in columns:
        clips = replace(clips, splits={"official": _parts(path, _texts([row["split"] or "" for row in rows]))})
    if "speaker" in columns:
        clips = replace(clips, speaker=_texts([row["speaker"] for row in rows]))
    if "score" in columns:
        return replace(clips, score=_numbers(path, "score", [row["score"] for row in rows]))
    words = [row["label"] for row in rows]
    if not all(words):
        bare = next(row["id"] for row in rows if not row["label"])
        raise UserError(f"{path}: label: expected one for every clip, got none for {bare!r}")
    numeric = all(word.lstrip("-").isdigit() for word in words)
    classes = tuple(sorted(set(words), key=int)) if numeric else tuple(sorted(set(words)))
    number = {name: position for position, name in enumerate(classes)}
    return replace(clips, label=np.array([number[word] for word in words], np.int64), classes=classes)


def read_folder(folder: Path) -> Clips:
    """A folder of clips: the features that were extracted, with the table of labels where there is one."""
    if not (folder / FEATURES).is_file():
        raise UserError(
            f"path: {folder} has no {FEATURES}; make it by: leanlight data prepare emotion_folder --path {folder} "
            "--encoder text=DIR --encoder audio=DIR --encoder video=DIR"
        )
    clips = read_arrays(folder / FEATURES)
    return with_table(clips, folder / LABELS) if (folder / LABELS).is_file() else clips


# ---- MOSI as one vector a clip ----

_SEEN = (
    "it was trained with the labels of the speaker-independent training part, which holds 558 of these 686 test clips"
)


def read_mosi(path: Path) -> Clips:
    """``mosi_utterances.npz``: vectors, transcripts and scores of CMU-MOSI, with both of its splits.

    Its text and video vectors are refused with the official split, whose test clips they have seen.
    """
    arrays = formats.read_arrays(path)
    needed = ("id", "score", "split_speaker_independent", "split_official", *(f"{m}_feat" for m in _MMSA))
    if missing := [name for name in needed if name not in arrays]:
        raise UserError(f"{path} lacks the array {missing[0]!r}; it has {_shown(arrays)}")
    names = _texts(arrays["id"])
    return Clips(
        names=tuple(names.tolist()),
        features={name: arrays[f"{name}_feat"] for name in _MMSA},
        source=str(path),
        score=_numbers(path, "score", arrays["score"]),
        splits={
            "speaker": _parts(path, _texts(arrays["split_speaker_independent"])),
            "official": _parts(path, _texts(arrays["split_official"])),
        },
        speaker=np.array([name.rsplit("_", 1)[0] for name in names.tolist()]),
        refused={"official": {"text": _SEEN, "video": _SEEN}},
    )


def mosi_transcripts(path: Path) -> dict[str, str]:
    """What is said in each clip of ``mosi_utterances.npz``, by name."""
    arrays = formats.read_arrays(path)
    if missing := [name for name in ("id", "text") if name not in arrays]:
        raise UserError(f"{path} lacks the array {missing[0]!r}; it has {_shown(arrays)}")
    return dict(zip(_texts(arrays["id"]).tolist(), _texts(arrays["text"]).tolist(), strict=True))
